"""What the routers of a model see, one MoE layer after the other: every decoder layer runs once over all batches before
the next one does.

Between the layers every batch's forward pass is suspended (:mod:`moe_ext.runtime.suspended`), so that all that a layer
is given is what the model's own code makes of it. Where only hidden states wait, because another process may have to go
on with them, the model's forward runs anew for every layer, and the other layers pass the hidden states through: for
models of which :class:`moe_ext.runtime.course.Course` says that this is the same.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.models.blocks import MoeBlock, decoder_layers
from moe_ext.runtime.base_forward import alone, give_back_holes, replaced_forwards, run_base
from moe_ext.runtime.course import Course, course_of, split_state, unwritten
from moe_ext.runtime.hidden_states import MEMORY, HiddenStates, ParkedStates
from moe_ext.runtime.suspended import Entry, SuspendedForward, suspending

Seen = Callable[[int, Tensor, Tensor], None]
"""Called with the index of a batch, the experts' input (T, H) and the router's logits (T, E)."""

After = Callable[[int, Tensor], None]


class LayerInputs:
    """Walks through a model's decoder layers in the order in which they run; a context manager that ends the forward
    passes and gives the hidden states' memory back.

    Args:
        model: in evaluation mode.
        blocks: its MoE layers.
        batches: arguments of the model's forward.
        course: of its forward passes over them; found out if absent.
        states: where hidden states wait; a bounded part in memory if absent.
        need: called with the index of a decoder layer before it runs, for models whose weights are not all in memory.
        position: call of a decoder layer to begin with, if ``states`` hold what it is given.

    Raises:
        ValueError: ``states`` that keep nothing but hidden states, of a model that needs more.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[MoeBlock],
        batches: Sequence[Mapping[str, Tensor]],
        *,
        course: Course | None = None,
        states: HiddenStates | ParkedStates | None = None,
        need: Callable[[int], None] | None = None,
        position: int = 0,
    ) -> None:
        _, layers, self._layer_of_block = decoder_layers(model, blocks)
        self._blocks, self._batches, self._need = blocks, batches, need
        self._course = course or course_of(model, blocks, batches)
        self._position = position  # number of layer calls that are done
        self._way: _Way
        if states is None or isinstance(states, ParkedStates):
            self._way = _InFrames(model, layers, batches, states or ParkedStates(MEMORY))
        else:
            self._course.refuse_obstacles("this walk")
            self._way = _InStates(model, layers, batches, states, position)

    def __enter__(self) -> "LayerInputs":
        return self

    def __exit__(self, *raised: object) -> None:
        self._way.close()

    def advance(self, before: Callable[[int], None] | None = None) -> None:
        """Runs the next decoder layer over all batches.

        Args:
            before: called with the index of every batch.

        Raises:
            ValueError: the layer returns no hidden states.
        """
        self._run(before, None, stay=False, batches=None)
        self._position += 1

    def stay(
        self, before: Callable[[int], None] | None = None, after: After | None = None, *, batches: int | None = None
    ) -> None:
        """Runs the next decoder layer over all batches, and remains before it.

        Args:
            before: called with the index of every batch.
            after: called with the index of every batch and the hidden states that the layer returned (B, S, ...).
            batches: how many of them; None: all.

        Raises:
            ValueError: the layer returns no hidden states.
        """
        self._run(before, after, stay=True, batches=batches)

    def states(self, batch: int) -> Tensor:
        """The hidden states (B, S, ...) of a batch that the last decoder layer that ran returned; to be read only."""
        return self._way.states(batch)

    def observe(self, block: int, seen: Seen) -> None:
        """Calls ``seen`` for every batch with what the experts of an MoE layer are given, and its router computes, with
        what the layers before it compute now.

        Args:
            block: index of the layer; not before that of an earlier call.
        """
        while self._course.calls[self._position] != self._layer_of_block[block]:
            self.advance()
        router, experts = self._blocks[block].router, self._blocks[block].experts
        batch, routed = 0, 0
        logits: Tensor

        def enter(index: int) -> None:
            nonlocal batch
            batch = index

        def look(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            nonlocal logits
            logits = output[0]

        def stop(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal routed
            routed += 1
            seen(batch, hidden.reshape(-1, hidden.shape[-1]), logits)
            return torch.zeros_like(hidden)  # what follows is not looked at

        with replaced_forwards() as replace:
            replace(experts, lambda _: stop)
            handle = router.register_forward_hook(look)
            try:
                self.stay(enter)
            finally:
                handle.remove()
        if routed != len(self._batches):
            raise RuntimeError(
                f"{self._blocks[block].name}: the experts ran {routed} times in {len(self._batches)} batches"
            )

    def _run(
        self, before: Callable[[int], None] | None, after: After | None, *, stay: bool, batches: int | None
    ) -> None:
        layer = self._course.calls[self._position]
        if self._need is not None:
            self._need(layer)
        self._way.run(layer, range(len(self._batches))[:batches], before, after, stay=stay)


class _Way(Protocol):
    """How batches wait between layers."""

    def run(
        self,
        layer: int,
        batches: Sequence[int],
        before: Callable[[int], None] | None,
        after: After | None,
        *,
        stay: bool,
    ) -> None: ...
    def states(self, batch: int) -> Tensor: ...
    def close(self) -> None: ...


class _InFrames:
    """Batches wait in their own forward passes."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        batches: Sequence[Mapping[str, Tensor]],
        parked: ParkedStates,
    ) -> None:
        self._model, self._layers, self._batches, self._parked = model, layers, batches, parked
        self._passes: list[SuspendedForward] = []
        self._left: dict[int, Tensor] = {}  # by batch, what the last layer that ran returned

    def run(
        self,
        layer: int,
        batches: Sequence[int],
        before: Callable[[int], None] | None,
        after: After | None,
        *,
        stay: bool,
    ) -> None:
        if not self._passes:
            self._begin()
        for batch in batches:
            if before is not None:
                before(batch)
            entry = self._passes[batch].entry
            if entry is None or entry.layer != layer:
                where = "at its end" if entry is None else f"before decoder layer {entry.layer}"
                raise RuntimeError(f"batch {batch}: the forward pass is {where}; expected before layer {layer}")
            if not stay:
                self._through(batch, entry)
            elif after is not None:
                after(batch, self._tried(batch, entry))
            else:
                self._tried(batch, entry)
            del entry
            give_back_holes()

    def states(self, batch: int) -> Tensor:
        return self._parked.read(batch, self._left[batch])

    def close(self) -> None:
        for each in self._passes:
            each.cancel()
        self._left.clear()
        self._parked.close()

    def _begin(self) -> None:
        """Brings all batches to the entry of their first layer."""
        for batch, inputs in enumerate(self._batches):
            self._passes.append(SuspendedForward(partial(run_base, self._model, inputs)))
            try:
                with suspending(self._layers):
                    self._passes[batch].begin()
            except RuntimeError as error:
                if "thread" in str(error):
                    raise RuntimeError(
                        f"the system lets this process have no more than {batch} further threads ({error}); expected "
                        f"one for each of {len(self._batches)} batches: take larger ones, or a folder with scratch"
                    ) from error
                raise
            self._park(batch)

    def _tried(self, batch: int, entry: Entry) -> Tensor:
        """What the layer returns, of copies of what it may write to."""
        state, others = split_state(entry.args, entry.kwargs)
        held = self._parked.read(batch, state)
        own = held.clone() if held.device == state.device else held.to(state.device)
        output = self._layers[entry.layer].forward(own, *_copied(others[0]), **_copied(others[1]))
        return self._state_of(entry.layer, output)

    def _through(self, batch: int, entry: Entry) -> None:
        """Takes the pass through the layer, to the entry of the next."""
        self._parked.restore(batch)
        self._left.pop(batch, None)
        output = self._layers[entry.layer].forward(*entry.args, **entry.kwargs)
        self._left[batch] = self._state_of(entry.layer, output)
        with suspending(self._layers):
            self._passes[batch].go_on(output)
        del output, entry
        self._park(batch)

    def _park(self, batch: int) -> None:
        entry = self._passes[batch].entry
        waiting = [] if entry is None else [split_state(entry.args, entry.kwargs)[0]]
        self._parked.park(batch, [*waiting, *([self._left[batch]] if batch in self._left else [])])

    def _state_of(self, layer: int, output: Any) -> Tensor:
        """The hidden states among what a layer returns."""
        state = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(state, Tensor):
            kind = type(self._layers[layer]).__name__
            raise ValueError(f"a {kind} returns {type(output).__name__}; expected hidden states, or these first")
        return state


def _copied(value: Any) -> Any:
    """The same tensors in containers of their own."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


class _InStates:
    """Of every batch nothing waits but its hidden states."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        batches: Sequence[Mapping[str, Tensor]],
        states: HiddenStates,
        position: int,
    ) -> None:
        self._model, self._layers, self._batches, self._states = model, layers, batches, states
        self._stored = position > 0  # before the first layer they are what the model computes

    def run(
        self,
        layer: int,
        batches: Sequence[int],
        before: Callable[[int], None] | None,
        after: After | None,
        *,
        stay: bool,
    ) -> None:
        batch = 0

        def through(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                state, (others, named) = split_state(args, kwargs)
                entering = self._states.read(batch).to(state.device) if self._stored else state
                with unwritten(self._layers[layer], (others, named)):
                    output = original(entering, *others, **named)
                if not isinstance(output, Tensor):
                    kind = type(self._layers[layer]).__name__
                    raise ValueError(f"a {kind} returns {type(output).__name__}; expected a tensor")
                if not stay:
                    self._states.write(batch, output)
                if after is not None:
                    after(batch, output)
                return output

            return forward

        with alone(self._layers, layer, None) as replace:
            replace(self._layers[layer], through)
            for batch in batches:
                if before is not None:
                    before(batch)
                run_base(self._model, self._batches[batch])
        if not stay:
            self._states.turn()
            self._stored = True

    def states(self, batch: int) -> Tensor:
        return self._states.read(batch)

    def close(self) -> None:
        self._states.close()
