"""Super experts in a search: kept, or named as they go."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.super_experts import SuperExpert, named, super_experts
from moe_ext.models.layout import Layout
from moe_ext.reconstruction.budgets import allowed_sizes
from moe_ext.reconstruction.result import SearchResult


@dataclass(frozen=True)
class Outliers:
    """The super experts that statistics show (arXiv 2507.23279); none without statistics.

    Attributes:
        layout: of the statistics; None without them.
        allowed: whether they may go as others do.
    """

    experts: tuple[SuperExpert, ...]
    layout: Layout | None
    allowed: bool

    @classmethod
    def of(cls, statistics: ExpertStatistics | None, allowed: bool) -> Outliers:
        """What some statistics show."""
        if statistics is None:
            return cls((), None, allowed)
        return cls(super_experts(statistics), statistics.layout, allowed)

    def protected(self, layout: Layout, counts: Sequence[int]) -> list[list[int]]:
        """By layer, the experts that no subset may drop.

        Args:
            layout: of the model.
            counts: experts that every layer keeps, before a model's budget is shared out.

        Raises:
            ValueError: the statistics are of another model, or a layer keeps fewer than it has of them.
        """
        if self.layout is not None and (different := self.layout.difference(layout)) is not None:
            raise ValueError(f"statistics: of another model: {different}")
        stay: list[list[int]] = [[] for _ in layout.layers]
        for each in () if self.allowed else self.experts:
            stay[each.layer].append(each.expert)
        for layer, count in enumerate(counts):
            if count not in allowed_sizes(layout, stay[layer]):
                here = [each for each in self.experts if each.layer == layer]
                raise ValueError(f"keep: {count} leaves no place for {named(here)}; keep more, or allow_super=True")
        return stay

    def as_json(self) -> dict[str, Any]:
        """What decides the result, for plans and files of unfinished searches; nothing if there are none to keep."""
        if self.allowed or not self.experts:
            return {}
        return {"super_experts_kept": [[each.name, each.expert] for each in self.experts]}

    def warn(self, result: SearchResult) -> None:
        """Names those that go, or that the losses alone would let go as far as they were evaluated."""
        gone = []
        for each in self.experts:
            kept, losses = result.plan.keep[each.layer], result.losses[each.layer]
            best = kept if self.allowed else losses.best(len(kept))[0]
            if each.expert not in best:
                gone.append(each)
        if gone:
            instead = "removed" if self.allowed else "kept"
            hint = "" if self.allowed else "; allow_super=True (--allow-super) lets them go"
            warnings.warn(f"by the losses would go, and are {instead}: {named(gone)}{hint}", stacklevel=4)
