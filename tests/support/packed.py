"""Formats of quantised experts, and models with what they stand for."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.expert_width import width_of
from moe_ext.models.packed_experts import WeightFormat, weight_names
from moe_ext.runtime.formulas import experts_layer
from tests.support.families import plan_for

FORMATS = {
    "int8": WeightFormat("int8", 0),
    "int4, groups of 32": WeightFormat("int4", 32),
    "int4, groups of 128": WeightFormat("int4", 128),
    "int4, zero points": WeightFormat("int4", 64, symmetric=False),
    "fp8, rows": WeightFormat("fp8", 0),
    "fp8, blocks": WeightFormat("fp8", 128),
    "mxfp4": WeightFormat("mxfp4", 32),
}

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
}


def arguments(form: WeightFormat) -> dict[str, Any]:
    """Of :func:`moe_ext.quantize` and the like."""
    return {"weights": form.type, "group_size": form.group_size, "symmetric": form.symmetric}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)


def same_bits(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


def with_floats(quantised: PreTrainedModel, plain: PreTrainedModel) -> PreTrainedModel:
    """The plain model, the weights of its experts replaced by what those of the quantised one stand for."""
    for packed, block in zip(moe_blocks(quantised), moe_blocks(plain), strict=True):
        layer = experts_layer(packed.experts)
        first, down = weight_names(block.experts)
        for name, read in ((first, layer.rows), (down, layer.outputs)):
            weight: Any = getattr(block.experts, name)
            values = torch.stack([read(expert) for expert in range(block.num_experts)])
            values = values.transpose(1, 2) if getattr(block.experts, "is_transposed", False) else values
            weight.data.copy_(values)
    return plain


def thin_plan_for(model: PreTrainedModel, width: int, size: int, seed: int = 0) -> PruningPlan:
    """Random blocks of ``size`` channels for every expert, all experts."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for each in moe_blocks(model):
        order = torch.rand(each.num_experts, width_of(each) // size, generator=generator).argsort(1)
        chosen = order[:, : width // size].sort(1).values * size
        kept.append((chosen[..., None] + torch.arange(size)).flatten(1))
    whole = plan_for(model, tuple(tuple(range(each.num_experts)) for each in moe_blocks(model)))
    return replace(whole, channels=KeptChannels.of(kept, width_of(moe_blocks(model)[0])))
