"""Batches that wait between a model's decoder layers in their own forward passes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.runtime.base_forward import give_back_holes, run_base
from moe_ext.runtime.course import split_state
from moe_ext.runtime.hidden_states import ParkedStates
from moe_ext.runtime.suspended import Entry, SuspendedForward, suspending


class InFrames:
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
        after: Callable[[int, Tensor], None] | None,
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
                if "start new thread" in str(error):
                    raise RuntimeError(
                        f"the system lets this process have no more than {batch} further threads ({error}); expected "
                        f"one for each of {len(self._batches)} batches: take larger ones"
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
