"""Whole numbers of 2, 4 or 8 bits as GPTQ and AutoAWQ store them: a module's weight, transposed, as ``qweight``, with
``qzeros`` and ``scales`` for every group of its inputs.

GPTQ packs a word's numbers from consecutive inputs, AutoAWQ four-bit ones from eight outputs in an order of its own.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_ext.checkpoints.int_packing import unpacked
from moe_ext.checkpoints.quantised_weight import Axis, Piece, QuantisedWeight
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor

_NUMBERS = "qweight"
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output each of a word's eight numbers is of, the lowest bits first."""


def gptq_weights(
    folder: object, quantisation: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> list[QuantisedWeight]:
    """The quantised weights of a folder in GPTQ's format, or AutoAWQ's.

    Raises:
        ValueError: another number of bits, or another way of packing; numbers without scales.
        CheckpointError: tensors whose shapes do not fit each other.
    """
    awq = quantisation.get("quant_method") == "awq"
    bits = quantisation.get("bits", quantisation.get("w_bit"))
    layout = _layout(quantisation)
    if bits not in ((4,) if awq else (2, 4, 8)) or layout.lower() not in (("gemm",) if awq else ("gptq", "gptq_v2")):
        name = next((name for name in stored if name.endswith(f".{_NUMBERS}")), "a weight")
        raise ValueError(
            f"{folder}: {name} is stored in {quantisation['quant_method']}'s format {layout!r} with {bits} bits; "
            f"{'gemm with 4' if awq else 'gptq or gptq_v2 with 2, 4 or 8'} bits are read"
        )
    return [
        _weight(folder, stored, name, bits, awq, plus=int(layout.lower() == "gptq"))
        for name in stored
        if name.endswith(f".{_NUMBERS}")
    ]


def _layout(quantisation: Mapping[str, Any]) -> str:
    awq = quantisation.get("quant_method") == "awq"
    return str(quantisation.get("version" if awq else "checkpoint_format") or ("gemm" if awq else "gptq"))


def _weight(
    folder: object, stored: Mapping[str, StoredTensor], name: str, bits: int, awq: bool, plus: int
) -> QuantisedWeight:
    module = name.removesuffix(_NUMBERS)
    for role in ("qzeros", "scales"):
        if module + role not in stored:
            raise ValueError(f"{folder}: {name} is quantised, and there is no {module}{role}")
    numbers, zeros, scales = (stored[module + role] for role in (_NUMBERS, "qzeros", "scales"))
    per = 32 // bits
    inputs, outputs = numbers.shape if len(numbers.shape) == 2 else (0, 0)
    inputs, outputs = (inputs, outputs * per) if awq else (inputs * per, outputs)
    groups = scales.shape[0] if len(scales.shape) == 2 else 0
    if (
        not groups
        or inputs % groups
        or scales.shape != (groups, outputs)
        or zeros.shape != (groups, outputs // per)
        or {numbers.dtype, zeros.dtype} != {torch.int32}
    ):
        raise CheckpointError(
            f"{folder}: {name} {numbers.shape}, its qzeros {zeros.shape} and its scales {scales.shape} do not fit each "
            "other"
        )
    group: Axis = (1, inputs // groups)
    pieces = {
        name: Piece("numbers", ((1, 1), (0, per)) if awq else ((1, per), (0, 1))),
        zeros.name: Piece("zeros", (group, (0, per))),
        scales.name: Piece("scales", (group, (0, 1))),
    }
    if (order := stored.get(f"{module}g_idx")) is not None:
        pieces[order.name] = Piece("groups", ((1, 1),), "groups")
    read = _awq if awq else partial(_gptq, bits=bits, plus=plus)
    return QuantisedWeight(f"{module}weight", (outputs, inputs), pieces, read)


def _gptq(tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, *, bits: int, plus: int) -> Tensor:
    """Zeros are stored less one in the format's first version."""
    values = unpacked(tensors["numbers"], bits, 0).float()
    zeros = _zeros(tensors["zeros"], bits, plus)
    groups = tensors.get("groups")
    if groups is None:
        groups = torch.arange(shape[1]) // (shape[1] // zeros.shape[0])
    values -= zeros.float()[groups.long()]
    return values.mul_(tensors["scales"].float()[groups.long()]).T.to(dtype)


def _zeros(words: Tensor, bits: int, plus: int) -> Tensor:
    return (unpacked(words, bits, 1) + plus) & ((1 << bits) - 1)


def gptq_zeros(quantisation: Mapping[str, Any], words: Tensor, bits: int) -> Tensor:
    """GPTQ's zeros (groups, outputs) of a folder whose config says that."""
    return _zeros(words, bits, int(_layout(quantisation).lower() == "gptq"))


def _awq(tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values, zeros = (awq_numbers(tensors[role]) for role in ("numbers", "zeros"))
    size = shape[1] // zeros.shape[0]
    values -= zeros.repeat_interleave(size, 0)
    return values.mul_(tensors["scales"].float().repeat_interleave(size, 0)).T.to(dtype)


def awq_numbers(words: Tensor) -> Tensor:
    """AutoAWQ's numbers (N, M), float32, of words (N, M / 8)."""
    numbers = unpacked(words, 4, 1).view(words.shape[0], -1, 8)
    ordered = torch.empty(numbers.shape)
    ordered[..., list(_AWQ_ORDER)] = numbers.float()
    return ordered.flatten(1)
