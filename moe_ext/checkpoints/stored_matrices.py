"""Stored quantised weights of many formats as the one form in which the operators take them, without rounding anything
anew: numbers stay, scales are repeated where a format has fewer of them than the operators want.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_ext.checkpoints.compressed import block_structure
from moe_ext.checkpoints.float8 import DTYPES as FLOAT8
from moe_ext.checkpoints.gptq import awq_numbers, gptq_zeros
from moe_ext.checkpoints.int_packing import unpacked
from moe_ext.checkpoints.quantised_weight import QuantisedWeight
from moe_ext.models.packed_experts import QuantisedMatrix, WeightFormat, paired

_BLOCK = 128
_GROUPS = (128, 64, 32)
_SIGN = 0x80


def read_matrix(
    quantisation: Mapping[str, Any], weight: QuantisedWeight, tensors: Mapping[str, Tensor]
) -> tuple[WeightFormat, QuantisedMatrix]:
    """A stored weight (R, C), or (E, R, C) of gpt-oss, as the operators take it.

    Args:
        quantisation: what the folder says of its format.
        tensors: what is stored of the weight, by key.

    Raises:
        ValueError: the operators have no such numbers, scales or groups; names the weight and says what they have.
    """
    by_role = {piece.role: tensors[key] for key, piece in weight.pieces.items()}
    method = quantisation.get("quant_method")
    match method:
        case "fp8" | "fbgemm_fp8":
            in_blocks = quantisation.get("weight_block_size") is not None
            return _float8(weight, by_role["weight"], by_role["scales"], in_blocks)
        case "mxfp4":
            blocks = by_role["blocks"]
            return WeightFormat("mxfp4", 32), QuantisedMatrix(blocks.flatten(-2), by_role["scales"])
        case "compressed-tensors":
            return _compressed(weight, by_role, block_structure(quantisation) is not None)
        case "gptq" | "awq":
            return _gptq(quantisation, weight, by_role)
    raise _unknown(weight, f"{str(method)[:40]!r}")


def _unknown(weight: QuantisedWeight, what: str) -> ValueError:
    return ValueError(
        f"{weight.name} is stored as {what}, which the operators on quantised weights do not take; they take int8 with "
        "a scale a row, int4 in groups of 32, 64 or 128, float8 e4m3 with a scale a row or a block of 128 by 128, and "
        "mxfp4. Calibration, search, pruning and thinning take the folder itself"
    )


def _float8(
    weight: QuantisedWeight, numbers: Tensor, scales: Tensor, in_blocks: bool
) -> tuple[WeightFormat, QuantisedMatrix]:
    if numbers.dtype != torch.float8_e4m3fn:
        raise _unknown(weight, str(numbers.dtype).removeprefix("torch."))
    if len(weight.shape) != 2:
        raise _unknown(weight, "float8 of all experts in one tensor")
    rows, columns = weight.shape
    scales = scales.float()
    if scales.dim() == 4:
        scales = scales[:, 0, :, 0]
    if in_blocks and scales.shape == (-(-rows // _BLOCK), -(-columns // _BLOCK)):
        return WeightFormat("fp8", _BLOCK), QuantisedMatrix(numbers, scales)
    if not in_blocks and scales.numel() == 1:
        return WeightFormat("fp8", 0), QuantisedMatrix(numbers, scales.reshape(1).expand(rows).contiguous())
    if not in_blocks and scales.shape in ((rows,), (rows, 1)):
        return WeightFormat("fp8", 0), QuantisedMatrix(numbers, scales.reshape(rows))
    raise _unknown(weight, f"float8 {weight.shape} with scales {tuple(scales.shape)}")


def _compressed(
    weight: QuantisedWeight, parts: Mapping[str, Tensor], in_blocks: bool
) -> tuple[WeightFormat, QuantisedMatrix]:
    numbers, scales, zeros = parts["weight"], parts["weight_scale"], parts.get("weight_zero_point")
    if numbers.dtype in FLOAT8:
        if zeros is not None and bool((zeros.float() != 0).any()):
            raise _unknown(weight, "float8 with zero points")
        return _float8(weight, numbers, scales, in_blocks)
    rows, columns = weight.shape[-2:]
    if len(weight.shape) != 2:
        raise _unknown(weight, "numbers of all experts in one tensor")
    if numbers.dtype == torch.uint8:
        if scales.dtype != torch.uint8:
            raise _unknown(weight, "NVFP4")
        return WeightFormat("mxfp4", 32), QuantisedMatrix(numbers, scales)
    if (groups := parts.get("weight_g_idx")) is not None and bool((groups >= 0).all()):
        _check_order(weight, groups, scales.shape[-1])
    words = numbers.dtype == torch.int32
    eight_bits = not words or numbers.shape[1] * 4 == columns
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = unpacked(zeros, 8 if eight_bits else 4, -2)[:rows] - (128 if eight_bits else 8)
    if eight_bits:
        if scales.numel() not in (1, rows) or (zeros is not None and bool((zeros != 0).any())):
            raise _unknown(weight, f"int8 with {'groups of columns' if zeros is None else 'zero points'}")
        plain = (numbers.view(torch.uint8) ^ _SIGN).view(torch.int8) if words else numbers
        scales = scales.float().reshape(-1).expand(rows).contiguous()
        return WeightFormat("int8", 0), QuantisedMatrix(plain, scales)
    if numbers.shape[1] * 8 != columns:
        raise _unknown(weight, "numbers of neither 4 nor 8 bits")
    unsigned = None if zeros is None else (zeros + 8).to(torch.uint8)
    return _in_groups(weight, QuantisedMatrix(numbers.view(torch.uint8), scales, unsigned))


def _gptq(
    quantisation: Mapping[str, Any], weight: QuantisedWeight, parts: Mapping[str, Tensor]
) -> tuple[WeightFormat, QuantisedMatrix]:
    bits = quantisation.get("bits", quantisation.get("w_bit"))
    if bits != 4:
        raise _unknown(weight, f"GPTQ's numbers of {bits} bits, with groups and zero points")
    scales = parts["scales"]
    if (order := parts.get("groups")) is not None:
        _check_order(weight, order, scales.shape[0])
    if quantisation.get("quant_method") == "awq":
        numbers, zeros = (awq_numbers(parts[role]) for role in ("numbers", "zeros"))
    else:
        numbers, zeros = unpacked(parts["numbers"], 4, 0), gptq_zeros(quantisation, parts["zeros"], 4)
    values = paired(numbers.T.to(torch.uint8).contiguous())
    offsets: Tensor | None = zeros.T.to(torch.uint8).contiguous()
    if quantisation.get("sym") is True or quantisation.get("zero_point") is False:
        if bool((zeros != 8).any()):
            raise ValueError(f"{weight.name}: has zero points, and its folder's config says that it has none")
        offsets = None
    return _in_groups(weight, QuantisedMatrix(values, scales.T.contiguous(), offsets))


def _check_order(weight: QuantisedWeight, groups: Tensor, count: int) -> None:
    columns = weight.shape[-1]
    if not torch.equal(groups.long(), torch.arange(columns) // (columns // count)):
        raise ValueError(
            f"{weight.name}: its columns are quantised in another order than their own (act-order), which the "
            "operators on quantised weights do not take"
        )


def _in_groups(weight: QuantisedWeight, matrix: QuantisedMatrix) -> tuple[WeightFormat, QuantisedMatrix]:
    """int4 whose scales are of groups of any size, or of rows: in groups that the operators have."""
    rows, columns = weight.shape
    groups = matrix.scales.numel() // rows
    size = columns // groups
    fitting = _BLOCK if groups == 1 and columns > _BLOCK else next((own for own in _GROUPS if size % own == 0), None)
    if groups == 1 and fitting is None:
        fitting = next((own for own in reversed(_GROUPS) if columns <= own), None)
    if fitting is None or groups * size != columns:
        raise _unknown(weight, f"int4 with scales {tuple(matrix.scales.shape)} for {weight.shape}")
    times = -(-columns // fitting) if groups == 1 else size // fitting

    def repeated(numbers: Tensor) -> Tensor:
        return numbers.reshape(rows, groups).repeat_interleave(times, 1)

    zeros = None if matrix.zeros is None else repeated(matrix.zeros)
    form = WeightFormat("int4", fitting, zeros is None)
    return form, replace(matrix, scales=repeated(matrix.scales), zeros=zeros)
