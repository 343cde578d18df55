"""Which experts go: by their scores, in a layer or in one ranking of all layers, or as the set that costs least."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ext.decision.pair_subsets import least_pairs


def kept_beside_least(pairs: Tensor, protected: Tensor, groups: int, removed: int) -> tuple[int, ...]:
    """What is left of a layer once the set of experts has gone that costs least together; where too many are protected,
    some of them go, too."""
    if int((~protected).view(groups, -1).sum(1).min()) < removed:
        protected = torch.zeros_like(protected)
    gone = set(least_pairs(pairs, protected, groups, removed))
    return tuple(expert for expert in range(len(pairs)) if expert not in gone)


NORMALISATIONS = ("sum", "max", "none")


def normalised(values: Tensor, normalise: str) -> Tensor:
    if normalise == "none":
        return values
    scale = values.sum(1, keepdim=True) if normalise == "sum" else values.amax(1, keepdim=True)
    return torch.where(scale == 0, 0.0, values / scale)


def _worst_first(row: Tensor, protected: Tensor, groups: int) -> Tensor:
    """(groups, E / groups) expert indices, every group's in the order of removal; the protected go last."""
    # Stable: equal scores stay in index order, so that the higher index comes first once the order is turned around.
    ranked = row.view(groups, -1).sort(dim=1, descending=True, stable=True).indices
    last = protected.view(groups, -1).gather(1, ranked).sort(dim=1, descending=True, stable=True).indices
    ranked = ranked.gather(1, last).flip(1)
    return ranked + torch.arange(groups)[:, None] * ranked.shape[1]


def kept_in_layer(row: Tensor, protected: Tensor, groups: int, removed: int) -> tuple[int, ...]:
    """What is left of a layer with scores (E,) once every group has lost its ``removed`` lowest."""
    return tuple(sorted(_worst_first(row, protected, groups)[:, removed:].flatten().tolist()))


def removed_from_all(values: Tensor, protected: Tensor, groups: int, wanted: int, fewest: int) -> list[int]:
    """How many experts every group of a layer loses when ``wanted`` experts go, the lowest of all layers first; steps
    that a protected one is in come last."""
    layers, experts = values.shape
    steps = []
    for layer, (row, super_ones) in enumerate(zip(values, protected, strict=True)):
        order = _worst_first(row, super_ones, groups)
        rows = zip(super_ones[order].any(0).tolist(), row[order].mean(0).tolist(), strict=True)
        steps += [
            (last, score, -layer, step)
            for step, (last, score) in enumerate(rows)
            if experts - (step + 1) * groups >= fewest
        ]
    # Within a layer steps with protected experts come last, and before them scores ascend: sorting keeps their order.
    removed = [0] * layers
    for _, _, negative_layer, _ in sorted(steps)[: wanted // groups]:
        removed[-negative_layer] += 1
    return removed
