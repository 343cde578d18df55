"""Heat maps of expert scores: layers by experts, one panel a criterion, what a plan removes crossed out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_ext.decision.criteria import Scores
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.report.canvas import empty_figure
from moe_ext.storage.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_CELL_INCHES = 0.22
_LARGEST_PANEL_INCHES = (12.0, 14.0)  # width, height
_DOTS_PER_INCH = 150


def heat_maps(
    scores: Mapping[str, Scores], path: str | os.PathLike[str], *, plans: Mapping[str, PruningPlan] | None = None
) -> None:
    """Write the picture of :func:`heat_map_figure` as a PNG file, whole or not at all.

    Args:
        scores: panel title to the scores it shows, as for :func:`heat_map_figure`.
        path: the destination, ``*.png``.
        plans: panel title to the plan whose removed experts it marks.

    Raises:
        ImportError: matplotlib is missing; says what to install.
        ValueError: ``path`` does not end in ``.png``, or as :func:`heat_map_figure`.
        OSError: the file cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path: expected a name that ends in .png, got {os.fspath(path)!r}")
    figure = heat_map_figure(scores, plans=plans)
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH)


def heat_map_figure(scores: Mapping[str, Scores], *, plans: Mapping[str, PruningPlan] | None = None) -> Figure:
    """Scores as shades, criteria side by side, removed experts marked with a cross.

    Scores compare within a layer only, and grow with depth for most criteria: each is therefore shown relative to the
    largest of its layer, on one scale from 0 to 1 for all panels.

    Args:
        scores: panel title to the scores it shows; panels stand in this order.
        plans: panel title to the plan whose removed experts it marks; titles without a plan get no crosses.

    Returns:
        A matplotlib figure outside pyplot: nothing to close.

    Raises:
        ImportError: matplotlib is missing; says what to install.
        ValueError: no scores, a plan without its panel, a plan for other layers or another number of experts, or a
            score that is negative, infinite or NaN.
    """
    plans = plans or {}
    _check(scores, plans)
    rows = max(panel.values.shape[0] for panel in scores.values())
    columns = max(panel.values.shape[1] for panel in scores.values())
    width, height = (
        min(max(2.0, _CELL_INCHES * cells), largest)
        for cells, largest in zip((columns, rows), _LARGEST_PANEL_INCHES, strict=True)
    )
    figure = empty_figure(len(scores) * width + 1.5, height + 1.2)
    row_of_axes = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, (title, panel) in zip(row_of_axes, scores.items(), strict=True):
        image = _draw(axes, title, panel)
        if title in plans:
            _cross_out(axes, plans[title], marker_points=72 * min(width / columns, height / rows) / 2)
    row_of_axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=row_of_axes.tolist(), label="score relative to the layer's largest", fraction=0.05)
    return figure


def _check(scores: Mapping[str, Scores], plans: Mapping[str, PruningPlan]) -> None:
    if not scores:
        raise ValueError("scores: expected one or more criteria, got none")
    for title, panel in scores.items():
        if not (panel.values.isfinite() & (panel.values >= 0)).all():
            raise ValueError(f"scores: {title!r} holds a score that is negative, infinite or NaN")
    for title, plan in plans.items():
        if title not in scores:
            raise ValueError(f"plans: {title!r} has no scores to be drawn on; there are {', '.join(scores)}")
        if plan.layers != scores[title].layers or plan.num_experts != scores[title].values.shape[1]:
            raise ValueError(f"plans: {title!r} is for other layers or another number of experts than its scores")


def _draw(axes: Axes, title: str, scores: Scores) -> AxesImage:
    from matplotlib.ticker import MaxNLocator

    largest = scores.values.amax(dim=1, keepdim=True)
    relative = torch.where(largest == 0, 0.0, scores.values / largest)
    image = axes.imshow(relative.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("expert")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return image


def _cross_out(axes: Axes, plan: PruningPlan, marker_points: float) -> None:
    cells = [(expert, layer) for layer in range(len(plan.layers)) for expert in plan.removed(layer)]
    experts, layers = zip(*cells, strict=True) if cells else ((), ())
    axes.plot(experts, layers, linestyle="none", marker="x", color="tab:red", markersize=marker_points)
