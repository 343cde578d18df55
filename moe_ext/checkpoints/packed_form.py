"""Quantised experts as others store and load them: in compressed-tensors' layouts, gpt-oss' MXFP4 in its own."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moe_ext.models.packed_experts import QuantisedMatrix, WeightFormat

_SIGN = 0x80  # int8 as numbers from 0 on

_FORMATS = {
    "int8": "pack-quantized",
    "int4": "pack-quantized",
    "fp8": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}


def check_storable(name: str, form: WeightFormat, rows: int, columns: int) -> None:
    """ValueError, beginning with ``name``, unless compressed-tensors can hold a matrix of that size so: in whole words
    and whole groups."""
    if form.blocks and rows % form.group_size:
        raise ValueError(f"{name} has {rows} rows; blocks of {form.group_size} rows share a scale")
    if form.group_size and columns % form.group_size:
        raise ValueError(f"{name} has {columns} columns; group_size {form.group_size} does not divide them")
    if form.type == "int8" and columns % 4:
        raise ValueError(f"{name} has {columns} columns; int8 is stored in words of 4")
    if not form.symmetric and rows % 8:
        raise ValueError(f"{name} has {rows} rows; zero points are stored in words of 8 rows")


def stored_parts(
    form: WeightFormat, rows: int, columns: int, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What is stored of a module's weight: types and shapes, by the last part of the keys."""
    scales = form.scale_shape(rows, columns)
    scales = scales if len(scales) == 2 else (*scales, 1)
    match form.type:
        case "fp8":
            return {"weight": (torch.float8_e4m3fn, (rows, columns)), "weight_scale": (scale_dtype, scales)}
        case "mxfp4":
            return {"weight_packed": (torch.uint8, (rows, columns // 2)), "weight_scale": (torch.uint8, scales)}
    per_word = 4 if form.type == "int8" else 8
    parts = {
        "weight_packed": (torch.int32, (rows, columns // per_word)),
        "weight_scale": (scale_dtype, scales),
        "weight_shape": (torch.int64, (2,)),
    }
    if not form.symmetric:
        parts["weight_zero_point"] = (torch.int32, (rows // 8, scales[1]))
    return parts


def stored_tensors_of(
    matrix: QuantisedMatrix, form: WeightFormat, columns: int, scale_dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of :func:`stored_parts` of a matrix (R, C)."""
    rows = matrix.values.shape[0]
    scales = matrix.scales if matrix.scales.dim() == 2 else matrix.scales[:, None]
    match form.type:
        case "fp8":
            return {"weight": matrix.values, "weight_scale": scales.to(scale_dtype)}
        case "mxfp4":
            return {"weight_packed": matrix.values, "weight_scale": scales}
        case "int8":
            words = (matrix.values.view(torch.uint8) ^ _SIGN).view(torch.int32)
        case _:
            words = matrix.values.contiguous().view(torch.int32)
    parts = {
        "weight_packed": words,
        "weight_scale": scales.to(scale_dtype),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if matrix.zeros is not None:
        shifts = torch.arange(0, 32, 4)[:, None]
        numbers = matrix.zeros.long().unflatten(0, (-1, 8)) << shifts
        parts["weight_zero_point"] = numbers.sum(1).to(torch.int32)  # the highest bit becomes the sign
    return parts


def compressed_config(form: WeightFormat, ignore: Iterable[str]) -> dict[str, Any]:
    """What ``config.json`` says under ``quantization_config``.

    With float8 weights it says that activations are quantised to float8 as they come, token by token or in groups of
    128: engines have no kernels for experts whose weights alone are float8, or use their own knowledge of the
    processor. moe_ext quantises none.

    Args:
        ignore: names of modules with a weight matrix that is not quantised.
    """
    floats = form.type in ("fp8", "mxfp4")
    strategy = "block" if form.blocks else "group" if form.group_size else "channel"
    weights: dict[str, Any] = {
        "num_bits": 4 if form.type in ("int4", "mxfp4") else 8,
        "type": "float" if floats else "int",
        "symmetric": form.symmetric,
        "strategy": strategy,
        "group_size": form.group_size if strategy == "group" else None,
        "block_structure": [form.group_size, form.group_size] if form.blocks else None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    if form.type == "mxfp4":
        weights["scale_dtype"] = "torch.uint8"
    name = _FORMATS[form.type]
    activations = None
    if form.type == "fp8":
        activations = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "group" if form.blocks else "token",
            "group_size": form.group_size or None,
            "block_structure": None,
            "dynamic": True,
            "actorder": None,
            "observer": None,
            "observer_kwargs": {},
        }
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
                "format": name,
            }
        },
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def mxfp4_config(kept: Iterable[str]) -> dict[str, Any]:
    """The same in gpt-oss' own format.

    Args:
        kept: names of modules that are not quantised.
    """
    return {"quant_method": "mxfp4", "modules_to_not_convert": sorted(kept)}


def mxfp4_blocks(matrix: QuantisedMatrix) -> tuple[Tensor, Tensor]:
    """gpt-oss' blocks (..., R, C / 32, 16) and scales (..., R, C / 32) of a matrix (..., R, C)."""
    return matrix.values.unflatten(-1, (-1, 16)), matrix.scales
