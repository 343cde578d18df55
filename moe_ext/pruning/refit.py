"""Kept channels take over what removed ones did: an expert's down projection, fitted to the outputs that it gave."""

import torch
from torch import Tensor

from moe_ext.calibration.removal_order import damped


def refitted_down(gram: Tensor, down: Tensor, kept: Tensor, *, damping: float = 0.01) -> Tensor:
    """The columns of a down projection that come nearest to its outputs with some channels gone.

    ``D_S + (A_SS + damping * mean(diag A) * 1)^-1 A_SR D_R`` with ``D = down^T``, S the kept and R the removed ones:
    least squares over the tokens that A was summed over, ridge towards the columns as they were.

    Args:
        gram: (I, I), ``A = sum g^2 h h^T``.
        down: (H, I), any floating dtype.
        kept: (I') int64, distinct channels.
        damping: strength of the ridge, as a share of the mean diagonal.

    Returns:
        (H, I') in the dtype of ``down``, on its device; computed in float64.

    Raises:
        ValueError: ``gram`` as for :func:`moe_ext.calibration.removal_order.damped`.
    """
    removed = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    removed[kept] = False
    weights = down.T.to(gram.device, torch.float64)
    factor = torch.linalg.cholesky(damped(gram, damping)[kept][:, kept])
    missing = gram.double()[kept][:, removed] @ weights[removed]
    fitted = weights[kept] + torch.cholesky_solve(missing, factor)
    return fitted.T.to(down.device, down.dtype).contiguous()
