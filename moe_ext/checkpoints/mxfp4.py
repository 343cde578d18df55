"""MXFP4 as gpt-oss is published: ``X_blocks`` of 32 four-bit numbers each, ``X_scales`` of one exponent a block."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_ext.checkpoints.quantised_weight import Piece, QuantisedWeight
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_SIZE = 32  # numbers a block


def mxfp4_weights(folder: object, stored: Mapping[str, StoredTensor]) -> list[QuantisedWeight]:
    """The weights whose blocks a folder holds. A model's (E, C, R) lies there as blocks (E, R, C / 32, 16).

    Raises:
        ValueError: blocks without scales.
        CheckpointError: tensors of other shapes or types.
    """
    weights = []
    for name, blocks in stored.items():
        if not name.endswith(_BLOCKS):
            continue
        weight = name.removesuffix(_BLOCKS)
        if (scales := stored.get(weight + _SCALES)) is None:
            raise ValueError(f"{folder}: {name} is MXFP4, and there is no {weight + _SCALES}")
        whole = len(blocks.shape) == 4 and blocks.shape[3] == _SIZE // 2 and blocks.dtype == torch.uint8
        if not whole or scales.shape != blocks.shape[:3] or scales.dtype != torch.uint8:
            raise CheckpointError(
                f"{folder}: {name} is {blocks.dtype} {blocks.shape} and its scales are {scales.dtype} {scales.shape}; "
                "expected uint8 (E, R, C / 32, 16) and (E, R, C / 32)"
            )
        experts, rows, columns = blocks.shape[:3]
        axes = ((0, 1), (2, 1), (1, _SIZE))
        pieces = {name: Piece("blocks", (*axes, None)), scales.name: Piece("scales", axes)}
        weights.append(QuantisedWeight(weight, (experts, columns * _SIZE, rows), pieces, _dequantised))
    return weights


def _dequantised(tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """By transformers' own code."""
    return convert_moe_packed_tensors(tensors["blocks"], tensors["scales"], dtype=dtype)
