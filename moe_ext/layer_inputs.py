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

from moe_ext.architectures import MoeBlock
from moe_ext.spilling import SpillingList

MEMORY = 128 << 20
"""Bytes of hidden states that are kept in memory; more go to a temporary file."""

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

Seen = Callable[[int, Tensor, Tensor], None]
"""Called with the index of a batch, and the router's input (T, H) and logits (T, E)."""


class LayerInputs:
    """Walks through a model's MoE layers in order; a context manager that gives the hidden states' memory back.

    Args:
        model: in evaluation mode.
        blocks: its MoE layers.
        batches: arguments of the model's forward.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[MoeBlock], batches: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self._model, self._batches = model, batches
        self._layers, self._layer_of_block = _decoder_layers(model, blocks)
        self._blocks = blocks
        self._states = SpillingList(MEMORY)  # of every batch, before decoder layer `_position`
        self._position = 0

    def __enter__(self) -> "LayerInputs":
        return self

    def __exit__(self, *raised: object) -> None:
        self._states.close()

    def observe(self, block: int, seen: Seen) -> None:
        """Calls ``seen`` for every batch with what the router of an MoE layer sees, given what the layers before it
        compute now.

        Args:
            block: index of the layer; not before that of an earlier call.
        """
        target, begun = self._layer_of_block[block], len(self._states) > 0
        router, experts = self._blocks[block].router, self._blocks[block].experts
        batch, routed = 0, 0

        def enter(original: Callable[..., Any]) -> Callable[..., Any]:
            """The first layer that runs takes up where the last call left off."""
            return lambda hidden, *args, **kwargs: original(self._states[batch].to(hidden.device), *args, **kwargs)

        def keep(original: Callable[..., Any]) -> Callable[..., Any]:
            """What the observed layer is given is where the next call begins."""

            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                if begun:
                    self._states[batch] = hidden
                else:
                    self._states.append(hidden)
                return original(hidden, *args, **kwargs)

            return forward

        def look(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            nonlocal routed
            routed += 1
            seen(batch, args[0].reshape(-1, args[0].shape[-1]), output[0])

        with _forwards() as replace:
            for index, layer in enumerate(self._layers):
                if index < self._position or index > target:
                    replace(layer, lambda _: _pass_on)
            replace(self._layers[target], keep)
            if begun:
                replace(self._layers[self._position], enter)
            replace(
                experts, lambda _: lambda hidden, *args, **kwargs: torch.zeros_like(hidden)
            )  # what follows is not looked at
            handle = router.register_forward_hook(look)
            try:
                for batch, inputs in enumerate(self._batches):  # noqa: B007  the closures read it
                    on_device = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
                    self._model.base_model(**on_device, use_cache=False)
                    _give_back_holes()
            finally:
                handle.remove()
        if routed != len(self._batches):
            raise RuntimeError(
                f"{self._blocks[block].name}: the router ran {routed} times in {len(self._batches)} batches"
            )
        self._position = target


def _give_back_holes() -> None:
    """Gives freed memory back to the system, where the C library can. glibc before 2.38 seldom finds a place for an
    aligned block, such as a tensor, among those that were freed: over many batches the holes would add up."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def _pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden


@contextmanager
def _forwards() -> Iterator[Callable[[nn.Module, Callable[[Callable[..., Any]], Callable[..., Any]]], None]]:
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


def _decoder_layers(model: PreTrainedModel, blocks: Sequence[MoeBlock]) -> tuple[list[nn.Module], list[int]]:
    """The decoder layers, and which of them every MoE layer is in."""
    modules = dict(model.named_modules())
    parts = blocks[0].name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:depth])
        if isinstance(modules[owner], nn.ModuleList):
            of_block = [int(block.name.removeprefix(owner + ".").split(".")[0]) for block in blocks]
            return list(modules[owner].children()), of_block
    raise ValueError(f"{blocks[0].name} is in no list of decoder layers")
