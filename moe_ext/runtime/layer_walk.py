"""What the routers of a model see, one MoE layer after the other: every decoder layer runs once over all batches before
the next one does.

Where :class:`moe_ext.runtime.course.Course` says that hidden states are all that a layer needs of those before it, they
alone wait between the layers, a bounded part of them in memory: the model's forward runs anew for every layer, and the
other layers pass the hidden states through. Of other models every batch's own forward pass waits, suspended
(:mod:`moe_ext.runtime.suspended`), so that all that a layer is given is what the model's own code makes of it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.models.blocks import MoeBlock, decoder_layers
from moe_ext.runtime.base_forward import replaced_forwards
from moe_ext.runtime.course import Course, course_of
from moe_ext.runtime.hidden_states import MEMORY, HiddenStates, ParkedStates, states_of
from moe_ext.runtime.in_frames import InFrames
from moe_ext.runtime.in_states import InStates, KeptPairs

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
        states = states or states_of(self._course, MEMORY)
        if isinstance(states, ParkedStates):
            self._way = InFrames(model, layers, batches, states)
        else:
            pairs = states if self._course.pairs and isinstance(states, KeptPairs) else None
            if pairs is None:
                self._course.refuse_obstacles("this walk", "let it find states of its own")
            self._way = InStates(model, layers, batches, states, position, pairs)

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

        Raises:
            ValueError: a batch has no token for these experts.
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
            raise ValueError(
                f"{self._blocks[block].name}: the experts ran {routed} times in {len(self._batches)} batches; expected "
                "tokens for them in every batch, such as images where they are for these"
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
