"""What the report's slider shows: thresholds, and the share of slots that they skip."""

from __future__ import annotations

import json
from typing import Any

import torch

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.thresholds import skip_thresholds
from moe_ext.report.figures import ratio_bars

_STEPS = 100  # of the slider


def slider(stats: ExpertStatistics) -> dict[str, Any]:
    """What the page's slider shows: every layer's name, outline of the ratios in a 100 x 40 box and median of rank 2;
    and what each step does to the layers, for both meanings of the slider: the same quantile, or the same threshold, in
    every layer."""
    layers = []
    medians = skip_thresholds(stats)[:, 0].tolist()
    for layer, name in enumerate(stats.layers):
        bars = ratio_bars(stats, layer)
        highest = max(bars)
        width = 100 / len(bars)
        steps = "".join(
            f"L{index * width:.2f} {40 - 38 * bar / highest:.2f}H{(index + 1) * width:.2f}"
            for index, bar in enumerate(bars)
        )
        layers.append({"name": name, "outline": f"M0 40{steps}V40Z", "median": medians[layer]})
    shares = [step / _STEPS for step in range(_STEPS + 1)]
    quantiles = torch.stack([skip_thresholds(stats, share) for share in shares], dim=-1).double()  # (L, K - 1, steps)
    equal = torch.tensor(shares, dtype=torch.float64).expand(quantiles.shape)
    return {
        "layers": layers,
        "steps": _STEPS,
        "start": _STEPS // 2,
        "settings": {
            "quantile": {"start": _STEPS // 2, **_effects(stats, quantiles)},
            "threshold": {"start": round(_STEPS * sum(medians) / len(medians)), **_effects(stats, equal)},
        },
        "json": json.dumps,
    }


def _effects(stats: ExpertStatistics, thresholds: torch.Tensor) -> dict[str, Any]:
    """By step: every layer's thresholds of the last and of the second rank, the share of its slots that they skip, and
    that of all layers' slots.

    Args:
        thresholds: (L, K - 1, steps) float64.
    """
    rates = _skip_rates(stats, thresholds)
    weights = stats.tokens.double() / stats.tokens.double().sum().clamp(min=1)

    def rounded(rows: torch.Tensor) -> list[list[float]]:
        return [[round(value, 4) for value in row] for row in rows.tolist()]

    return {
        "low": rounded(thresholds[:, -1]),
        "high": rounded(thresholds[:, 0]),
        "rates": rounded(rates),
        "all": rounded((rates * weights[:, None]).sum(0, keepdim=True))[0],
    }


def _skip_rates(stats: ExpertStatistics, thresholds: torch.Tensor) -> torch.Tensor:
    """(L, steps) float64: the share of a layer's slots that thresholds (L, K - 1, steps) skip, linear within a bin of
    the histogram."""
    counts = stats.ratio_histogram.double()  # (L, K - 1, bins)
    bins = counts.shape[-1]
    upto = counts.cumsum(-1) - counts
    at = thresholds * bins
    below = at.long().clamp(max=bins - 1)
    skipped = (upto.gather(-1, below) + (at - below) * counts.gather(-1, below)).sum(1)
    return skipped / (stats.tokens.double()[:, None] * stats.top_k).clamp(min=1)
