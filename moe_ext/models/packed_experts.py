"""Experts whose weights are held in few bits: packed numbers and scales as buffers, in the place of an experts module's
parameters.

The module stays the family's own, in its place, and its biases stay parameters. A buffer of a weight's name holds the
packed numbers (E, R, B) of :func:`moe_ext.ops.pack_weights`, ``NAME_scales`` and, of asymmetric int4, ``NAME_zeros``
what goes with them. Rows are always outputs, also where the family holds its float weights transposed; what lies in
turn (gpt-oss' gate and up) stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_ext import ops

IMPLEMENTATION = "moe_ext"
"""The experts implementation of moe_ext in transformers' interface, the only one that runs such experts."""

_FORMAT = "_moe_ext_weight_format"  # attribute of such an experts module

_GROUP_SIZES = {"int8": (0,), "int4": (128, 64, 32), "fp8": (0, 128), "mxfp4": (32,)}  # the default first
_WHAT = {
    "int8": "0, a scale a row",
    "int4": "32, 64 or 128 columns a scale",
    "fp8": "0, a scale a row, or 128, a scale a block of 128 by 128",
    "mxfp4": "32 columns a scale",
}
_NO_NUMBER = 255  # of exponents of mxfp4's scales

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of mxfp4's numbers, whose fourth bit is the sign."""


