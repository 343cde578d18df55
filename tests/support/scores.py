"""Scores given by hand."""

from collections.abc import Sequence

import torch

from moe_ext.decision.criteria import Scores
from moe_ext.models.layout import Layout


def scored(
    values: Sequence[Sequence[float]], criterion: str = "man", *, top_k: int = 1, experts: tuple[int, ...] = ()
) -> Scores:
    """Scores (L, E) of a Mixtral; ``experts``: how many each layer has, where they differ."""
    layers = tuple(f"layers.{i}" for i in range(len(values)))
    table = torch.tensor(values, dtype=torch.float64)
    layout = Layout("mixtral", layers, experts or (table.shape[1],) * len(layers), top_k)
    return Scores(table, criterion, layout, "c4")
