"""Which channels of an expert to keep when all its layer's experts get narrower, by a score of each.

Channel j of expert e is row j of its gate and up projections and column j of its down projection.
"""

import torch
from torch import Tensor


def kept_by_score(scores: Tensor, keep: int, block: int = 1) -> Tensor:
    """The channels with the highest scores, ascending; of equal scores the lower channel.

    Args:
        scores: (E, I).
        keep: I', channels kept of every expert, 1 to I.
        block: channels that stay or go together, by the sum of their scores: the first so many, the next so many, and
            so on. It divides I and I'.

    Returns:
        (E, I') int64.

    Raises:
        ValueError: ``keep`` is out of range, ``block`` does not divide, or a score is NaN (the expert is named).
    """
    channels = scores.shape[1]
    if not 1 <= keep <= channels:
        raise ValueError(f"keep: expected 1 to {channels} channels, got {keep}")
    if block < 1 or keep % block or channels % block:
        raise ValueError(f"block: expected a divisor of {keep} and {channels} channels, got {block}")
    if scores.isnan().any():
        raise ValueError(f"scores: expert {int(scores.isnan().any(1).nonzero()[0])} has a NaN score")
    sums = scores.unflatten(1, (-1, block)).sum(2)
    kept = sums.sort(dim=1, descending=True, stable=True).indices[:, : keep // block].sort(dim=1).values
    return (kept[:, :, None] * block + torch.arange(block, device=kept.device)).flatten(1)
