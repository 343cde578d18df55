"""How a layer routes among some of its experts: the one place in the search that knows a router's formula.

Mixtral: the K largest logits of the experts that are left, weighted with the softmax over these K.
"""

import torch
from torch import Tensor

from moe_ext import ops
from moe_ext.models.blocks import MoeBlock


def is_known(block: MoeBlock) -> bool:
    """Whether :func:`ranked_scores` and :func:`route_among` have the formula of a layer's router. The others' own code
    runs (:mod:`moe_ext.models.sliced_router`)."""
    return block.family.fused and block.family.renormalise is True


def ranked_scores(logits: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The experts that a token's router prefers, and what their weights are proportional to once they are chosen.

    Args:
        logits: (T, E). Equal logits: the lower expert index ranks first. A NaN ranks first.
        depth: N, how many ranks are wanted.

    Returns:
        scores (T, N) float64, positive; ranks (T, N) int64: expert of every rank.
    """
    ordered, ranks = logits.double().sort(dim=1, descending=True, stable=True)
    scores = (ordered - ordered[:, :1]).exp()  # softmax over chosen logits: only ratios matter
    return scores[:, :depth].contiguous(), ranks[:, :depth].contiguous()


def route_among(logits: Tensor, keep: Tensor, top_k: int, thresholds: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the router of a layer pruned to the experts ``keep`` (E,) bool returns, in the unpruned layer's indices.

    Args:
        logits: (T, E), of the unpruned router.
        thresholds: (K - 1,) float32 skip thresholds, or None.

    Returns:
        weights (T, K) float32, experts (T, K) int64, E in skipped slots.
    """
    return ops.route(logits.masked_fill(~keep, -torch.inf), top_k, thresholds)
