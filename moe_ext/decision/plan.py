"""From scores to a plan: the best experts of every layer, or of the whole model together."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from moe_ext.decision.criteria import Scores
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.decision.super_experts import named
from moe_ext.storage.formats import shown
from moe_ext.version import __version__


def plan(
    scores: Scores,
    *,
    keep: int | None = None,
    ratio: float | None = None,
    scope: str = "layer",
    normalise: str | None = None,
    allow_super: bool = False,
) -> PruningPlan:
    """Keep the best experts, of every layer the same number or of the whole model together.

    The lowest score is removed first; of equal scores that of the later layer, then of the higher expert index. In a
    layer with expert groups one expert of every group goes at a time, the lowest of each: their mean score counts (with
    ``scope="model"`` a number that whole steps do not make up is rounded down).

    With ``scope="model"`` all layers' experts stand in one ranking, and a layer keeps at least what its router needs
    (top_k where there are no groups). Criteria that sum norms grow with depth, so that a ranking of raw scores would
    empty the early layers: ``normalise`` makes layers comparable. What the papers do: most give every layer the same
    number (as 2604.06542 says of them, which allocates by redundancy instead), NAEE (2402.14800) by searching layer by
    layer, AIMER (2603.18492) by ranking within layers; the published code of MoNE (2507.00390) has both scopes, and
    compares raw scores over all layers.

    Super experts (:func:`moe_ext.super_experts`, arXiv 2507.23279) are kept whatever their score: without the three of
    its 6,144, Qwen3-30B-A3B writes nothing sensible. A warning names those that the scores alone would remove.

    Args:
        scores: (L, E) scores, from :func:`moe_ext.decision.criteria.score`.
        keep: experts kept in every layer (on average with ``scope="model"``), K to E. Exactly one of ``keep`` and
            ``ratio`` is given.
        ratio: share of the experts removed, in [0, 1): ``floor(ratio * n + 0.5)`` of the n experts of every layer, of
            every group, or with ``scope="model"`` of all layers.
        scope: "layer" or "model".
        normalise: for ``scope="model"``: "sum" (default) divides a layer's scores by their sum, which changes nothing
            for ``frequency``; "max" divides by their largest; "none" compares them as they are.
        allow_super: whether super experts may go as others do, with a warning that names them.

    Returns:
        A plan whose ``made_by`` holds the criterion, the dataset, ``keep`` or ``ratio``, the scope if it is the model,
        what the super experts that the scores alone would remove came to, if there are any, and the version.

    Raises:
        ValueError: neither or both of keep and ratio, a ``keep`` that is no integer, fewer than K or more than E
            experts to keep, too few for the super experts, a number that the groups do not share equally, layers that
            differ in their number of experts already, an unknown scope or normalisation, or a score that is NaN, or
            infinite in one ranking of all layers (the layer and expert are named).
    """
    layers, experts = scores.values.shape
    if len(set(scores.experts)) > 1:
        raise ValueError(
            f"scores: the layers have {min(scores.experts)} to {max(scores.experts)} experts; "
            "plan from statistics of the unpruned model"
        )
    if scope not in ("layer", "model"):
        raise ValueError(f"scope: expected layer or model, got {scope!r}")
    if normalise is not None and (scope == "layer" or normalise not in NORMALISATIONS):
        expected = f"one of {', '.join(NORMALISATIONS)}" if scope == "model" else "none with scope 'layer'"
        raise ValueError(f"normalise: expected {expected}, got {normalise!r}")
    if keep is not None and not isinstance(keep, int):
        raise ValueError(f"keep: expected a whole number, got {keep!r}")
    made_by: dict[str, Any] = {"criterion": scores.criterion, "dataset": scores.dataset}
    asked: float
    if keep is not None and ratio is None:
        name, asked, kept = "keep", keep, keep * (layers if scope == "model" else 1)
    elif ratio is not None and keep is None:
        whole = experts * layers if scope == "model" else experts // scores.groups
        name, asked, kept = "ratio", ratio, kept_after_removing(ratio, whole)
        kept *= 1 if scope == "model" else scores.groups
    else:
        raise ValueError(f"keep: expected exactly one of keep and ratio, got keep={keep!r} and ratio={ratio!r}")
    made_by[name] = asked
    fewest = scores.fewest
    floor, all_of_them = (fewest * layers, experts * layers) if scope == "model" else (fewest, experts)
    if not floor <= kept <= all_of_them:
        raise ValueError(
            f"{name}: {asked!r} keeps {kept} of {all_of_them} experts; expected {floor} to {all_of_them} "
            f"({'top_k' if fewest == scores.top_k else 'what the router needs'} to all)"
        )
    if scope == "layer" and kept % scores.groups:
        raise ValueError(f"{name}: {asked!r} keeps {kept} experts, which {scores.groups} groups do not share equally")
    # Within a layer infinite scores have an order; over layers they leave none to the others.
    useless = scores.values.isnan() if scope == "layer" else ~scores.values.isfinite()
    if useless.any():
        layer, expert = useless.nonzero()[0].tolist()
        kind = "a NaN" if scores.values[layer, expert].isnan() else "an infinite"
        raise ValueError(f"scores: layer {shown(scores.layers[layer])} has {kind} score for expert {expert}")
    values = scores.values
    if scope == "model":
        normalise = normalise or "sum"
        made_by |= {"scope": "model", "normalise": normalise}
        values = _normalised(values, normalise)

    def kept_beside(protected: Tensor) -> tuple[tuple[int, ...], ...]:
        if scope == "model":
            removed = _removed_from_all(values, protected, scores.groups, all_of_them - kept, fewest)
        else:
            removed = [(experts - kept) // scores.groups] * layers
        rows = zip(values, protected, removed, strict=True)
        return tuple(_kept_in_layer(row, super_ones, scores.groups, count) for row, super_ones, count in rows)

    nobody = torch.zeros(layers, experts, dtype=torch.bool)
    keeps = kept_beside(nobody)
    if gone := [each for each in scores.super_experts if each.expert not in keeps[each.layer]]:
        what = "removed" if allow_super else "kept"
        if not allow_super:
            protected = nobody.clone()
            for each in scores.super_experts:
                protected[each.layer, each.expert] = True
            keeps = kept_beside(protected)
            if still := [each for each in scores.super_experts if each.expert not in keeps[each.layer]]:
                raise ValueError(f"{name}: {asked!r} leaves no place for {named(still)}; keep more, or {_LET_THEM_GO}")
        made_by |= {f"super_experts_{what}": [[each.name, each.expert] for each in gone]}
        warnings.warn(
            f"by the scores would go, and are {what}: {named(gone)}{'' if allow_super else f'; {_LET_THEM_GO}'}",
            stacklevel=2,
        )
    return PruningPlan.of(scores.layout, keeps, {**made_by, "moe_ext": __version__})


_LET_THEM_GO = "allow_super=True (--allow-super) lets them go"
NORMALISATIONS = ("sum", "max", "none")


def _normalised(values: Tensor, normalise: str) -> Tensor:
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


def _kept_in_layer(row: Tensor, protected: Tensor, groups: int, removed: int) -> tuple[int, ...]:
    """What is left of a layer with scores (E,) once every group has lost its ``removed`` lowest."""
    return tuple(sorted(_worst_first(row, protected, groups)[:, removed:].flatten().tolist()))


def _removed_from_all(values: Tensor, protected: Tensor, groups: int, wanted: int, fewest: int) -> list[int]:
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


def kept_after_removing(ratio: float, experts: int) -> int:
    """Experts left when ``floor(ratio * experts + 0.5)`` are removed; ValueError unless the ratio is in [0, 1)."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a share in [0, 1), got {ratio!r}")
    return experts - math.floor(ratio * experts + 0.5)
