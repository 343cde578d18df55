"""Redundancy: pairs of experts that the router chooses for the same tokens, as a report for choosing what to remove.

How many tokens two experts share is MC-Suite's expert-expert collaboration (arXiv 2504.05586). Here it is a report, not
a criterion: that two experts work on the same tokens says that one could stand in for the other in the
routing, not that their outputs are alike.
"""

from dataclasses import dataclass

import torch

from moe_ext.calibration.statistics import ExpertStatistics


@dataclass(frozen=True)
class ExpertPair:
    """Two experts of a layer, ``first < second``.

    Attributes:
        layer: module name of the MoE block.
        together: calibration tokens routed to both.
        overlap: their share of the tokens routed to either (Jaccard index), 0 to 1.
        lift: how many times more often together than if the router chose them independently.
    """

    layer: str
    first: int
    second: int
    together: int
    overlap: float
    lift: float


def overlap(stats: ExpertStatistics) -> torch.Tensor:
    """Share of the tokens routed to either of two experts that went to both.

    Returns:
        (L, E, E) float64 in [0, 1], symmetric, 0 on the diagonal and for experts that no token reached.
    """
    together = stats.coactivation.double()
    counts = together.diagonal(dim1=1, dim2=2)
    either = counts[:, :, None] + counts[:, None, :] - together
    shares = torch.where(either == 0, 0.0, together / either)
    return shares.masked_fill(torch.eye(stats.num_experts, dtype=torch.bool), 0.0)


def redundant_pairs(stats: ExpertStatistics, most: int = 3) -> list[ExpertPair]:
    """The pairs of every layer with the largest overlap, largest first; pairs that share no token are left out.

    Args:
        stats: statistics of the calibration text.
        most: pairs a layer, at most.

    Raises:
        ValueError: ``most`` below 1, or top_k = 1, with which no token has two experts.
    """
    if most < 1:
        raise ValueError(f"most: expected 1 or more pairs, got {most}")
    if stats.top_k < 2:
        raise ValueError("coactivation needs at least 2 experts a token; these statistics have top_k = 1")
    pairs = []
    first, second = torch.triu_indices(stats.num_experts, stats.num_experts, offset=1)
    for layer, shares in enumerate(overlap(stats)):
        ranked = shares[first, second].sort(descending=True, stable=True)
        for share, index in zip(ranked.values[:most].tolist(), ranked.indices[:most].tolist(), strict=True):
            one, other = int(first[index]), int(second[index])
            together = int(stats.coactivation[layer, one, other])
            if together == 0:
                break
            alone = int(stats.coactivation[layer, one, one]) * int(stats.coactivation[layer, other, other])
            lift = together * int(stats.tokens[layer]) / alone
            pairs.append(ExpertPair(stats.layers[layer], one, other, together, share, lift))
    return pairs
