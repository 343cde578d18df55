"""What is left of every stored tensor when a plan's experts and channels stay: names, shapes and byte ranges."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_ext.checkpoints.key_map import Source, names_of
from moe_ext.checkpoints.meta_model import Skeleton
from moe_ext.checkpoints.quantised_weight import Piece, QuantisedWeight
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import MoeBlock
from moe_ext.models.counted import Dimension
from moe_ext.models.expert_width import channel_dimension
from moe_ext.pruning.shard_writer import Part, Selection
from moe_ext.pruning.thin import blocks_of, channel_places


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

    def swapped(self) -> "Slice":
        """The same of the transposed matrix."""
        return replace(self, dimension=replace(self.dimension, index=1 - self.dimension.index))


def slices_of(skeleton: Skeleton, blocks: list[MoeBlock], plan: PruningPlan) -> dict[str, Slice]:
    """What is kept, by the name of every tensor that counts experts."""
    names = names_of(skeleton.model)
    found = {}
    for layer, (block, keep) in enumerate(zip(blocks, plan.keep, strict=False)):  # prune says what does not fit
        kept = None if plan.channels is None or layer >= len(plan.channels.masks) else plan.channels.indices(layer)
        for part in block.expert_parts():
            dim = None if kept is None else channel_dimension(block, part.name)
            name, whole = names[id(part.tensor)], Slice(part.dimension, keep, block.num_experts, block.name)
            if dim is None or kept is None:
                found[name] = whole
            else:
                places, shape = channel_places(block, part.name, kept), tuple(part.tensor.shape)
                found[name] = replace(whole, shape=shape, channel_dim=dim, channels=kept, places=places)
        for part in block.routing_tensors():
            found[names[id(part.tensor)]] = Slice(part.dimension, keep, block.num_experts, block.name)
    for name, origin in skeleton.model.all_tied_weights_keys.items():  # stored under one of its names
        for one, other in ((name, origin), (origin, name)):
            if one in found:
                found.setdefault(other, found[one])
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
    beside: dict[str, list[Part]] = {}
    for key, owner in skeleton.beside.items():
        beside.setdefault(owner, []).append(_whole(stored[key], stored[key].dtype))
    for name, source in skeleton.saved():
        parts += beside.get(name, [])
        dtype = skeleton.saved_dtype(name, skeleton.stored[name])
        weight = skeleton.quantised.get(name)
        if weight is not None:
            for key, piece in weight.pieces.items():
                parts += _kept(stored[key], stored[key].dtype, source, slices, weight, piece)
            continue
        tensor = stored[name]
        for part in plain_parts(tensor, dtype, source, slices):
            if source.target in fitted:
                part = _fitted(part, source, slices[source.target], fitted[source.target])
            if not source.converted and part.shape != shapes[source.target]:
                raise CheckpointError(
                    f"{tensor.file}: {name!r} has shape {tensor.shape}, of which {part.shape} would be left; the "
                    f"pruned model's {source.target} has {shapes[source.target]}"
                )
            parts.append(part)
    return parts


def plain_parts(tensor: StoredTensor, dtype: torch.dtype, source: Source, slices: dict[str, Slice]) -> list[Part]:
    """What is left of a tensor that is stored as it is: a part, or none."""
    plain = QuantisedWeight(tensor.name, tensor.shape, {}, _not_quantised)
    piece = Piece("weight", tuple((dim, 1) for dim in range(len(tensor.shape))))
    return _kept(tensor, dtype, source, slices, plain, piece)


def _whole(tensor: StoredTensor, dtype: torch.dtype) -> Part:
    return Part(tensor.name, tensor, tensor.shape, dtype, ((0, tensor.size),))


def _not_quantised(tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    raise AssertionError("a weight that is stored as it is")


def _kept(
    tensor: StoredTensor,
    dtype: torch.dtype,
    source: Source,
    slices: dict[str, Slice],
    weight: QuantisedWeight,
    piece: Piece,
) -> list[Part]:
    """What is left of a stored tensor of a weight: a part, or none."""
    whole = _whole(tensor, dtype)
    counting = [slices[target] for target in source.targets if target in slices]
    if not counting:
        return [whole]
    if source.others:
        _check_equal(whole, source, counting)
        if source.expert is None:
            return [_in_pieces(whole, source, slices, weight, piece)]
    kept = slices[source.target].swapped() if source.swapped else slices[source.target]
    part = _sliced(whole, source, kept, weight, piece, sum(len(slices[target].keep) for target in source.before))
    return [] if part is None else [part]


def _check_equal(part: Part, source: Source, counting: Sequence[Slice]) -> None:
    """ValueError unless the parameters of a conversion that makes several keep as many experts each."""
    counts = {kept.layer: len(kept.keep) for kept in counting}
    if len(counting) != len(source.targets) or len(set(counts.values())) > 1:
        raise ValueError(
            f"plan: {part.source.file}: {part.name!r} is of {', '.join(source.targets)} together, which need as many "
            f"experts each; the plan keeps {', '.join(f'{count} in {layer}' for layer, count in counts.items())}"
        )


def _in_pieces(whole: Part, source: Source, slices: dict[str, Slice], weight: QuantisedWeight, piece: Piece) -> Part:
    """What is left of a tensor of which several parameters are pieces of equal size, one above the other.

    Raises:
        ValueError: it is not so.
    """
    count = len(source.targets)
    if not source.in_pieces or weight.pieces or whole.shape[0] % count:
        raise ValueError(
            f"{whole.source.file}: {whole.name!r} is stored in another form than transformers holds it, in which the "
            "experts are not known; prune the loaded model by this plan, moe_ext.prune"
        )
    rows, found = whole.shape[0] // count, list[Part]()
    size = math.prod(whole.shape) * whole.source.dtype.itemsize // count
    for place, target in enumerate(source.targets):
        alone = replace(whole, shape=(rows, *whole.shape[1:]), ranges=((0, size),))
        part = _sliced(alone, Source(target), slices[target], weight, piece)
        assert part is not None
        found.append(
            replace(part, ranges=tuple((begin + place * size, end + place * size) for begin, end in part.ranges))
        )
    shape = (sum(part.shape[0] for part in found), *found[0].shape[1:])
    return replace(whole, shape=shape, ranges=tuple(span for part in found for span in part.ranges))


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
    part: Part, source: Source, kept: Slice, weight: QuantisedWeight, piece: Piece, first_number: int = 0
) -> Part | None:
    """What is left of a tensor that counts experts; None if nothing is.

    Args:
        source: of the weight.
        weight, piece: what the tensor is of, and which part of that.
        first_number: of the first expert that is kept, in keys.
    """
    tensor, name, shape = part.source, part.name, part.shape
    if source.expert is not None:
        numbers = kept.dimension.places(kept.keep, kept.experts)
        if source.expert >= (size := kept.dimension.size(kept.experts)):
            raise CheckpointError(f"{tensor.file}: {name!r} is of expert {source.expert} of {size}")
        if source.expert not in numbers:
            return None
        first, last = source.expert_at
        position = numbers.index(source.expert)
        part = replace(part, name=f"{name[:first]}{first_number + position}{name[last:]}")
        if kept.channels is None:
            return part
        return _selected(part, source, kept, [position], weight, piece)
    size = kept.dimension.size(kept.experts)
    counting = piece.axis(kept.dimension.index)
    if counting is None and piece.holds == "numbers" and weight.pieces and weight.indivisible is None:
        return part  # a scale that all experts share
    dim, together = counting or (kept.dimension.index, 1)
    if together != 1 or len(shape) <= dim or shape[dim] != size:
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
    return _selected(part, source, kept, list(range(len(kept.keep))), weight, piece)


def _selected(
    part: Part, source: Source, kept: Slice, experts: list[int], weight: QuantisedWeight, piece: Piece
) -> Part:
    """Of a part whose ranges are experts' slices, the channels that each expert keeps, or what is stored beside these.

    Args:
        experts: positions among the kept ones, a range each.
        source, weight, piece: as for :func:`_sliced`.
    """
    alone = source.expert is not None
    if (source.part is None) if alone else (source.converted and not source.transposed):
        raise ValueError(
            f"{part.source.file}: {part.name!r} is stored in another form than transformers holds it, in which the "
            "channels of experts are not known; prune the loaded model by this plan, moe_ext.prune"
        )
    if weight.indivisible is not None:
        raise ValueError(f"plan: {weight.name}: {weight.indivisible}: its channels stay, whole experts can go")
    assert kept.channel_dim is not None
    assert kept.channels is not None
    assert kept.places is not None
    dim = kept.channel_dim - 1  # of an expert's slice; what lies above each other in it has rows as itself
    if source.transposed and weight.shape != kept.shape:
        dim = 1 - dim
    dim += not alone
    places = [(kept.channels if alone else kept.places)[expert] for expert in experts]
    if piece.holds == "shape":
        new = [len(places[0]) if place == dim else size for place, size in enumerate(weight.shape)]
        return replace(part, content=torch.tensor(new, dtype=part.dtype).numpy().tobytes())
    follows = piece.axis(dim)
    if follows is None:
        return part  # all channels share it
    place, together = follows
    if piece.holds == "groups":
        return _first_groups(part, len(places[0]))
    if together != 1:
        whole = math.lcm(*(axis[1] for each in weight.pieces.values() for axis in each.axes if axis is not None))
        places = [
            blocks_of(chosen, together, whole, f"{kept.layer}, expert {kept.keep[expert]}")
            for chosen, expert in zip(places, experts, strict=True)
        ]
    shape = list(part.shape)
    outer, count, inner = shape[0 if alone else 1 : place], shape[place], math.prod(shape[place + 1 :])
    shape[place] = len(places[0])
    if inner == 1:
        rows, columns = 1, count
    elif math.prod(outer) == 1:
        rows, columns = 0, inner
    else:
        rows, columns = 1, count * inner
        places = [(chosen[:, None] * inner + torch.arange(inner)).flatten() for chosen in places]
    selections = tuple(
        Selection(begin, end, columns, channels, rows)
        for (begin, end), channels in zip(part.ranges, places, strict=True)
    )
    return replace(part, shape=tuple(shape), selections=selections)


def _first_groups(part: Part, columns: int) -> Part:
    """The groups of so many columns, numbered anew: those of the first so many.

    Raises:
        ValueError: the columns are not in the order of their groups.
    """
    source = part.source
    with source.file.open("rb") as file:
        file.seek(source.offset)
        groups = torch.frombuffer(bytearray(file.read(source.size)), dtype=source.dtype)
    count = int(groups.max()) + 1
    if count < 1 or not torch.equal(groups.long(), torch.arange(len(groups)) // -(-len(groups) // count)):
        raise ValueError(
            f"plan: {source.name}: the columns are quantised in another order than their own (act-order): channels "
            "stay, whole experts can go"
        )
    return replace(part, shape=(columns,), ranges=((0, columns * source.dtype.itemsize),))
