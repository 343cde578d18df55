"""Scores: how much each expert matters, computed from statistics.

Most criteria are a point ``(avg, a, b)`` of the unified family of arXiv 2606.15716,
``S_e(avg, a, b) = M_e[a, b] / n_e^avg``: routing frequency, gate weight and activation strength, each in or out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.super_experts import SuperExpert, super_experts
from moe_ext.models.layout import Layout, WithLayout
from moe_ext.storage.formats import check_label

CRITERIA: dict[str, tuple[int, int, int]] = {
    "frequency": (0, 0, 0),
    "seer": (0, 1, 0),
    "ean": (0, 0, 1),
    "reap": (1, 1, 1),
    "man": (1, 0, 1),
    "msan": (1, 0, 2),
    "weighted_ean": (0, 1, 1),
    "weighted_squared_ean": (0, 2, 2),
}
"""Named points ``(avg, a, b)`` of the family."""

OUTSIDE = ("hope", "mone", "aimer", "random")
"""Criteria outside the family: pairs of experts, output variance, weights only, and the control."""

OBJECTIVES: dict[str, str] = {"task-agnostic": "man", "task-specific": "weighted_ean"}
"""Default criterion of an objective: averaged and gate-free for any task, frequency and gate kept for a given one
(the selection principle of arXiv 2606.15716)."""


@dataclass(frozen=True, eq=False)
class Scores(WithLayout):
    """Importance of every expert; within a layer the lowest is removed first.

    Attributes:
        values: (L, E) float64.
        criterion: its name, ``"S(avg,a,b)"`` for an unnamed point, or ``"random(seed=n)"``.
        layout: the model's layers, experts and K; its fields are attributes here, too. Values beyond a layer's number
            of experts mean nothing.
        dataset: label of the calibration text.
        super_experts: those that :func:`super_experts` finds, which plans keep; none where scores are of no statistics.
        pairs: (L, E, E) float64 for a criterion by which experts cost together: a plan then removes the set p of a
            layer with the least ``p^T pairs p``, and ``values`` is the diagonal, what each costs alone. None: experts
            go by ``values``.
    """

    values: torch.Tensor
    criterion: str
    layout: Layout
    dataset: str
    super_experts: tuple[SuperExpert, ...] = ()
    pairs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[0] != len(self.layers) or self.values.dtype != torch.float64:
            raise ValueError(
                f"values: is {self.values.dtype} of shape {tuple(self.values.shape)}; "
                f"expected torch.float64 of shape ({len(self.layers)}, E)"
            )
        square = (*self.values.shape, self.values.shape[1])
        if self.pairs is not None and (tuple(self.pairs.shape) != square or self.pairs.dtype != torch.float64):
            raise ValueError(
                f"pairs: is {self.pairs.dtype} of shape {tuple(self.pairs.shape)}; "
                f"expected torch.float64 of shape {square}"
            )
        check_label("criterion", self.criterion)
        check_label("dataset", self.dataset)


def score(
    stats: ExpertStatistics,
    criterion: str | tuple[int, int, int] | None = None,
    *,
    objective: str | None = None,
    seed: int | None = None,
) -> Scores:
    """Score every expert with one criterion.

    ``S_e(avg, a, b) = M_e[a, b] / n_e^avg`` (arXiv 2606.15716). An expert that no token reached scores 0.

    Args:
        stats: statistics of the calibration text.
        criterion: a name in ``CRITERIA``; a point ``(avg, a, b)`` with avg in {0, 1} and a, b in {0, 1, 2};
            ``"hope"``, by which a plan removes the set whose pairs cost least together (arXiv 2609.18916);
            ``"mone"``, access frequency times output variance (arXiv 2507.00390), of statistics with an
            ``output_sum``; or ``"random"``: uniform in [0, 1). ``"aimer"`` needs no statistics: see :func:`aimer`.
        objective: a name in ``OBJECTIVES``, which chooses the criterion; ``"task-agnostic"`` when neither is given.
        seed: for ``"random"`` only, 0 when not given.

    Returns:
        Scores with (L, E) float64 values, and the model's super experts by name.

    Raises:
        ValueError: both criterion and objective, an unknown one, a point outside the family, ``"mone"`` of statistics
            without an ``output_sum``, ``"hope"`` of statistics without ``output_pairs``, or a seed for a criterion that
            draws nothing.
    """
    if criterion is not None and objective is not None:
        raise ValueError(f"criterion {criterion!r} and objective {objective!r}: expected one of them, not both")
    if criterion is None:
        criterion = _criterion_for("task-agnostic" if objective is None else objective)
    if criterion == "random":
        seed = 0 if seed is None else seed
        values = torch.rand(
            stats.num_layers, stats.num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        return _scores(stats, values, f"random(seed={seed})")
    if seed is not None:
        raise ValueError(f"seed: only criterion 'random' takes one, got {seed} with {criterion!r}")
    if criterion == "hope":
        if stats.output_pairs is None:
            raise ValueError("criterion 'hope' needs the products of pairs, which these statistics have not: calibrate")
        pairs = stats.output_pairs.clone()
        return replace(_scores(stats, pairs.diagonal(dim1=1, dim2=2).clone(), "hope"), pairs=pairs)
    if criterion == "mone":
        return _scores(stats, _frequency_times_variance(stats), "mone")
    average, gate_power, norm_power = point_of(criterion)
    values = stats.moments[:, :, gate_power, norm_power]
    if average:
        counts = stats.routing_counts()
        values = torch.where(counts == 0, 0.0, values / counts)
    name = criterion if isinstance(criterion, str) else f"S({average},{gate_power},{norm_power})"
    return _scores(stats, values.clone(), name)


def _frequency_times_variance(stats: ExpertStatistics) -> torch.Tensor:
    """(L, E) ``n_e / T * || sqrt(Var f_e) ||_2``: the unbiased variance of every output dimension over routed tokens,
    whose sum over dimensions is ``(sum ||f_e||^2 - ||sum f_e||^2 / n_e) / (n_e - 1)``; 0 below two tokens."""
    if stats.output_sum is None:
        raise ValueError("criterion 'mone' needs the sums of outputs: calibrate(..., outputs=True)")
    counts = stats.routing_counts()
    about_mean = stats.moments[:, :, 0, 2] - stats.output_sum.square().sum(-1) / counts.clamp(min=1)
    variance = about_mean.clamp(min=0) / (counts - 1).clamp(min=1)
    return torch.where(counts < 2, 0.0, counts / stats.tokens[:, None] * variance.sqrt())


def _criterion_for(objective: str) -> str:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    return OBJECTIVES[objective]


_TRIPLE = re.compile(r"S\((\d), ?(\d), ?(\d)\)")


def point_of(criterion: str | tuple[int, int, int]) -> tuple[int, int, int]:
    """(avg, a, b) of a criterion's name, of its spelling ``"S(avg,a,b)"``, or of the triple itself.

    Raises:
        ValueError: no such criterion.
    """
    if isinstance(criterion, str):
        if criterion in CRITERIA:
            return CRITERIA[criterion]
        if (triple := _TRIPLE.fullmatch(criterion)) is None:
            names = ", ".join((*CRITERIA, *OUTSIDE))
            hint = "; aimer scores a model, not statistics: moe_ext.aimer(model)" if criterion == "aimer" else ""
            raise ValueError(f"criterion: expected one of {names}, or a triple S(avg,a,b), got {criterion!r}{hint}")
        criterion = (int(triple[1]), int(triple[2]), int(triple[3]))
    if len(criterion) != 3 or criterion[0] not in (0, 1) or not {*criterion[1:]} <= {0, 1, 2}:
        raise ValueError(f"criterion: expected (avg, a, b) with avg in 0..1 and a, b in 0..2, got {criterion!r}")
    return criterion


def _scores(stats: ExpertStatistics, values: torch.Tensor, criterion: str) -> Scores:
    return Scores(values, criterion, stats.layout, stats.dataset, super_experts(stats))
