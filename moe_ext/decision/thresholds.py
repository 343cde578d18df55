"""Skip thresholds from statistics (arXiv 2402.14800, section 3.3)."""

import torch
from torch import Tensor

from moe_ext.calibration.statistics import ExpertStatistics


def skip_thresholds(stats: ExpertStatistics, quantile: float = 0.5) -> Tensor:
    """Per-layer thresholds for dynamic expert skipping (arXiv 2402.14800, section 3.3).

    Args:
        stats: statistics with a ratio histogram, from :func:`moe_ext.calibrate`.
        quantile: share of calibration tokens whose ratio ``w_j / w_1`` lies below the threshold, which is the share of
            rank-j slots that will be skipped on such text; 0.5 is the paper's median, 0 skips nothing.

    Returns:
        (L, K - 1) float32 in [0, 1], exact to one histogram bin (1/1024); 0 for a rank that no token has in its layer.

    Raises:
        ValueError: quantile outside [0, 1], top_k below 2, or a layer without tokens (the layer is named).
    """
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile is {quantile}; expected 0 to 1")
    if stats.top_k < 2:
        raise ValueError("skipping needs at least 2 experts a token, one being weaker; these statistics have top_k = 1")
    histogram = stats.ratio_histogram.double()  # (L, K - 1, bins)
    total = histogram.sum(-1)  # (L, K - 1)
    for name, tokens in zip(stats.layers, stats.tokens.tolist(), strict=True):
        if tokens == 0:
            raise ValueError(f"layer {name} has no calibration tokens; calibrate on text that reaches it")
    wanted = quantile * total
    upto = histogram.cumsum(-1)
    # First bin at which the cumulative count reaches the wanted one, then linear inside the bin.
    bins = (upto < wanted.unsqueeze(-1)).sum(-1, keepdim=True).clamp(max=histogram.shape[-1] - 1)
    inside = histogram.gather(-1, bins).squeeze(-1)
    before = upto.gather(-1, bins).squeeze(-1) - inside
    share = torch.where(inside > 0, (wanted - before) / inside, 0.0)
    return ((bins.squeeze(-1) + share) / histogram.shape[-1]).float()
