"""The optimal brain surgeon's order of an expert's channels, from their Gram matrix.

With ``h_e(x) = act(gate_e x) * (up_e x)`` and routing weight g, the Gram matrix is ``A = sum g^2 h h^T`` over the
tokens routed to expert e: it says what the other channels can make up for.
"""

import torch
from torch import Tensor


def damped(gram: Tensor, damping: float) -> Tensor:
    """A Gram matrix (I, I) in float64 with ``damping`` times its mean diagonal added to its diagonal.

    Raises:
        ValueError: it holds a value that is not finite, or is zero.
    """
    gram = gram.double()
    mean = gram.diagonal().mean()
    if not bool(gram.isfinite().all()) or not mean > 0:
        raise ValueError(f"gram: expected finite sums with a positive diagonal, whose mean is {float(mean)}")
    return gram + damping * mean * torch.eye(len(gram), dtype=torch.float64, device=gram.device)


def removal_order(gram: Tensor, down: Tensor, *, damping: float = 0.01) -> Tensor:
    """The order in which an expert's channels go when the one that costs least goes next, made up for by the others
    (optimal brain surgeon, Hassibi and Stork 1993).

    With ``D = down^T`` and ``A`` the damped Gram matrix, the channel with the least ``||D_j||^2 / [A^-1]_jj`` goes, and
    D and ``A^-1`` become those of the others. Of D its products ``D D^T`` suffice. O(I^3 + I^2 H) in float64.

    Args:
        gram: (I, I), ``sum g^2 h h^T``.
        down: (H, I), any floating dtype.
        damping: share of the mean diagonal added to the diagonal.

    Returns:
        (I,) int64 on the device of ``gram``: the first goes first, so that the last I' are kept.

    Raises:
        ValueError: ``gram`` as for :func:`damped`.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damping)))
    weights = down.T.to(gram.device, torch.float64)
    products = weights @ weights.T
    left = torch.arange(len(gram), device=gram.device)  # channels of the rows of both matrices
    there = torch.ones_like(left, dtype=torch.bool)
    order = torch.empty_like(left)
    for step in range(len(gram)):
        diagonal = inverse.diagonal()
        costs = (products.diagonal() / diagonal).masked_fill(~there, float("inf"))
        row = int(costs.argmin())
        order[step] = left[row]
        there[row] = False
        moved, column = inverse[row] / diagonal[row], products[row].clone()
        products.addr_(moved, moved, alpha=float(column[row])).addr_(moved, column, alpha=-1).addr_(
            column, moved, alpha=-1
        )
        inverse.addr_(moved, inverse[row].clone(), alpha=-1)
        inverse.diagonal()[~there] = 1.0  # divides by nothing; the rest of these rows is zero but for rounding
        if int(there.sum()) <= 0.8 * len(left):  # rows that are gone cost as much as others
            left, inverse, products = left[there], inverse[there][:, there], products[there][:, there]
            there = there[there]
    return order
