"""compressed-tensors: pack-quantized, int-quantized, float-quantized, nvfp4- and mxfp4-pack-quantized."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_ext.checkpoints.e2m1 import e2m1_values
from moe_ext.checkpoints.float8 import DTYPES as FLOAT8
from moe_ext.checkpoints.int_packing import unpacked
from moe_ext.checkpoints.quantised_weight import Axis, Dequantise, Piece, QuantisedWeight, scale_axes, spread
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor

_PACKED = "weight_packed"
_COMPANIONS = (
    "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale", "input_scale",
    "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip


def compressed_weights(
    folder: object, quantisation: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> list[QuantisedWeight]:
    """The quantised weights of a folder that compressed-tensors wrote.

    Raises:
        ValueError: packed weights of several numbers of bits, or without what they need beside them.
        CheckpointError: tensors whose shapes do not fit each other.
    """
    block = block_structure(quantisation)
    weights = []
    for name, tensor in stored.items():
        if name.endswith(f".{_PACKED}"):
            module = name.removesuffix(_PACKED)
        elif name.endswith(".weight") and tensor.dtype in (torch.int8, *FLOAT8):
            module = name.removesuffix("weight")
        else:
            continue
        beside = {role: stored[module + role] for role in _COMPANIONS if module + role in stored}
        if "weight_scale" not in beside:
            raise ValueError(f"{folder}: {name} is quantised, and there is no {module}weight_scale")
        if not name.endswith(_PACKED):
            weights.append(_plain(name, module, tensor, beside, block))
        elif tensor.dtype == torch.uint8:
            weights.append(_four_bit_floats(name, module, tensor, beside))
        elif tensor.dtype == torch.int32:
            weights.append(_packed(name, module, tensor, beside, _bits(folder, quantisation, name)))
        else:
            raise CheckpointError(f"{folder}: {name} is {tensor.dtype}; expected int32 or uint8")
    return weights


def _plain(
    name: str, module: str, tensor: StoredTensor, beside: dict[str, StoredTensor], block: tuple[int, int] | None
) -> QuantisedWeight:
    pieces = {name: Piece("weight", _each(tensor.shape))}
    pieces |= _beside(tensor.shape, beside, block)
    return QuantisedWeight(f"{module}weight", tensor.shape, pieces, partial(_dequantised, block=block))


def _four_bit_floats(name: str, module: str, tensor: StoredTensor, beside: dict[str, StoredTensor]) -> QuantisedWeight:
    shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
    pieces = {name: Piece("weight", (*_each(shape)[:-1], (len(shape) - 1, 2)))} | _beside(shape, beside, None)
    exponents = beside["weight_scale"].dtype == torch.uint8
    return QuantisedWeight(f"{module}weight", shape, pieces, _mxfp4 if exponents else _nvfp4)


def _packed(
    name: str, module: str, tensor: StoredTensor, beside: dict[str, StoredTensor], bits: int
) -> QuantisedWeight:
    columns = tensor.shape[-1] * 32 // bits
    shape = (*tensor.shape[:-1], columns)
    last = len(shape) - 1
    together = 32 // bits if 32 % bits == 0 else 32
    pieces = {name: Piece("weight", (*_each(shape)[:-1], (last, together)))}
    scales = beside["weight_scale"]
    for role, held in beside.items():
        if role == "weight_shape":
            pieces[held.name] = Piece(role, (None,), "shape")
        elif role == "weight_g_idx":
            pieces[held.name] = Piece(role, ((last, 1),), "groups")
        elif role == "weight_zero_point" and held.dtype == torch.int32:
            # Packed along the rows, one number for every scale.
            pieces[held.name] = Piece(role, ((last - 1, together), scale_axes(shape, scales)[-1]))
        else:
            pieces[held.name] = Piece(role, scale_axes(shape, held))
    return QuantisedWeight(
        f"{module}weight",
        shape,
        pieces,
        _unreadable(name, bits) if 32 % bits else partial(_dequantised_words, bits=bits),
        None if 32 % bits == 0 else f"numbers of {bits} bits lie across words",
    )


def _each(shape: tuple[int, ...]) -> tuple[Axis, ...]:
    return tuple((dim, 1) for dim in range(len(shape)))


def _beside(shape: tuple[int, ...], beside: dict[str, StoredTensor], block: tuple[int, int] | None) -> dict[str, Piece]:
    return {
        held.name: Piece(role, scale_axes(shape, held, block if role.startswith("weight") else None))
        for role, held in beside.items()
    }


def _groups(quantisation: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = quantisation.get("config_groups")
    schemes = groups.values() if isinstance(groups, dict) else ()
    found = (scheme.get("weights") for scheme in schemes if isinstance(scheme, dict))
    return [weights for weights in found if isinstance(weights, dict)]


def _bits(folder: object, quantisation: Mapping[str, Any], name: str) -> int:
    bits = {weights.get("num_bits") for weights in _groups(quantisation) if weights.get("type", "int") == "int"}
    one = next(iter(bits), None)
    if len(bits) != 1 or type(one) is not int or not 1 <= one <= 8:
        raise ValueError(f"{folder}: how many bits {name} has is not told: the config says {sorted(map(str, bits))}")
    return one


def block_structure(quantisation: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the config says it."""
    for weights in _groups(quantisation):
        sizes = weights.get("block_structure")
        if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
            return sizes[0], sizes[1]
    return None


def _dequantised(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, *, block: tuple[int, int] | None
) -> Tensor:
    values = tensors["weight"].float()
    if (zero := tensors.get("weight_zero_point")) is not None:
        values -= spread(zero, shape, block)
    return values.mul_(spread(tensors["weight_scale"], shape, block)).to(dtype)


def _dequantised_words(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, *, bits: int
) -> Tensor:
    half = 1 << (bits - 1)
    values = unpacked(tensors["weight"], bits, -1).float() - half
    scales, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32:
        zero = unpacked(zero, bits, -2)[..., : shape[-2], :] - half
    groups = tensors.get("weight_g_idx")
    if groups is not None and bool((groups >= 0).all()):
        scales, zero = scales[..., groups], None if zero is None else zero[..., groups]
    if zero is not None:
        values -= spread(zero, shape)
    return values.mul_(spread(scales, shape)).to(dtype)


def _nvfp4(tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    scales = tensors["weight_scale"].float()
    if (scale := tensors.get("weight_global_scale")) is not None:
        scales = scales / scale.float()
    return e2m1_values(tensors["weight"]).mul_(spread(scales, shape)).to(dtype)


def _mxfp4(tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    scales = torch.exp2(tensors["weight_scale"].float() - 127)
    return e2m1_values(tensors["weight"]).mul_(spread(scales, shape)).to(dtype)


def _unreadable(name: str, bits: int) -> Dequantise:
    def refuse(tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        raise ValueError(f"{name} has {bits} bits a number, packed across words: it is pruned, but not computed with")

    return refuse
