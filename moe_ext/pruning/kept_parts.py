"""What is left of every stored tensor when a plan's experts and channels stay: names, shapes and byte ranges."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_ext.checkpoints.key_map import Source, names_of
from moe_ext.checkpoints.meta_model import Skeleton
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import MoeBlock, expert_tensors
from moe_ext.models.counted import Dimension
from moe_ext.models.expert_width import channel_dimension
from moe_ext.pruning.shard_writer import Part, Selection
from moe_ext.pruning.thin import channel_places


@dataclass(frozen=True, eq=False)
class Slice:
    """What is kept of a tensor that counts experts.

    Attributes:
        dimension: its dimension of experts.
        keep: the experts that are kept, of ``experts``.
        shape: its shape in the model.
        channel_dim: its dimension of channels there, if some of them go.
        channels: (E', I') int64, those that each kept expert keeps.
        places: (E', n) int64, where they are in that dimension.
        layer: name of the Mixture-of-Experts block.
    """

    dimension: Dimension
    keep: tuple[int, ...]
    experts: int
    layer: str
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
                found[names[id(tensor)]] = Slice(Dimension(0), keep, block.num_experts, block.name)
            else:
                places = channel_places(block, name, kept)
                found[names[id(tensor)]] = Slice(
                    Dimension(0), keep, block.num_experts, block.name, tuple(tensor.shape), dim, kept, places
                )
        for part in block.routing_tensors():
            found[names[id(part.tensor)]] = Slice(part.dimension, keep, block.num_experts, block.name)
    return found


def parts_of(
    skeleton: Skeleton,
    stored: dict[str, StoredTensor],
    slices: dict[str, Slice],
    fitted: Mapping[str, StoredTensor],
) -> list[Part]:
    """Every tensor of the new checkpoint, in the order of the model.

    Args:
        fitted: by parameter, where what is written of it lies, in the model's form.
    """
    parts = []
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
    scaled = {source.scales: name for name, source in skeleton.sources.items() if source.scales is not None}
    for name, source in skeleton.saved():
        tensor = stored[name]
        whole = Part(name, tensor, tensor.shape, skeleton.saved_dtype(name, tensor), ((0, tensor.size),))
        if source.target not in slices:
            part: Part | None = whole
        elif name in scaled:
            weight = scaled[name]
            part = _sliced(whole, skeleton.sources[weight], slices[source.target], stored[weight].shape, skeleton.block)
        else:
            part = _sliced(whole, source, slices[source.target], tensor.shape)
        if part is None:
            continue
        if source.target in fitted:
            part = _fitted(part, source, slices[source.target], fitted[source.target])
        if not source.converted and part.shape != shapes[source.target]:
            raise CheckpointError(
                f"{tensor.file}: {name!r} has shape {tensor.shape}, of which {part.shape} would be left; the pruned "
                f"model's {source.target} has {shapes[source.target]}"
            )
        parts.append(part)
    return parts


def _fitted(part: Part, source: Source, kept: Slice, stored: StoredTensor) -> Part:
    """The same part with other numbers.

    Raises:
        ValueError: it is stored in another form than the model holds it.
    """
    begin, end = 0, stored.size
    if source.expert is not None and source.part is not None:
        size = stored.size // len(kept.keep)
        begin = kept.keep.index(source.expert) * size
        end = begin + size
    elif source.converted and (not source.transposed or part.shape != stored.shape):
        raise ValueError(
            f"refit: {part.source.file}: {part.name!r} is stored in another form than transformers holds it; refit the "
            "loaded model, moe_ext.prune(model, plan, refit=...)"
        )
    return replace(part, source=stored, ranges=((begin, end),), selections=())


def _sliced(
    part: Part, source: Source, kept: Slice, weight: tuple[int, ...], block: tuple[int, int] | None = None
) -> Part | None:
    """What is left of a tensor that counts experts; None if nothing is.

    Args:
        source: of the tensor, or of that which it scales.
        weight: shape of the tensor that is stored, or that it scales.
        block: rows and columns of ``weight`` that share a scale, if the tensor is scales.
    """
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
        return _selected(part, source, kept, [position], weight, block)
    dim, size = kept.dimension.index, kept.dimension.size(kept.experts)
    if len(shape) <= dim or shape[dim] != size:
        raise CheckpointError(f"{tensor.file}: {name!r} has shape {tensor.shape}; expected {size} in place {dim}")
    inner = math.prod(shape[dim + 1 :]) * tensor.dtype.itemsize
    ranges: list[tuple[int, int]] = []
    positions = kept.dimension.places(kept.keep, kept.experts)
    for outer in range(math.prod(shape[:dim])):
        for position in positions:
            begin = (outer * size + position) * inner
            if kept.channels is None and ranges and ranges[-1][1] == begin:
                ranges[-1] = (ranges[-1][0], begin + inner)
            else:
                ranges.append((begin, begin + inner))
    part = replace(part, shape=(*shape[:dim], len(positions), *shape[dim + 1 :]), ranges=tuple(ranges))
    if kept.places is None:
        return part
    return _selected(part, source, kept, list(range(len(kept.keep))), weight, block)


def _selected(
    part: Part,
    source: Source,
    kept: Slice,
    experts: list[int],
    weight: tuple[int, ...],
    block: tuple[int, int] | None,
) -> Part:
    """Of a part whose ranges are experts' slices, the channels that each expert keeps, or the scales of these.

    Args:
        experts: positions among the kept ones, a range each.
        source, weight, block: as for :func:`_sliced`.
    """
    alone = source.expert is not None
    if (source.part is None) if alone else (source.converted and not source.transposed):
        raise ValueError(
            f"{part.source.file}: {part.name!r} is stored in another form than transformers holds it, in which the "
            "channels of experts are not known; prune the loaded model by this plan, moe_ext.prune"
        )
    assert kept.channel_dim is not None
    assert kept.channels is not None
    assert kept.places is not None
    rank = len(part.shape) - (not alone)
    dim = kept.channel_dim - 1  # of an expert's slice; what lies above each other in it has rows as itself
    if source.transposed and weight != kept.shape:
        dim = 1 - dim
    places = [(kept.channels if alone else kept.places)[expert] for expert in experts]
    if block is not None:
        places = [
            _blocks(chosen, block[dim], f"{kept.layer}, expert {kept.keep[expert]}")
            for chosen, expert in zip(places, experts, strict=True)
        ]
    shape = list(part.shape)
    shape[dim - rank] = len(places[0])
    selections = tuple(
        Selection(begin, end, part.shape[-1], channels, 1 if rank == 1 else dim)
        for (begin, end), channels in zip(part.ranges, places, strict=True)
    )
    return replace(part, shape=tuple(shape), selections=selections)


def _blocks(places: Tensor, size: int, where: str) -> Tensor:
    """The blocks of so many rows or columns that places, ascending, are all of.

    Raises:
        ValueError: they are not whole blocks.
    """
    first = places[::size]
    whole = (first[:, None] + torch.arange(size)).flatten()
    if len(places) % size or not torch.equal(whole, places) or bool((first % size).any()):
        raise ValueError(
            f"plan: {where}: keeps parts of blocks of {size} channels, which share a float8 scale; plan whole ones: "
            f"moe-ext plan ... --blocks {size}, thin_plan(..., blocks={size})"
        )
    return first // size