@dataclass(frozen=True)
class WeightFormat:
    """How the numbers of a weight matrix (R, C), C the dimension that is summed over, are held.

    Attributes:
        type: "int8": whole numbers -127 to 127. "int4": 0 to 15, less 8 or less a zero point of the group. "fp8":
            e4m3fn. "mxfp4": e2m1, with powers of two as scales.
        group_size: columns that share a scale; 0: all of a row. Of fp8, 128 stands for blocks of 128 rows and columns.
        symmetric: False: int4 with zero points.

    Raises:
        ValueError: another type, or a group size or zero points that the type does not have.
    """

    type: str
    group_size: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.type not in ops.WEIGHT_TYPES:
            raise ValueError(f"weight type is {str(self.type)[:80]!r}; expected one of {', '.join(ops.WEIGHT_TYPES)}")
        if type(self.group_size) is not int or self.group_size not in _GROUP_SIZES[self.type]:
            raise ValueError(f"group_size is {self.group_size!r}; {self.type} has {_WHAT[self.type]}")
        if not self.symmetric and self.type != "int4":
            raise ValueError(f"symmetric is False; {self.type} has no zero points, int4 has")

    @classmethod
    def of(cls, kind: str, group_size: int | None = None, symmetric: bool = True) -> WeightFormat:
        """The format of a type, with its usual group size (int4: 128) if none is given."""
        usual = _GROUP_SIZES.get(kind, (0,))[0]
        return cls(kind, usual if group_size is None else group_size, symmetric)

    @property
    def blocks(self) -> bool:
        """Whether scales are of blocks of rows and columns."""
        return self.type == "fp8" and self.group_size > 0

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Of the scales of a matrix."""
        if self.group_size == 0:
            return (rows,)
        return -(-rows // self.group_size) if self.blocks else rows, -(-columns // self.group_size)

    def spread(self, scales: Tensor, rows: int, columns: int) -> Tensor:
        """Scales or zeros (..., :meth:`scale_shape`) repeated to where they count: (..., R, 1) or (..., R, C)."""
        if self.group_size == 0:
            return scales[..., None]
        if self.blocks:
            scales = scales.repeat_interleave(self.group_size, -2)[..., :rows, :]
        return scales.repeat_interleave(self.group_size, -1)[..., :columns]

    @property
    def channel_multiple(self) -> int:
        """How many channels of an expert stay together when channels are removed."""
        return self.group_size or 1


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A weight (..., R, C) in few bits, in the order of its columns.

    Attributes:
        values: int8: int8 (..., R, C). fp8: float8_e4m3fn (..., R, C). int4 and mxfp4: uint8 (..., R, ceil(C / 2)), the
            lower half of a byte the even column.
        scales: (..., R) float32 for int8 and fp8 by rows; (..., ceil(R / 128), ceil(C / 128)) float32 for fp8 by
            blocks; (..., R, ceil(C / group)) bfloat16, float16 or float32 for int4, uint8 for mxfp4: 2^(s - 127).
        zeros: (..., R, ceil(C / group)) uint8 from 0 to 15; None: symmetric.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def row_slice(self, form: WeightFormat, first: int, last: int) -> QuantisedMatrix:
        """Rows from and to; in blocks of scales, whole ones."""
        step = form.group_size if form.blocks else 1
        scales = self.scales[first // step : -(-last // step)]
        zeros = None if self.zeros is None else self.zeros[first:last]
        return QuantisedMatrix(self.values[first:last], scales, zeros)

    def column_slice(self, form: WeightFormat, chosen: Tensor, columns: int) -> QuantisedMatrix:
        """Columns of a matrix (R, columns): whole groups of those that share a scale."""
        if form.type in ("int4", "mxfp4"):
            values = paired(nibbles(self.values, columns).index_select(-1, chosen))
        else:  # as bytes, which torch selects among in every type
            values = self.values.view(torch.uint8).index_select(-1, chosen).view(self.values.dtype)
        if not form.group_size:
            return QuantisedMatrix(values, self.scales)
        groups = chosen[:: form.group_size] // form.group_size
        zeros = None if self.zeros is None else self.zeros.index_select(-1, groups)
        return QuantisedMatrix(values, self.scales.index_select(-1, groups), zeros)


def dequantised(matrix: QuantisedMatrix, form: WeightFormat, columns: int) -> Tensor:
    """(..., R, C) float32: what a matrix stands for."""
    values, rows = matrix.values, matrix.values.shape[-2]
    if form.type in ("int4", "mxfp4"):
        values = nibbles(values, columns)
    if form.type == "mxfp4":
        table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=values.device)
        exponents = matrix.scales.to(torch.int32)
        scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents - 127)
        scales = scales.masked_fill(exponents == _NO_NUMBER, torch.nan)
        return table[values.int()].mul_(form.spread(scales, rows, columns))
    numbers = values.float()
    if form.type == "int4":
        numbers -= 8.0 if matrix.zeros is None else form.spread(matrix.zeros, rows, columns).float()
    return numbers.mul_(form.spread(matrix.scales.float(), rows, columns))


def nibbles(values: Tensor, columns: int) -> Tensor:
    """uint8 (..., C) of the halves of bytes (..., ceil(C / 2)), the lower ones first."""
    return torch.stack([values & 15, values >> 4], dim=-1).flatten(-2)[..., :columns]


def paired(numbers: Tensor) -> Tensor:
    """The inverse: uint8 (..., ceil(C / 2)) of numbers from 0 to 15 (..., C); a half that is left over is 0."""
    if numbers.shape[-1] % 2:
        numbers = nn.functional.pad(numbers, (0, 1))
    return numbers[..., ::2] | (numbers[..., 1::2] << 4)


# ---- an experts module


def packed_format(experts: nn.Module) -> WeightFormat | None:
    """How an experts module holds its weights in few bits; None: they are float weights."""
    found: WeightFormat | None = getattr(experts, _FORMAT, None)
    return found


def weight_names(experts: nn.Module) -> tuple[str, str]:
    """The names of an experts module's two weights."""
    return ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"), "down_proj"


def tensor_names(experts: nn.Module) -> set[str]:
    """The names of all that an experts module of transformers' interface holds of its experts."""
    names = set(weight_names(experts))
    biases = {f"{name}_bias" for name in names} if getattr(experts, "has_bias", False) else set()
    form = packed_format(experts)
    beside = () if form is None else ("_scales",) if form.symmetric else ("_scales", "_zeros")
    return names | biases | {name + end for name in names for end in beside}


