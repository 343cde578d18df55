"""Removes channels of a live model's experts: rows of their gate and up projections, columns of down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.models.blocks import MoeBlock, expert_tensors, text_config
from moe_ext.models.direct_experts import passed_on
from moe_ext.models.expert_width import channel_dimension, config_for_width, take_width, width_of
from moe_ext.models.packed_experts import Packer, WeightFormat, packed_format, unpacked_matrix, weight_names
from moe_ext.models.replace import replace_tensor


@dataclass(frozen=True)
class Thinning:
    """What is to be done to a model's experts, once it is known that it can be.

    Attributes:
        channels: of the experts that the model will have.
        fields: of the text decoder's config, with their new values.
        like: a model on the meta device whose experts have that width.
    """

    channels: KeptChannels
    fields: dict[str, Any]
    like: PreTrainedModel

    @classmethod
    def of(
        cls, model: PreTrainedModel, blocks: list[MoeBlock], channels: KeptChannels, experts: Sequence[int]
    ) -> Thinning:
        """For a model that is still whole, and whose blocks are known to be as its family's record says.

        Args:
            experts: how many every block will have by then.

        Raises:
            ValueError: ``channels`` does not fit the model (names the layer), or its family's config cannot say so.
        """
        if len(channels.masks) != len(blocks):
            raise ValueError(f"channels: are of {len(channels.masks)} layers; this model has {len(blocks)} MoE layers")
        for layer, (block, count) in enumerate(zip(blocks, experts, strict=True)):
            if width_of(block) != channels.intermediate_size:
                raise ValueError(
                    f"channels: are of experts with {channels.intermediate_size} channels; {block.name} has "
                    f"{width_of(block)}"
                )
            if (form := packed_format(block.experts)) is not None:
                if form.blocks and width_of(block) % form.group_size:
                    raise ValueError(f"channels: {block.name}: blocks of scales of gate and up lie across each other")
                for expert, chosen in enumerate(channels.indices(layer)):
                    blocks_of(chosen, form.channel_multiple, form.channel_multiple, f"{block.name}, expert {expert}")
            if len(channels.masks[layer]) != count:
                raise ValueError(f"channels: are of {len(channels.masks[layer])} experts; {block.name} has {count}")
            if passed_on(block.experts):
                raise ValueError(
                    f"channels: {block.name} has rows for choices that return a token as it is among its experts' "
                    "gates, which are not thinned; remove whole experts"
                )
        widths = [channels.width(layer) for layer in range(len(blocks))]
        if len(set(widths)) > 1:
            raise ValueError(f"channels: layers keep {min(widths)} to {max(widths)} channels; expected one width")
        fields, like = config_for_width(model, blocks, widths[0])
        return cls(channels, fields, like)

    def apply(self, model: PreTrainedModel, blocks: list[MoeBlock]) -> None:
        """Leaves every expert the channels that it is to keep, in place, and the width in the model's config."""
        with torch.no_grad():
            for layer, block in enumerate(blocks):
                thin_layer(block, self.channels.indices(layer))
        take_width(blocks, self.like, self.channels.intermediate_size, self.channels.width(0))
        for name, value in self.fields.items():
            setattr(text_config(model), name, value)


def thin_layer(block: MoeBlock, kept: Tensor) -> None:
    """Leaves a layer's experts the channels ``kept`` (E, I'), in place."""
    tensors = expert_tensors(block)
    # All are made before any takes its place: a layer is thinned as a whole or not at all.
    form = packed_format(block.experts)
    if form is None:
        thinned = {name: thinned_tensor(block, name, old, kept) for name, old in tensors.items()}
    else:
        thinned = _thinned_packed(block, form, tensors, kept)
    for name, new in thinned.items():
        if new is not tensors[name]:
            replace_tensor(block.experts, name, tensors[name], new)


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


def _thinned_packed(block: MoeBlock, form: WeightFormat, tensors: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """What is left of quantised experts' tensors: numbers, scales and zeros as they are, those of whole groups."""
    first, down = weight_names(block.experts)
    step, width = form.group_size or 1, width_of(block)
    groups = kept[:, ::step] // step  # of channels, that share a scale
    places = channel_places(block, first, kept)
    block_rows = channel_places(block, first, groups, -(-width // step)) if form.blocks else places
    thinned = {}
    for name, tensor in tensors.items():
        if name == down:
            packer = Packer(form, block.num_experts)
            for expert, chosen in enumerate(kept):
                packer.add(unpacked_matrix(block.experts, name, expert).column_slice(form, chosen, width))
            thinned.update({name + end: made for end, made in packer.done().items()})
        elif name.startswith(first):
            rows = block_rows if name.endswith("_scales") else places
            thinned[name] = torch.stack(
                [expert.index_select(0, chosen) for expert, chosen in zip(tensor, rows.to(tensor.device), strict=True)]
            )
        elif name == f"{down}_bias":
            thinned[name] = tensor
    return thinned


def blocks_of(places: Tensor, size: int, whole_size: int, where: str) -> Tensor:
    """The blocks of so many rows or columns that places, ascending, are all of.

    Args:
        whole_size: the size that all parts of the weight allow.

    Raises:
        ValueError: they are not whole blocks.
    """
    first = places[::size]
    whole = (first[:, None] + torch.arange(size)).flatten()
    if len(places) % size or not torch.equal(whole, places) or bool((first % size).any()):
        raise ValueError(
            f"plan: {where}: keeps parts of blocks of {size} channels, which are stored together or share a scale; "
            f"plan whole ones: moe-ext plan ... --blocks {whole_size}, thin_plan(..., blocks={whole_size})"
        )
    return first // size


def channel_places(block: MoeBlock, name: str, kept: Tensor, width: int | None = None) -> Tensor:
    """Where a tensor's dimension of channels holds those: (E, I'), or (E, 2 I') where gate and up stand in one.

    Args:
        width: of the channels that are counted; None: I.
    """
    if not name.startswith("gate_up"):
        return kept
    if getattr(block.experts, "is_concatenated", True):
        return torch.cat([kept, kept + (width_of(block) if width is None else width)], dim=1)
    return torch.stack([2 * kept, 2 * kept + 1], dim=2).flatten(1)  # gate and up rows take turns
