"""From scores to a plan: the best experts of every layer, or of the whole model together."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from moe_ext.decision.criteria import Scores
from moe_ext.decision.pair_subsets import is_exact
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.decision.ranking import (
    NORMALISATIONS,
    kept_beside_least,
    kept_in_layer,
    normalised,
    removed_from_all,
)
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
    ``scope="model"`` a number that whole steps do not make up is rounded down). With ``"hope"`` the set of a layer's
    experts goes that costs least together: exact up to ``pair_subsets.MOST_SETS`` sets, beyond that by a greedy walk
    with swaps; ``made_by["exact"]`` says which.

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
            differ in their number of experts already, an unknown scope or normalisation, ``"hope"`` with
            ``scope="model"``, as its costs are a layer's own, or a score that is NaN, or infinite in one ranking of all
            layers (the layer and expert are named).
    """
    layers, experts = scores.values.shape
    if len(set(scores.experts)) > 1:
        raise ValueError(
            f"scores: the layers have {min(scores.experts)} to {max(scores.experts)} experts; "
            "plan from statistics of the unpruned model"
        )
    if scope not in ("layer", "model"):
        raise ValueError(f"scope: expected layer or model, got {scope!r}")
    if scores.pairs is not None and scope == "model":
        raise ValueError(f"scope: {scores.criterion!r} compares sets within a layer; expected layer, got 'model'")
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
    table = scores.values if scores.pairs is None else scores.pairs.abs().sum(2)
    useless = table.isnan() if scope == "layer" else ~table.isfinite()
    if useless.any():
        layer, expert = useless.nonzero()[0].tolist()
        kind = "a NaN" if table[layer, expert].isnan() else "an infinite"
        raise ValueError(f"scores: layer {shown(scores.layers[layer])} has {kind} score for expert {expert}")
    values, lost = scores.values, (experts - kept) // scores.groups  # of a group, with scope "layer"
    if scope == "model":
        normalise = normalise or "sum"
        made_by |= {"scope": "model", "normalise": normalise}
        values = normalised(values, normalise)

    def kept_beside(protected: Tensor) -> tuple[tuple[int, ...], ...]:
        if scores.pairs is not None:
            matrices = zip(scores.pairs, protected, strict=True)
            return tuple(kept_beside_least(*each, scores.groups, lost) for each in matrices)
        if scope == "model":
            removed = removed_from_all(values, protected, scores.groups, all_of_them - kept, fewest)
        else:
            removed = [lost] * layers
        rows = zip(values, protected, removed, strict=True)
        return tuple(kept_in_layer(row, super_ones, scores.groups, count) for row, super_ones, count in rows)

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
    if scores.pairs is not None:
        made_by["exact"] = is_exact(nobody[0], scores.groups, lost)
    return PruningPlan.of(scores.layout, keeps, {**made_by, "moe_ext": __version__})


_LET_THEM_GO = "allow_super=True (--allow-super) lets them go"


def kept_after_removing(ratio: float, experts: int) -> int:
    """Experts left when ``floor(ratio * experts + 0.5)`` are removed; ValueError unless the ratio is in [0, 1)."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a share in [0, 1), got {ratio!r}")
    return experts - math.floor(ratio * experts + 0.5)
