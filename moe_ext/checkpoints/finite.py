"""Weights that are no numbers: found in one pass, by the tensor's name."""

import warnings

import torch
from torch import Tensor, nn

from moe_ext.checkpoints.faults import few
from moe_ext.checkpoints.stored_tensors import CheckpointError

# Float8 types: the bits that are compared, and the least of their values that is no finite number.
_FLOAT8 = {torch.float8_e4m3fn: (0x7F, 0x7F), torch.float8_e5m2: (0x7F, 0x7C), torch.float8_e8m0fnu: (0xFF, 0xFF)}


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor in memory are finite; integers are."""
    if tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return True
    if tensor.dtype in _FLOAT8:
        mask, least = _FLOAT8[tensor.dtype]
        return bool((tensor.view(torch.uint8) & mask).max() < least)
    # Both ends are NaN if one number is, and there is no tensor of booleans beside the weights.
    low, high = torch.aminmax(tensor.detach())
    return bool(low.isfinite() & high.isfinite())


def check_finite(checkpoint: object, model: nn.Module, *, allowed: bool = False) -> None:
    """CheckpointError, with names, if weights of a model in memory are not finite; a warning if that is allowed."""
    names = [name for name, tensor in model.state_dict().items() if not tensor.is_meta and not is_finite(tensor)]
    if not names:
        return
    message = f"{checkpoint}: not all numbers are finite in {few(names)}"
    if not allowed:
        raise CheckpointError(message)
    warnings.warn(message, stacklevel=3)
