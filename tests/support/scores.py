"""Scores given by hand."""

from collections.abc import Sequence

import torch

from moe_ext.decision.criteria import Scores


def scored(
    values: Sequence[Sequence[float]], criterion: str = "man", *, top_k: int = 1, experts: tuple[int, ...] = ()
) -> Scores:
    """Scores (L, E) of a Mixtral; ``experts``: how many each layer has, where they differ."""
    layers = tuple(f"layers.{i}" for i in range(len(values)))
    table = torch.tensor(values, dtype=torch.float64)
    return Scores(table, criterion, "mixtral", layers, top_k, "c4", experts=experts)
