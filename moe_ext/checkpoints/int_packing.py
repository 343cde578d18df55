"""Whole numbers of few bits in 32-bit words, as GPTQ, AutoAWQ and compressed-tensors pack them."""

import torch
from torch import Tensor


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The numbers, from 0 on, of int32 words along a dimension: each word holds 32 // bits of them, the lowest bits the
    first. ``bits`` divides 32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    dim %= words.dim()
    numbers = (words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.dim() - dim - 1))) & ((1 << bits) - 1)
    return numbers.flatten(dim, dim + 1)
