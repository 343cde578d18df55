"""ModelOpt's NVFP4: two four-bit numbers a byte, a float8 scale for 16 columns, a scale a tensor above those."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_ext.checkpoints.e2m1 import e2m1_values
from moe_ext.checkpoints.float8 import float8_weights
from moe_ext.checkpoints.quantised_weight import Piece, QuantisedWeight, found, scale_axes, spread
from moe_ext.checkpoints.stored_tensors import StoredTensor

_SCALE = "weight_scale"


def modelopt_weights(
    folder: object, quantisation: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> list[QuantisedWeight]:
    """The NVFP4 and float8 weights of a folder.

    Raises:
        ValueError: a weight without scales.
        CheckpointError: scales of a shape that fits no rule.
    """
    weights = []
    for name, tensor in stored.items():
        if tensor.dtype != torch.uint8 or name.endswith(("scale", "scale_2")):
            continue
        module = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        pieces = {
            "scales": (f"{module}{_SCALE}",),
            "scale": (f"{module}{_SCALE}_2",),
            "input": (f"{module}input_scale",),
        }
        present = found(stored, pieces)
        for role in ("scales", "scale"):
            if role not in present:
                raise ValueError(f"{folder}: {name} is NVFP4, and there is no {pieces[role][0]}")
        *outer, packed = tensor.shape
        shape = (*outer, 2 * packed)
        held = {name: Piece("weight", (*((dim, 1) for dim in range(len(outer))), (len(outer), 2)))}
        held |= {scales.name: Piece(role, scale_axes(shape, scales)) for role, scales in present.items()}
        weights.append(QuantisedWeight(name, shape, held, _dequantised))
    return weights + float8_weights(folder, quantisation, stored)


def _dequantised(tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    scales = tensors["scales"].float() * tensors["scale"].float().reshape(-1, *[1] * (len(shape) - 1))
    return e2m1_values(tensors["weight"]).mul_(spread(scales, shape)).to(dtype)
