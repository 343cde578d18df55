"""Which channels of an expert to keep when all its layer's experts get narrower, by a score of each.

Channel j of expert e is row j of its gate and up projections and column j of its down projection.
"""

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
