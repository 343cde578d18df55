"""Float8 weights with a scale for every block of them, as DeepSeek-V3 is published: what they stand for."""

import torch
from torch import Tensor

SCALES = "_scale_inv"
"""What the name of a float8 tensor's scales has behind the tensor's."""

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def dequantised(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Every weight times its block's scale, in float32, then rounded: what transformers makes of them.

    Args:
        weight: (..., R, C) float8.
        scales: (..., ceil(R / block[0]), ceil(C / block[1])) floating point.
        block: rows and columns that share a scale; the last ones may be fewer.
        dtype: of the result, of the same shape as ``weight``.

    Raises:
        ValueError: ``scales`` has another shape or type.
    """
    rows, columns = weight.shape[-2:]
    expected = (*weight.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if tuple(scales.shape) != expected or not scales.dtype.is_floating_point:
        raise ValueError(
            f"the scales of {tuple(weight.shape)} weights are {scales.dtype} of shape {tuple(scales.shape)}; expected "
            f"floating point numbers of shape {expected}"
        )
    spread = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return weight.float().mul_(spread[..., :rows, :columns]).to(dtype)
