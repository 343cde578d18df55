"""Float8 weights with scales: one a block, as DeepSeek-V3 and Qwen publish them, one a row, or one a tensor."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_ext.checkpoints.quantised_weight import Piece, QuantisedWeight, found, scale_axes, spread
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def float8_weights(
    folder: object, quantisation: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> list[QuantisedWeight]:
    """The float8 weights of a folder, with their scales and those of their inputs.

    Raises:
        ValueError: a weight without scales, or a field of the config that is not what it should be.
        CheckpointError: scales of a type or shape that fits no rule.
    """
    block = block_of(folder, quantisation)
    weights = []
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES or name.endswith(("scale", "scale_inv", "scales", "scale_2")):
            continue
        # A module's weight has its companions beside it; experts in one tensor have them under longer names.
        module = name.removesuffix("weight")
        companions = found(
            stored,
            {
                "scales": (f"{name}_scale_inv", f"{name}_scale", f"{name}_weight_scale"),
                "input": (
                    f"{module}input_scale", f"{module}activation_scale", f"{name}_input_scale",
                    f"{name}_activation_scale",
                ),
            },
        )  # fmt: skip
        if "scales" not in companions:
            raise ValueError(f"{folder}: {name} is float8, and there is no {name}_scale_inv or {name}_scale")
        for scales in companions.values():
            if not scales.dtype.is_floating_point:
                raise CheckpointError(f"{folder}: {scales.name} is {scales.dtype}; expected floating point numbers")
        pieces = {name: Piece("weight", tuple((dim, 1) for dim in range(len(tensor.shape))))}
        for role, scales in companions.items():
            pieces[scales.name] = Piece(role, scale_axes(tensor.shape, scales, block if role == "scales" else None))
        weights.append(QuantisedWeight(name, tensor.shape, pieces, partial(dequantised, block=block)))
    return weights


def block_of(folder: object, quantisation: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, as the config says it; None if it does not."""
    sizes = quantisation.get("weight_block_size")
    if sizes is None:
        return None
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{folder}: the config's weight_block_size is {str(sizes)[:100]}; expected two numbers")
    return sizes[0], sizes[1]


def dequantised(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, *, block: tuple[int, int] | None
) -> Tensor:
    """Every weight times its scale, in float32, then rounded: what transformers makes of them."""
    return tensors["weight"].float().mul_(spread(tensors["scales"], shape, block)).to(dtype)
