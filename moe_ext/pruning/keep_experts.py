"""Leaves a MoE layer some of its experts, in place."""

from collections.abc import Sequence

from moe_ext.models.blocks import (
    MoeBlock,
    PerExpert,
    counting_attributes,
    experts_by_name,
)
from moe_ext.models.boundary import num_routed
from moe_ext.models.fixed_choices import gate_rows, remapped, tables
from moe_ext.models.replace import replace_tensor


def keep_experts(block: MoeBlock, keep: Sequence[int]) -> None:
    """Leaves one layer of a whole model those experts, in all that the block's modules hold; its config stays."""
    inside = set(block.module.modules())
    counts = [len(keep) if experts is block.experts else num_routed(experts)
              for experts in experts_by_name(block.model).values()]  # fmt: skip
    attributes = [each for each in counting_attributes(block.model, counts) if each.module in inside]
    remap_choices(block, keep)
    keep_slices(keep, block.num_experts, block.routing_tensors() + block.expert_parts())
    for module, name, value in attributes:
        setattr(module, name, value)


def remap_choices(block: MoeBlock, keep: Sequence[int]) -> None:
    """Before a whole layer is left with those experts: tables of its router that say a token's experts."""
    for name, table in tables(block).items():
        if len(keep) < block.num_experts and not table.is_meta:
            replace_tensor(block.router, name, table, remapped(table, keep, gate_rows(block)))


def keep_slices(keep: Sequence[int], experts: int, parts: Sequence[PerExpert]) -> None:
    """Replaces the tensors of a layer with ``experts`` experts by what belongs to those of ``keep``."""
    # All slices are copied before any takes its place: a block is pruned as a whole or not at all.
    slices = [part.kept(keep, experts) for part in parts]
    for part, kept in zip(parts, slices, strict=True):
        replace_tensor(part.module, part.name, part.tensor, kept)
