"""Removes channels of a live model's experts: rows of their gate and up projections, columns of down."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.models.blocks import MoeBlock, check_layout, expert_tensors, text_config
from moe_ext.models.expert_width import channel_dimension, config_for_width, take_width, width_of
from moe_ext.pruning.replace import replace_tensor


def check_channels(blocks: list[MoeBlock], channels: KeptChannels) -> int:
    """The width that experts are to have; ValueError, naming the layer, if the channels are not of these experts."""
    if len(channels.masks) != len(blocks):
        raise ValueError(f"channels: are of {len(channels.masks)} layers; this model has {len(blocks)} MoE layers")
    for layer, block in enumerate(blocks):
        check_layout(block)
        if width_of(block) != channels.intermediate_size:
            raise ValueError(
                f"channels: are of experts with {channels.intermediate_size} channels; {block.name} has "
                f"{width_of(block)}"
            )
        if len(channels.masks[layer]) != block.num_experts:
            raise ValueError(
                f"channels: are of {len(channels.masks[layer])} experts; {block.name} has {block.num_experts}"
            )
    widths = [channels.width(layer) for layer in range(len(blocks))]
    if len(set(widths)) > 1:
        raise ValueError(f"channels: layers keep {min(widths)} to {max(widths)} channels; expected one width")
    return widths[0]


def thin(model: PreTrainedModel, blocks: list[MoeBlock], channels: KeptChannels) -> None:
    """Leaves every expert the channels that it is to keep, in place, and the width in the model's config.

    Args:
        model: patched or not, it stays so; its experts are those that ``channels`` is of.

    Raises:
        ValueError: ``channels`` does not fit the model, or its family's config cannot say so. The model is left as it
            was.
    """
    width = check_channels(blocks, channels)
    fields, other = config_for_width(model, blocks, width)
    with torch.no_grad():
        for layer, block in enumerate(blocks):
            kept = channels.indices(layer)
            thinned = [
                (name, old, thinned_tensor(block, name, old, kept)) for name, old in expert_tensors(block).items()
            ]
            for name, old, new in thinned:
                if new is not old:
                    replace_tensor(block.experts, name, old, new)
    take_width(blocks, other)
    for name, value in fields.items():
        setattr(text_config(model), name, value)


def thinned_tensor(block: MoeBlock, name: str, tensor: Tensor, kept: Tensor) -> Tensor:
    """What is left of an experts' tensor; itself if it has no channels.

    Args:
        name: the tensor's name in the experts module.
        tensor: (E, ...), as the module holds it.
        kept: (E, I') int64.
    """
    dim = channel_dimension(block, name)
    if dim is None:
        return tensor
    places = channel_places(block, name, kept).to(tensor.device)
    slices = [
        expert.index_select(dim - 1, chosen) for expert, chosen in zip(tensor.unbind(), places.unbind(), strict=True)
    ]
    return torch.stack(slices)


def channel_places(block: MoeBlock, name: str, kept: Tensor) -> Tensor:
    """Where a tensor's dimension of channels holds those: (E, I'), or (E, 2 I') where gate and up stand in one."""
    if name.startswith("down") or not name.startswith("gate_up"):
        return kept
    if getattr(block.experts, "is_concatenated", True):
        return torch.cat([kept, kept + width_of(block)], dim=1)
    return torch.stack([2 * kept, 2 * kept + 1], dim=2).flatten(1)  # gate and up rows take turns
