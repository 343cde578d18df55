"""Layers for multi-token prediction in a checkpoint folder. transformers' models have none of them, vLLM drafts with
them.

Their experts are pruned with those that the plan keeps of the last layer, the nearest; everything else of them is
copied. Where the config could not say how many experts they have left, they are left out.
"""

import re
from collections.abc import Mapping

import torch

from moe_ext.checkpoints.key_map import Source
from moe_ext.checkpoints.meta_model import Skeleton
from moe_ext.checkpoints.stored_tensors import StoredTensor
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import MoeBlock, decoder_layers, text_config
from moe_ext.pruning.kept_parts import Slice, plain_parts
from moe_ext.pruning.shard_writer import Part

_IN_LAYERS = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
_OF_THEIR_OWN = re.compile(r"(?:.*\.)?mtp\.(?:layers\.\d+\.)?(.+)")
_EXPERT = re.compile(r"(?<=experts\.)(\d+)(?=\.)")


def further_parts(
    skeleton: Skeleton,
    stored: Mapping[str, StoredTensor],
    blocks: list[MoeBlock],
    plan: PruningPlan,
    slices: dict[str, Slice],
) -> list[Part]:
    """What is left of those layers' tensors; nothing if there are none, or none are kept.

    Args:
        skeleton: whole, as its folder.
        slices: what is kept of the model's tensors.

    Raises:
        CheckpointError: a tensor has another shape than that of the last layer.
    """
    keys = _keys(skeleton, stored)
    if not keys or plan.channels is not None or len(plan.keep) != len(blocks):
        return []
    keep = plan.keep[-1]
    if len(keep) != max(map(len, plan.keep)):
        return []
    like, parts = _last_layer(skeleton, blocks), []
    for key, rest in keys.items():
        tensor, (of, source) = stored[key], like.get(rest, (None, None))
        expert = _EXPERT.search(key)
        if expert is not None and (source is None or source.expert is not None):
            if int(expert[1]) in keep:
                name = f"{key[: expert.start()]}{keep.index(int(expert[1]))}{key[expert.end() :]}"
                parts.append(Part(name, tensor, tensor.shape, _dtype(skeleton, tensor, of), ((0, tensor.size),)))
        else:
            parts += plain_parts(tensor, _dtype(skeleton, tensor, of), source or Source(key), slices)
    return parts


def _keys(skeleton: Skeleton, stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """The tensors' keys, with what comes in them after the layer."""
    known = {*skeleton.sources, *skeleton.beside, *(key for each in skeleton.quantised.values() for key in each.pieces)}
    layers, found = text_config(skeleton.model).num_hidden_layers, {}
    for key in stored:
        if key in known:
            continue
        if (own := _OF_THEIR_OWN.fullmatch(key)) is not None:
            found[key] = own[1]
        elif (one := _IN_LAYERS.fullmatch(key)) is not None and int(one[1]) >= layers:
            found[key] = one[2]
    return found


def _last_layer(skeleton: Skeleton, blocks: list[MoeBlock]) -> dict[str, tuple[str, Source]]:
    """Keys of the last MoE layer with what they are for, by what comes in them after the layer."""
    owner, _, of_block = decoder_layers(skeleton.model, blocks)
    found = {}
    for key, source in skeleton.sources.items():
        one = _IN_LAYERS.fullmatch(key)
        if one is not None and source.target.startswith(f"{owner}.{of_block[-1]}."):
            found[one[2]] = key, source
    return found


def _dtype(skeleton: Skeleton, tensor: StoredTensor, like: str | None) -> torch.dtype:
    if skeleton.format is not None or not tensor.dtype.is_floating_point:
        return tensor.dtype
    return skeleton.dtype if like is None else skeleton.saved_dtype(like, tensor)
