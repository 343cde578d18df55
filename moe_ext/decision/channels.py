"""Which channels of an expert to keep when all its layer's experts get narrower.

Channel j of expert e is row j of its gate and up projections and column j of its down projection. With
``h_e(x) = act(gate_e x) * (up_e x)`` and routing weight ``g``, sums over the tokens routed to e:

- *error* of a channel: ``sum g^2 h_j^2 * ||down[:, j]||^2``, what the squared error of the layer's output gains if it
  alone goes and the other channels' errors are independent of it;
- *Gram matrix*: ``A = sum g^2 h h^T``, from which :func:`kept_by_obs` takes what the others can make up for (optimal
  brain surgeon, Hassibi and Stork 1993).
"""

import torch
from torch import Tensor


def kept_by_score(scores: Tensor, keep: int) -> Tensor:
    """The channels with the highest scores, ascending; of equal scores the lower channel.

    Args:
        scores: (E, I).
        keep: I', channels kept of every expert, 1 to I.

    Returns:
        (E, I') int64.

    Raises:
        ValueError: ``keep`` is out of range, or a score is NaN (the expert is named).
    """
    channels = scores.shape[1]
    if not 1 <= keep <= channels:
        raise ValueError(f"keep: expected 1 to {channels} channels, got {keep}")
    if scores.isnan().any():
        raise ValueError(f"scores: expert {int(scores.isnan().any(1).nonzero()[0])} has a NaN score")
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(dim=1).values


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


def kept_by_obs(gram: Tensor, down: Tensor, keep: int, *, damping: float = 0.01) -> Tensor:
    """The channels that are left of one expert when those that cost least go one by one, each made up for by the rest.

    With ``D = down^T`` and ``A`` the damped Gram matrix, the channel with the least ``||D_j||^2 / [A^-1]_jj`` goes, and
    D and ``A^-1`` become those of the others. O((I - I') I (I + H)) in float64.

    Args:
        gram: (I, I), ``sum g^2 h h^T``.
        down: (H, I), any floating dtype.
        keep: I', channels kept, 1 to I.
        damping: share of the mean diagonal added to the diagonal.

    Returns:
        (I') int64, ascending.

    Raises:
        ValueError: ``keep`` is out of range, or ``gram`` as for :func:`damped`.
    """
    channels = len(gram)
    if not 1 <= keep <= channels:
        raise ValueError(f"keep: expected 1 to {channels} channels, got {keep}")
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damping)))
    weights = down.T.double().clone()  # (I, H)
    gone = torch.zeros(channels, dtype=torch.bool, device=gram.device)
    for _ in range(channels - keep):
        diagonal = inverse.diagonal()
        costs = (weights.square().sum(1) / diagonal).masked_fill(gone, float("inf"))
        channel = int(costs.argmin())
        row = inverse[channel] / diagonal[channel]
        weights -= row[:, None] * weights[channel]
        inverse -= row[:, None] * inverse[channel]
        gone[channel] = True
        inverse.diagonal()[gone] = 1.0  # divides by nothing; their rows and columns are zero but for rounding
    return (~gone).nonzero().flatten()
