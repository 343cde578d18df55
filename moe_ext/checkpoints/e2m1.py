"""Four-bit floating point numbers, two a byte: a sign, two bits of exponent, one of mantissa."""

import torch
from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])


def e2m1_values(packed: Tensor) -> Tensor:
    """Float32 (..., 2 n) of uint8 (..., n); a byte's lower half is the first of its two."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return _VALUES[halves.int()]
