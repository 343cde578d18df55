"""Batches of which nothing waits between a model's decoder layers but their hidden states, or these and the second
thing that layers return.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.runtime.base_forward import alone, run_base
from moe_ext.runtime.course import split_state, unwritten
from moe_ext.runtime.hidden_states import HiddenStates


@runtime_checkable
class KeptPairs(Protocol):
    """Hidden states that keep what layers return beside them."""

    def write_second(self, batch: int, second: Tensor | None) -> None: ...
    def second_before(self, layer: int, batch: int) -> Tensor | None: ...


def second_of(layer: nn.Module, returned: Any) -> Tensor | None:
    """The second thing that a layer returned.

    Raises:
        ValueError: it is none that no gradient goes through.
    """
    kind = type(layer).__name__
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(f"a {kind} returns {type(returned).__name__}; expected two things")
    second = returned[1]
    if second is None or (isinstance(second, Tensor) and not second.is_floating_point()):
        return second
    raise ValueError(
        f"loss: 'fisher': a {kind} hands the next layer more numbers than hidden states, through which gradients go, "
        "too: search by loss='reconstruction'"
    )


class InStates:
    """The model's forward runs anew for every layer; the other layers pass the hidden states through.

    Args:
        states: where they wait.
        position: layer to begin with.
        pairs: where what layers return beside them waits, if they return pairs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        batches: Sequence[Mapping[str, Tensor]],
        states: HiddenStates,
        position: int,
        pairs: KeptPairs | None = None,
    ) -> None:
        self._model, self._layers, self._batches, self._states = model, layers, batches, states
        self._pairs = pairs
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
                    returned = original(entering, *others, **named)
                output = returned if self._pairs is None else returned[0]
                if not isinstance(output, Tensor):
                    kind = type(self._layers[layer]).__name__
                    raise ValueError(f"a {kind} returns {type(output).__name__}; expected a tensor")
                if not stay:
                    if self._pairs is not None:
                        self._pairs.write_second(batch, second_of(self._layers[layer], returned))
                    self._states.write(batch, output)
                if after is not None:
                    after(batch, output)
                return returned

            return forward

        def as_stored(_: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: (self._states.read(batch), self._read_second(layer, batch))

        with alone(self._layers, layer, None, pairs=self._pairs is not None) as replace:
            if self._pairs is not None and self._stored:
                replace(self._layers[layer - 1], as_stored)
            replace(self._layers[layer], through)
            for batch in batches:
                if before is not None:
                    before(batch)
                run_base(self._model, self._batches[batch])
        if not stay:
            self._states.turn()
            self._stored = True

    def _read_second(self, layer: int, batch: int) -> Tensor | None:
        assert self._pairs is not None
        second = self._pairs.second_before(layer, batch)
        return None if second is None else second.to(next(self._layers[layer].parameters()).device)

    def states(self, batch: int) -> Tensor:
        return self._states.read(batch)

    def close(self) -> None:
        self._states.close()
