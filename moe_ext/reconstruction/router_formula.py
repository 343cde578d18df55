"""How a layer routes among some of its experts, where its router's formula is known: by its logits, without running it.

Mixtral: the K largest logits of the experts that are left, weighted with the softmax over these K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_ext import ops
from moe_ext.models.blocks import MoeBlock
from moe_ext.models.router_formula import KnownRouter, RouterFormula, known_router

NEGLIGIBLE = 1e-9
"""Epsilon of a renormalisation below which it moves weights by less than rounding does."""


def ranks_stay(block: MoeBlock, thresholds: Tensor | None) -> KnownRouter | None:
    """A layer's router if its experts' ranks and weights' ratios do not depend on which other experts there are, nor
    slots' order on the choice alone where some are skipped: what :func:`moe_ext.ops.subset_errors` takes."""
    known = known_router(block)
    if known is None:
        return None
    formula = known.formula
    if not formula.renormalise or formula.groups > 1 or formula.least or formula.epsilon > NEGLIGIBLE:
        return None
    if known.is_corrected and (formula.score == "softmax" or thresholds is not None):
        return None
    return known


def ranked_scores(
    logits: Tensor, depth: int, formula: RouterFormula | None = None, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The experts that a token's router prefers, and what their weights are proportional to once they are chosen.

    Args:
        logits: (T, E). Equal choices: the lower expert index ranks first. A NaN ranks first.
        depth: N, how many ranks are wanted.
        formula: of a router of which :func:`ranks_stay`; None: the softmax over the selected logits.
        correction: (E,), for the choice only.

    Returns:
        scores (T, N) float64, positive; ranks (T, N) int64: expert of every rank.
    """
    logits = logits.double()
    if formula is None or formula.score == "softmax":
        ordered, ranks = logits.sort(dim=1, descending=True, stable=True)
        scores = (ordered - ordered[:, :1]).exp()  # softmax over chosen logits: only ratios matter
    else:
        choices = formula.choices(logits, None if correction is None else correction.double())
        ranks = choices.sort(dim=1, descending=True, stable=True).indices
        scores = formula.scores(logits).gather(1, ranks)
    return scores[:, :depth].contiguous(), ranks[:, :depth].contiguous()


def route_among(logits: Tensor, keep: Tensor, top_k: int, thresholds: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the router of a layer pruned to the experts ``keep`` (E,) bool returns, in the unpruned layer's indices, if
    it takes the softmax over the selected logits.

    Args:
        logits: (T, E), of the unpruned router.
        thresholds: (K - 1,) float32 skip thresholds, or None.

    Returns:
        weights (T, K) float32, experts (T, K) int64, E in skipped slots.
    """
    return ops.route(logits.masked_fill(~keep, -torch.inf), top_k, thresholds)


def routed_among(
    formula: RouterFormula,
    logits: Tensor,
    correction: Tensor | None,
    kept: Sequence[int],
    top_k: int,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`route_among` of any formula, on the host.

    Args:
        logits: (T, E) on the CPU, of the unpruned router; correction: (E,), or None.
        kept: the experts, ascending; as many of every group.
    """
    index = torch.tensor(list(kept))
    bias = None if correction is None else correction[index]
    weights, experts = ops.route(logits[:, index], top_k, thresholds, bias=bias, **formula.arguments())
    places = torch.cat([index, torch.tensor([logits.shape[1]])])  # a skipped slot stays one
    return weights, places[experts]
