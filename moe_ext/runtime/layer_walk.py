"""What the routers of a model see, one MoE layer after the other: every decoder layer runs once over all batches, and
the hidden states before the next one wait in between.

The model's own forward runs each time, so that masks and positions are its own; the decoder layers that are not wanted
pass the hidden states through.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.models.blocks import MoeBlock, decoder_layers, input_device
from moe_ext.runtime.hidden_states import MEMORY, HiddenStates, SpillingStates

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

Seen = Callable[[int, Tensor, Tensor], None]
"""Called with the index of a batch, the experts' input (T, H) and the router's logits (T, E)."""


class LayerInputs:
    """Walks through a model's decoder layers in order; a context manager that gives the hidden states' memory back.

    Args:
        model: in evaluation mode.
        blocks: its MoE layers.
        batches: arguments of the model's forward.
        states: where hidden states wait; a bounded part in memory if absent.
        need: called with the index of a decoder layer before it runs, for models whose weights are not all in memory.
        position: decoder layer to begin with, if ``states`` hold what it is given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[MoeBlock],
        batches: Sequence[Mapping[str, Tensor]],
        *,
        states: HiddenStates | None = None,
        need: Callable[[int], None] | None = None,
        position: int = 0,
    ) -> None:
        self._model, self._batches = model, batches
        _, self._layers, self._layer_of_block = decoder_layers(model, blocks)
        self._blocks = blocks
        self._states = states or SpillingStates(MEMORY)
        self._need = need
        self._position = position  # the states are those before this layer; before the first none are kept

    def __enter__(self) -> "LayerInputs":
        return self

    def __exit__(self, *raised: object) -> None:
        self._states.close()

    def advance(self, before: Callable[[int], None] | None = None) -> None:
        """Runs the next decoder layer over all batches.

        Args:
            before: called with the index of every batch.

        Raises:
            ValueError: the layer returns something other than hidden states.
        """
        self._through(before, stay=False)
        self._states.turn()
        self._position += 1

    def stay(
        self,
        before: Callable[[int], None] | None = None,
        after: Callable[[int, Tensor], None] | None = None,
        *,
        batches: int | None = None,
    ) -> None:
        """Runs the next decoder layer over all batches, and remains before it.

        Args:
            before: called with the index of every batch.
            after: called with the index of every batch and what the layer returned (B, S, H).
            batches: how many of them; None: all.

        Raises:
            ValueError: the layer returns something other than hidden states.
        """
        self._through(before, stay=True, after=after, batches=batches)

    def states(self, batch: int) -> Tensor:
        """A batch's hidden states (B, S, H) before the next decoder layer, which is not the first; to be read only."""
        return self._states.read(batch)

    def _through(
        self,
        before: Callable[[int], None] | None,
        *,
        stay: bool,
        after: Callable[[int, Tensor], None] | None = None,
        batches: int | None = None,
    ) -> None:
        layer = self._layers[self._position]

        def through(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                output = original(self._entering(batch, hidden), *args, **kwargs)
                if not isinstance(output, Tensor):
                    raise ValueError(f"a {type(layer).__name__} returns {type(output).__name__}; expected a tensor")
                if not stay:
                    self._states.write(batch, output)
                if after is not None:
                    after(batch, output)
                return output

            return forward

        batch = 0
        with alone(self._layers, self._position, self._need) as replace:
            replace(layer, through)
            for batch, inputs in enumerate(self._batches[:batches]):
                if before is not None:
                    before(batch)
                run_base(self._model, inputs)

    def observe(self, block: int, seen: Seen) -> None:
        """Calls ``seen`` for every batch with what the experts of an MoE layer are given, and its router computes, with
        what the layers before it compute now.

        Args:
            block: index of the layer; not before that of an earlier call.
        """
        target = self._layer_of_block[block]
        while self._position < target:
            self.advance()
        router, experts = self._blocks[block].router, self._blocks[block].experts
        batch, routed = 0, 0
        logits: Tensor

        def enter(original: Callable[..., Any]) -> Callable[..., Any]:
            return lambda hidden, *args, **kwargs: original(self._entering(batch, hidden), *args, **kwargs)

        def look(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            nonlocal logits
            logits = output[0]

        def stop(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal routed
            routed += 1
            seen(batch, hidden.reshape(-1, hidden.shape[-1]), logits)
            return torch.zeros_like(hidden)  # what follows is not looked at

        with alone(self._layers, target, self._need) as replace:
            replace(self._layers[target], enter)
            replace(experts, lambda _: stop)
            handle = router.register_forward_hook(look)
            try:
                for batch, inputs in enumerate(self._batches):  # noqa: B007  the closures read it
                    run_base(self._model, inputs)
            finally:
                handle.remove()
        if routed != len(self._batches):
            raise RuntimeError(
                f"{self._blocks[block].name}: the experts ran {routed} times in {len(self._batches)} batches"
            )

    def _entering(self, batch: int, hidden: Tensor) -> Tensor:
        """What the layer at the position is given: before the first one it is what the model computes."""
        return hidden if self._position == 0 else self._states.read(batch).to(hidden.device)


@contextmanager
def alone(
    layers: Sequence[nn.Module], index: int, need: Callable[[int], None] | None
) -> Iterator[Callable[[nn.Module, Callable[[Callable[..., Any]], Any]], None]]:
    """Every decoder layer but one passes its input on. Yields a function that puts something around a module's forward;
    all is as it was on the way out.

    Args:
        need: called with the index before anything is replaced.
    """
    if need is not None:
        need(index)
    with replaced_forwards() as replace:
        for other, layer in enumerate(layers):
            if other != index:
                replace(layer, lambda _: _pass_on)
        yield replace


def run_base(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Any:
    """What the model without its head returns for a batch."""
    on_device = {name: tensor.to(input_device(model)) for name, tensor in inputs.items()}
    output = model.base_model(**on_device, use_cache=False)
    _give_back_holes()
    return output


def _give_back_holes() -> None:
    """Gives freed memory back to the system, where the C library can. glibc before 2.38 seldom finds a place for an
    aligned block, such as a tensor, among those that were freed: over many batches the holes would add up."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def _pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden


@contextmanager
def replaced_forwards() -> Iterator[Callable[[nn.Module, Callable[[Callable[..., Any]], Callable[..., Any]]], None]]:
    """Yields a function that puts something around a module's forward; all of them come off again on the way out."""
    before: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    def replace(module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        before.append((module, vars(module).get("forward")))
        module.forward = around(module.forward)

    try:
        yield replace
    finally:
        for module, own in reversed(before):
            if own is None:
                del module.forward
            else:
                module.forward = own
