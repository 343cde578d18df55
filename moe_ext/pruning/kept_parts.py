"""What is left of every stored tensor when a plan's experts and channels stay: names, shapes and byte ranges."""

import math
from dataclasses import dataclass, replace

from torch import Tensor
from transformers.core_model_loading import dot_natural_key

from moe_ext.checkpoints.key_map import Source, names_of, tied
from moe_ext.checkpoints.meta_model import Skeleton
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import MoeBlock, expert_tensors
from moe_ext.models.expert_width import channel_dimension
from moe_ext.pruning.shard_writer import Part, Selection
from moe_ext.pruning.thin import channel_places


@dataclass(frozen=True, eq=False)
class Slice:
    """What is kept of a tensor that counts experts.

    Attributes:
        dim: its dimension of experts.
        keep: the experts that are kept, of ``experts``.
        shape: its shape in the model.
        channel_dim: its dimension of channels there, if some of them go.
        channels: (E', I') int64, those that each kept expert keeps.
        places: (E', n) int64, where they are in that dimension.
    """

    dim: int
    keep: tuple[int, ...]
    experts: int
    shape: tuple[int, ...] = ()
    channel_dim: int | None = None
    channels: Tensor | None = None
    places: Tensor | None = None


def slices_of(skeleton: Skeleton, blocks: list[MoeBlock], plan: PruningPlan) -> dict[str, Slice]:
    """What is kept, by the name of every tensor that counts experts."""
    names = names_of(skeleton.model)
    found = {}
    for layer, (block, keep) in enumerate(zip(blocks, plan.keep, strict=False)):  # prune says what does not fit
        kept = None if plan.channels is None or layer >= len(plan.channels.masks) else plan.channels.indices(layer)
        for name, tensor in expert_tensors(block).items():
            dim = None if kept is None else channel_dimension(block, name)
            if dim is None or kept is None:
                found[names[id(tensor)]] = Slice(0, keep, block.num_experts)
            else:
                places = channel_places(block, name, kept)
                found[names[id(tensor)]] = Slice(0, keep, block.num_experts, tuple(tensor.shape), dim, kept, places)
        for _, _, tensor, dim in block.routing_tensors():
            found[names[id(tensor)]] = Slice(dim, keep, block.num_experts)
    return found


def parts_of(skeleton: Skeleton, stored: dict[str, StoredTensor], slices: dict[str, Slice]) -> list[Part]:
    """Every tensor of the new checkpoint, in the order of the model."""
    parts = []
    left_out = tied(skeleton.model) | set(skeleton.model._keys_to_ignore_on_save or ())
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
    for name, source in sorted(skeleton.sources.items(), key=lambda item: dot_natural_key(item[0])):
        if source.target in left_out:
            continue
        tensor = stored[name]
        dtype = tensor.dtype if skeleton.block is not None else skeleton.dtype_of(source.target)
        whole = Part(name, tensor, tensor.shape, dtype, ((0, tensor.size),))
        part = _sliced(whole, source, slices[source.target]) if source.target in slices else whole
        if part is None:
            continue
        if not source.converted and part.shape != shapes[source.target]:
            raise CheckpointError(
                f"{tensor.file}: {name!r} has shape {tensor.shape}, of which {part.shape} would be left; the pruned "
                f"model's {source.target} has {shapes[source.target]}"
            )
        parts.append(part)
    return parts


def _sliced(part: Part, source: Source, kept: Slice) -> Part | None:
    """What is left of a tensor that counts experts; None if nothing is."""
    tensor, name, shape = part.source, part.name, part.shape
    if source.expert is not None:
        if source.expert >= kept.experts:
            raise CheckpointError(f"{tensor.file}: {name!r} is of expert {source.expert} of {kept.experts}")
        if source.expert not in kept.keep:
            return None
        first, last = source.expert_at
        position = kept.keep.index(source.expert)
        part = replace(part, name=f"{name[:first]}{position}{name[last:]}")
        if kept.channels is None:
            return part
        return _selected(part, source, kept, [kept.channels[position]], len(shape))
    if len(shape) <= kept.dim or shape[kept.dim] != kept.experts:
        raise CheckpointError(
            f"{tensor.file}: {name!r} has shape {tensor.shape}; expected {kept.experts} in place {kept.dim}"
        )
    inner = math.prod(shape[kept.dim + 1 :]) * tensor.dtype.itemsize
    ranges: list[tuple[int, int]] = []
    for outer in range(math.prod(shape[: kept.dim])):
        for expert in kept.keep:
            begin = (outer * kept.experts + expert) * inner
            if kept.channels is None and ranges and ranges[-1][1] == begin:
                ranges[-1] = (ranges[-1][0], begin + inner)
            else:
                ranges.append((begin, begin + inner))
    part = replace(part, shape=(*shape[: kept.dim], len(kept.keep), *shape[kept.dim + 1 :]), ranges=tuple(ranges))
    if kept.places is None:
        return part
    return _selected(part, source, kept, list(kept.places), len(shape) - 1)


def _selected(part: Part, source: Source, kept: Slice, places: list[Tensor], rank: int) -> Part:
    """Of a part whose ranges are experts' slices with so many dimensions, the channels that each expert keeps.

    Args:
        places: every expert's, in the dimension of channels.
    """
    alone = source.expert is not None
    if (source.part is None) if alone else (source.converted and not source.transposed):
        raise ValueError(
            f"{part.source.file}: {part.name!r} is stored in another form than transformers holds it, in which the "
            "channels of experts are not known; prune the loaded model by this plan, moe_ext.prune"
        )
    assert kept.channel_dim is not None
    dim = kept.channel_dim - 1  # of an expert's slice; what lies above each other in it has rows as itself
    if source.transposed and part.source.shape != kept.shape:
        dim = 1 - dim
    shape = list(part.shape)
    shape[dim - rank] = len(places[0])
    selections = tuple(
        Selection(begin, end, part.shape[-1], channels, 1 if rank == 1 else dim)
        for (begin, end), channels in zip(part.ranges, places, strict=True)
    )
    return replace(part, shape=tuple(shape), selections=selections)
