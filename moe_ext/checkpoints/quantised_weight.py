"""A weight that a checkpoint holds as several tensors: numbers in few bits, scales, and what else goes with them.

Pruning needs to know only which dimension of the weight each of these tensors follows, and how many places of it one
place of the tensor stands for. What the numbers mean is needed to compute with them, and stays with the format.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor

Axis = tuple[int, int] | None
"""A dimension of the weight, and how many of its places one place of a tensor's dimension stands for; None for a
dimension that all of the weight shares."""


@dataclass(frozen=True)
class Piece:
    """One stored tensor of a weight.

    Attributes:
        role: what the format calls it.
        axes: what each of its dimensions follows.
        holds: "numbers", which are copied; "shape", the weight's, which a thinner weight has another of; or "groups",
            the number of each column's group, counted from 0.
    """

    role: str
    axes: tuple[Axis, ...]
    holds: str = "numbers"

    def axis(self, dim: int) -> tuple[int, int] | None:
        """Which of its dimensions follows one of the weight's, and how many places it takes together; None: none."""
        for place, axis in enumerate(self.axes):
            if axis is not None and axis[0] == dim:
                return place, axis[1]
        return None


Dequantise = Callable[[Mapping[str, Tensor], tuple[int, ...], torch.dtype], Tensor]
"""From tensors by role, the weight's shape and the type wanted to what they stand for."""


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight as it is stored.

    Attributes:
        name: the key that the weight would have if it were not quantised.
        shape: its shape then.
        pieces: what is stored of it, by key.
        dequantise: what the pieces stand for, in float32 before it is rounded to the type that is asked for.
        indivisible: why no channels can be taken out of it; None: they can.
    """

    name: str
    shape: tuple[int, ...]
    pieces: dict[str, Piece]
    dequantise: Dequantise
    indivisible: str | None = None

    def stand_in(self, stored: Mapping[str, StoredTensor]) -> StoredTensor:
        """A tensor of the weight's name and shape, to find its place in the model; its bytes are not the weight's."""
        first = stored[next(iter(self.pieces))]
        return StoredTensor(self.name, first.file, torch.bfloat16, self.shape, first.offset)

    def values(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """What it stands for.

        Args:
            tensors: the stored ones, by key.
            dtype: of the result.
        """
        by_role = {piece.role: tensors[name] for name, piece in self.pieces.items()}
        return self.dequantise(by_role, self.shape, dtype)


def found(stored: Mapping[str, StoredTensor], names: Mapping[str, Iterable[str]]) -> dict[str, StoredTensor]:
    """By role, the first of the names given for it that is stored; roles without one are left out."""
    present = ((role, next((name for name in given if name in stored), None)) for role, given in names.items())
    return {role: stored[name] for role, name in present if name is not None}


def scale_axes(shape: tuple[int, ...], scales: StoredTensor, block: tuple[int, int] | None = None) -> tuple[Axis, ...]:
    """What the dimensions of a weight's scales follow, told by their shape: a scale a tensor, a row or column, a block
    of them, a group of columns; each for every expert if the weight is of all of them.

    Args:
        shape: the weight's, (R, C) or (E, R, C).
        block: rows and columns that share a scale, where the config says it; the last ones may be fewer.

    Raises:
        CheckpointError: the scales have a shape that fits no such rule.
    """
    sizes = scales.shape
    if math.prod(sizes) == 1:
        return (None,) * len(sizes)
    kept = [place for place, size in enumerate(sizes) if size != 1]
    experts = shape[:-2]
    if len(sizes) == len(shape):
        pairs = list(enumerate(sizes))
    elif len(sizes) < len(shape) and sizes == shape[: len(sizes)]:
        pairs = list(enumerate(sizes))  # one a row, or one an expert
    elif len(kept) <= len(shape) and not experts and sizes[1::2] == (1,) * len(sizes[1::2]) and len(sizes) == 4:
        pairs = [(0, sizes[0]), (-1, 1), (1, sizes[2]), (-1, 1)]  # (blocks, 1, blocks, 1)
    else:
        raise _strange(shape, scales)
    axes: list[Axis] = []
    for dim, size in pairs:
        whole = shape[dim] if dim >= 0 else 1
        per = None if block is None or dim < len(experts) else block[dim - len(experts)]
        if size == whole and (per is None or -(-whole // per) != size):
            axes.append((dim, 1) if dim >= 0 else None)
        elif per is not None and size == -(-whole // per):
            axes.append((dim, per))
        elif size == 1:
            axes.append(None)
        elif per is None and dim >= len(experts) and size < whole and whole % size == 0:
            axes.append((dim, whole // size))
        else:
            raise _strange(shape, scales)
    return tuple(axes)


def _strange(shape: tuple[int, ...], scales: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"{scales.file}: {scales.name!r} has shape {scales.shape}, which is none of scales of {shape} weights"
    )


def spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None = None) -> Tensor:
    """Scales in float32, repeated so that they can be multiplied with a weight of that shape.

    Args:
        block: as for :func:`scale_axes`.
    """
    scales = scales.float()
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.dim() == 4 and len(shape) == 2:
        scales = scales[:, 0, :, 0]
    while scales.dim() < len(shape):
        scales = scales[..., None]
    for dim in range(len(shape) - 2, len(shape)):
        size, whole = scales.shape[dim], shape[dim]
        per = None if block is None else block[dim - len(shape) + 2]
        if size not in (1, whole):
            per = whole // size if per is None else per
        elif size == whole or per is None or -(-whole // per) != 1:
            continue
        scales = scales.repeat_interleave(per, dim).narrow(dim, 0, whole)
    return scales