def packed_shape(experts: nn.Module, name: str) -> tuple[int, int]:
    """Rows and columns of each expert's part of a packed weight."""
    rows, hidden = (getattr(experts, each).shape[1] for each in weight_names(experts))
    width = rows // 2 if getattr(experts, "has_gate", True) else rows
    return (hidden, width) if name == "down_proj" else (rows, hidden)


def float_shape(experts: nn.Module, name: str) -> tuple[int, int, int]:
    """The shape of a weight as the family's own float parameter."""
    rows, columns = packed_shape(experts, name)
    count = getattr(experts, name).shape[0]
    return (count, columns, rows) if getattr(experts, "is_transposed", False) else (count, rows, columns)


class Packer:
    """Puts a weight's experts into one packed tensor one after the other, so that only one is in memory twice.

    Args:
        form: of all of them.
        experts: E.
    """

    def __init__(self, form: WeightFormat, experts: int) -> None:
        self.form, self.experts = form, experts
        self._tensors: dict[str, Tensor] = {}
        self._filled = 0

    def add(self, matrix: QuantisedMatrix) -> None:
        """The next expert's weight (R, C)."""
        packed = ops.pack_weights(matrix.values[None].contiguous(), self.form.type)[0]
        parts = {"": packed, "_scales": matrix.scales}
        if matrix.zeros is not None:
            parts["_zeros"] = matrix.zeros
        for end, part in parts.items():
            if end not in self._tensors:
                self._tensors[end] = torch.empty((self.experts, *part.shape), dtype=part.dtype, device=part.device)
            self._tensors[end][self._filled].copy_(part)
        self._filled += 1

    def done(self) -> dict[str, Tensor]:
        """All tensors by the ends of their names."""
        if self._filled != self.experts:
            raise ValueError(f"{self._filled} of {self.experts} experts are packed")
        return self._tensors


def hold_packed(experts: nn.Module, form: WeightFormat, weights: dict[str, dict[str, Tensor]]) -> None:
    """Puts packed weights in the place of an experts module's own.

    Args:
        weights: what :class:`Packer` made, by the names of the two weights.
    """
    for name in weight_names(experts):
        delattr(experts, name)
        for end, tensor in weights[name].items():
            experts.register_buffer(name + end, tensor)
    setattr(experts, _FORMAT, form)
    # On the instance: a cast of the whole model (model.to(dtype)) would round the scales without a word.
    experts._apply = partial(_apply_keeping_scales, experts)  # type: ignore[method-assign]


def _apply_keeping_scales(experts: nn.Module, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
    """What ``Module.to`` and the like do to a module, but that scales keep their type, and packed numbers are in the
    order of the device that they come to."""
    form = packed_format(experts)
    assert form is not None
    before = {name: tensor for name, tensor in experts._buffers.items() if tensor is not None}
    type(experts)._apply(experts, fn, *args, **kwargs)
    for name in weight_names(experts):
        device, old = getattr(experts, name).device, before[name]
        experts._buffers[f"{name}_scales"] = before[f"{name}_scales"].to(device)
        if device.type != old.device.type:
            values = ops.unpack_weights(old, form.type, packed_shape(experts, name)[1])
            experts._buffers[name] = ops.pack_weights(values.to(device), form.type)
    return experts


def unpacked_matrix(experts: nn.Module, name: str, expert: int) -> QuantisedMatrix:
    """One expert's weight, unpacked."""
    form = packed_format(experts)
    assert form is not None
    _, columns = packed_shape(experts, name)
    packed, scales = getattr(experts, name), getattr(experts, f"{name}_scales")
    values = ops.unpack_weights(packed[expert : expert + 1], form.type, columns)[0]
    zeros = None if form.symmetric else getattr(experts, f"{name}_zeros")[expert]
    return QuantisedMatrix(values, scales[expert], zeros)


def refuse_packed(name: str, experts: nn.Module, job: str) -> None:
    """ValueError, beginning with ``name``, if an experts module holds its weights in few bits."""
    if (form := packed_format(experts)) is not None:
        raise ValueError(f"{name}: its experts are quantised ({form.type}); {job} the model with float weights instead")
