"""How far criteria agree on the order of a layer's experts: Spearman's rank correlation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_ext.decision.criteria import Scores


def rank_agreement(scores: Sequence[Scores]) -> Tensor:
    """Spearman's rank correlation between every two criteria, within each layer, averaged over the layers.

    Ranks of equal scores are averaged. Layers in which one of the two gives all experts the same score have no
    correlation and are left out; NaN where none is left.

    Args:
        scores: C scores of the same layers and experts.

    Returns:
        (C, C) float64 in [-1, 1].

    Raises:
        ValueError: no scores, or of different layers or numbers of experts.
    """
    if not scores:
        raise ValueError("scores: expected one or more criteria, got none")
    if len({(each.layers, each.values.shape, each.experts) for each in scores}) > 1:
        raise ValueError("scores: the criteria are for different layers or numbers of experts")
    counts = scores[0].experts
    total = torch.zeros(len(scores), len(scores), dtype=torch.float64)
    seen = torch.zeros_like(total)
    for layer, count in enumerate(counts):
        ranks = torch.stack([_ranks(each.values[layer, :count]) for each in scores])
        centred = ranks - ranks.mean(1, keepdim=True)
        norms = centred.norm(dim=1)
        defined = (norms[:, None] > 0) & (norms[None, :] > 0)
        total += torch.where(defined, centred @ centred.T / (norms[:, None] * norms[None, :]), 0.0)
        seen += defined
    return (total / seen).clamp(-1.0, 1.0)


def _ranks(values: Tensor) -> Tensor:
    """(E,) float64 ranks from 1, equal values sharing the mean of theirs."""
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return below.double() + (equal.double() + 1) / 2
