"""Batches of which nothing waits between a model's decoder layers but their hidden states."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.runtime.base_forward import alone, run_base
from moe_ext.runtime.course import split_state, unwritten
from moe_ext.runtime.hidden_states import HiddenStates


class InStates:
    """The model's forward runs anew for every layer; the other layers pass the hidden states through."""

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
        after: Callable[[int, Tensor], None] | None,
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
