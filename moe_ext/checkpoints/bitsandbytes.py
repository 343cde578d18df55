"""bitsandbytes' four bits: a weight as one row of numbers, two a byte, in blocks that share a largest value."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_ext.checkpoints.quantised_weight import Piece, QuantisedWeight
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor
from moe_ext.storage.formats import parse_json

_ROLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


def bitsandbytes_weights(
    folder: object, quantisation: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> list[QuantisedWeight]:
    """The four-bit weights of a folder.

    Raises:
        ValueError: eight bits, or a weight without what it needs beside it.
        CheckpointError: a state that is not what it should be.
    """
    if not quantisation.get("load_in_4bit", quantisation.get("_load_in_4bit")):
        name = next((name for name in stored if name.endswith(".SCB")), "a weight")
        raise ValueError(f"{folder}: {name} is stored in bitsandbytes' eight bits, which are not read; four bits are")
    weights = []
    for name, tensor in stored.items():
        state = next((stored[f"{name}.{state}"] for state in _STATES if f"{name}.{state}" in stored), None)
        if state is None:
            if tensor.dtype == torch.uint8 and name.endswith(".weight"):
                raise ValueError(f"{folder}: {name} is of four bits, and there is no {name}.{_STATES[0]}")
            continue
        roles = {role: stored[f"{name}.{role}"] for role in _ROLES if f"{name}.{role}" in stored}
        shape, fields = _read_state(folder, state)
        size = shape[0] * shape[1]
        if "absmax" not in roles or "quant_map" not in roles or tensor.size != -(-size // 2):
            raise CheckpointError(f"{folder}: {name} {tensor.shape} is not whole: its state says {shape}")
        pieces = {name: Piece("numbers", (None,) * len(tensor.shape)), state.name: Piece("state", (None,))}
        pieces |= {held.name: Piece(role, (None,)) for role, held in roles.items()}
        read = partial(
            _dequantised,
            block=int(fields.get("blocksize", 64)),
            nested=int(fields.get("nested_blocksize") or 256),
            offset=float(fields.get("nested_offset") or 0),
        )
        weights.append(
            QuantisedWeight(name, shape, pieces, read, "bitsandbytes' blocks run from row to row of a weight")
        )
    return weights


def _read_state(folder: object, state: StoredTensor) -> tuple[tuple[int, int], dict[str, Any]]:
    with state.file.open("rb") as file:
        file.seek(state.offset)
        content = file.read(min(state.size, 10_000))
    try:
        fields = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {state.name}: {error}") from None
    shape = fields.get("shape") if isinstance(fields, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise CheckpointError(f"{folder}: {state.name} names no shape of a matrix")
    return (shape[0], shape[1]), fields


def _dequantised(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    block: int,
    nested: int,
    offset: float,
) -> Tensor:
    packed = tensors["numbers"].flatten().view(torch.uint8)
    values = tensors["quant_map"].float()[torch.stack([packed >> 4, packed & 15], dim=-1).flatten().int()]
    largest = tensors["absmax"]
    if "nested_absmax" in tensors:
        above = tensors["nested_absmax"].float().repeat_interleave(nested)[: largest.numel()]
        largest = tensors["nested_quant_map"].float()[largest.flatten().int()] * above + offset
    size = shape[0] * shape[1]
    return (values[:size] * largest.float().flatten().repeat_interleave(block)[:size]).view(shape).to(dtype)
