"""Leaves a MoE layer some of its experts, in place."""

import torch
from torch import Tensor, nn

from moe_ext.models.blocks import MoeBlock, expert_tensors
from moe_ext.pruning.replace import replace_tensor


def keep_experts(block: MoeBlock, keep: tuple[int, ...]) -> None:
    """Removes all experts but those of ``keep``, their rows of the router and its biases."""
    keep_slices(keep, block.routing_tensors() + expert_parts(block))
    for module in (block.module, block.router, block.experts):
        if hasattr(module, "num_experts"):
            module.num_experts = len(keep)  # type: ignore[assignment]


Part = tuple[nn.Module, str, Tensor, int]  # module, name of a tensor of it, the tensor, its dimension of experts


def expert_parts(block: MoeBlock) -> list[Part]:
    """The tensors of a layer's experts."""
    return [(block.experts, name, old, 0) for name, old in expert_tensors(block).items()]


def keep_slices(keep: tuple[int, ...], parts: list[Part]) -> None:
    """Replaces per-expert tensors by their slices ``keep``."""
    # All slices are copied before any takes its place: a block is pruned as a whole or not at all.
    slices = [old.index_select(dim, torch.tensor(keep, device=old.device)) for _, _, old, dim in parts]
    for (module, name, old, _), kept in zip(parts, slices, strict=True):
        replace_tensor(module, name, old, kept)
