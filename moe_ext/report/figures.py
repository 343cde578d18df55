"""The report's figures beside the heat maps of scores. Each function returns a matplotlib figure outside pyplot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.evaluation.results import Variant
from moe_ext.reconstruction.result import SearchResult
from moe_ext.report.canvas import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Indices, in order of cost, of the points (cost, loss) that no other point beats in one without losing in the
    other; both are better when lower. Of equal points the first."""
    best: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (*points[index], index)):
        if not best or points[index][1] < points[best[-1]][1]:
            best.append(index)
    return best


_WIDTH_INCHES = 4.0  # what a phone shows without making the letters small
_CURVE_POINTS = 200
_BARS = 64  # ratio_histogram has 1024 bins: more than a picture shows


def load_figure(load: Tensor) -> Figure:
    """Layers by experts as shades.

    Args:
        load: (L, E) shares of a layer's slots, times the layer's number of experts: 1 is an even load; NaN: no expert.
    """
    figure = _figure(height=1.4 + min(0.22 * load.shape[0], 8.0))
    axes = figure.subplots()
    largest = max(1.0, float(load.nan_to_num().max()))
    image = axes.imshow(load.numpy(), cmap="Blues", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    _whole_numbers(axes)
    figure.colorbar(image, ax=axes, label="load (1: even)", fraction=0.06)
    return figure


def coactivation_figure(shares: Tensor) -> Figure:
    """One small panel a layer: experts by experts, the share of the tokens of either that went to both.

    Args:
        shares: (L, E, E) in [0, 1], from :func:`moe_ext.decision.redundancy.overlap`.
    """
    figure, panels = _small_multiples(len(shares), panel_height=1.2)
    largest = max(float(shares.max()), 1e-9)
    for layer, (axes, matrix) in enumerate(zip(panels, shares, strict=True)):
        image = axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=largest, interpolation="nearest")
        axes.set_title(str(layer), fontsize="small")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(image, ax=panels, label="share of tokens in common", fraction=0.05)
    return figure


def agreement_figure(names: Sequence[str], agreement: Tensor) -> Figure:
    """Criteria by criteria, the number in every cell.

    Args:
        names: C criteria.
        agreement: (C, C) in [-1, 1] or NaN, from :func:`moe_ext.decision.agreement.rank_agreement`.
    """
    figure = _figure(height=1.2 + 0.32 * len(names))
    axes = figure.subplots()
    axes.imshow(agreement.numpy(), cmap="RdBu", vmin=-1.4, vmax=1.4, aspect="auto", interpolation="nearest")
    for row, values in enumerate(agreement.tolist()):
        for column, value in enumerate(values):
            text = "-" if math.isnan(value) else f"{value:.2f}"
            # On the shades, which are the same in light and dark mode, so that the letters are, too.
            axes.text(column, row, text, ha="center", va="center", fontsize="x-small", color="black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    return figure


def ratio_figure(stats: ExpertStatistics, thresholds: Tensor) -> Figure:
    """One small panel a layer: how often ``w_j / w_1`` falls where, and the threshold of rank 2.

    Args:
        thresholds: (L, K - 1), from :func:`moe_ext.skip_thresholds`.
    """
    figure, panels = _small_multiples(stats.num_layers, panel_height=0.9)
    for layer, axes in enumerate(panels):
        bars = ratio_bars(stats, layer)
        axes.stairs(bars, [index / len(bars) for index in range(len(bars) + 1)], fill=True, color="tab:blue")
        axes.axvline(float(thresholds[layer, 0]), color="tab:red", linewidth=1)
        axes.set_title(str(layer), fontsize="small")
        axes.set_xlim(0, 1)
        axes.set_ylim(0)
        axes.set_xticks([0, 1])
        axes.set_yticks([])
    figure.supxlabel("gate ratio w_j / w_1; red: the median of rank 2", fontsize="medium")
    return figure


def ratio_bars(stats: ExpertStatistics, layer: int) -> list[float]:
    """Share of a layer's slots of rank 2 and weaker in each of ``_BARS`` equal parts of the ratio's range."""
    counts = stats.ratio_histogram[layer].double().sum(0).view(_BARS, -1).sum(1)
    return (counts / counts.sum().clamp(min=1)).tolist()


def losses_figure(search: SearchResult) -> Figure:
    """One curve a layer: the losses of all evaluated subsets of the plan's size, lowest first, over the lowest."""
    figure = _figure(height=3.0)
    axes = figure.subplots()
    curves = []
    for losses in loss_curves(search):
        at = [index / max(1, len(losses) - 1) for index in range(len(losses))]
        step = max(1, len(losses) // _CURVE_POINTS)
        curves.append((at[::step], losses[::step]))
    _a_line_a_layer(figure, axes, curves)
    axes.set_xlabel("subsets of the plan's size, best to worst")
    axes.set_ylabel("loss over the lowest")
    return figure


def channels_figure(curves: Tensor, width: int | None) -> Figure:
    """One curve a layer: the share of the channels' errors that the best channels of every expert hold.

    Args:
        curves: (L, I + 1) from :func:`channel_curves`; NaN: a layer without tokens.
        width: channels to mark, of I; None: none.
    """
    figure = _figure(height=3.0)
    axes = figure.subplots()
    channels = curves.shape[1] - 1
    kept = sorted({*range(0, channels, max(1, channels // _CURVE_POINTS)), channels})
    at = [count / channels for count in kept]
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1)
    if width is not None:
        axes.axvline(width / channels, color="tab:red", linewidth=1)
    _a_line_a_layer(figure, axes, [(at, row) for row in curves[:, kept].tolist()])
    axes.set_xlabel("channels of an expert, best to worst")
    axes.set_ylabel("share of the errors")
    axes.yaxis.set_major_formatter("{x:.0%}")
    return figure


def channel_curves(errors: Tensor) -> Tensor:
    """What the best channels of every expert hold of a layer's errors.

    Args:
        errors: (L, E, I) float64.

    Returns:
        (L, I + 1) float64, ascending from 0 to 1; ``[l, n]``: with n channels of every expert. NaN without errors.
    """
    best = errors.sort(dim=2, descending=True).values.sum(1).cumsum(1)
    return torch.cat([torch.zeros_like(best[:, :1]), best], dim=1) / best[:, -1:]


def _a_line_a_layer(figure: Figure, axes: Axes, curves: Sequence[tuple[list[float], list[float]]]) -> None:
    """Curves in shades that follow the layers, and a key to these; shares on the horizontal axis."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # Neither the darkest nor the lightest shades: the page may be dark or light.
    shades = ListedColormap(matplotlib.colormaps["plasma"]([0.3 + 0.45 * step / 255 for step in range(256)]))
    layers = len(curves)
    for layer, (at, heights) in enumerate(curves):
        axes.plot(at, heights, color=shades(layer / max(1, layers - 1)), label=str(layer))
    axes.xaxis.set_major_formatter("{x:.0%}")
    if layers <= 12:
        axes.legend(title="layer", fontsize="small", ncols=2)
    else:
        figure.colorbar(ScalarMappable(Normalize(0, layers - 1), shades), ax=axes, label="layer")


def loss_curves(search: SearchResult) -> list[list[float]]:
    """For every layer the losses of the evaluated subsets of the plan's size over the lowest, ascending; 1 for a layer
    that loses nothing by any subset."""
    curves = []
    for layer, kept in zip(search.losses, search.plan.keep, strict=True):
        losses = layer.losses[layer.keep.sum(1) == len(kept)].sort().values
        lowest = float(losses[0])
        curves.append((losses / lowest).tolist() if lowest > 0 else [1.0] * len(losses))
    return curves


def pareto_figure(variants: Sequence[Variant], costs: Sequence[float], label: str, *, higher_is_better: bool) -> Figure:
    """Perplexity against a cost or a speed; a line joins the variants that no other beats in both.

    Args:
        costs: one number a variant.
        label: of the costs' axis.
        higher_is_better: of the costs: True for a speed.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = _figure(height=3.0)
    axes = figure.subplots()
    points = [
        (-cost if higher_is_better else cost, each.perplexity) for cost, each in zip(costs, variants, strict=True)
    ]
    best = pareto(points)
    axes.plot([costs[index] for index in best], [variants[index].perplexity for index in best], color="tab:blue")
    others = [index for index in range(len(variants)) if index not in best]
    axes.plot([costs[i] for i in others], [variants[i].perplexity for i in others], "o", color="gray", markersize=4)
    axes.plot([costs[i] for i in best], [variants[i].perplexity for i in best], "o", color="tab:blue")
    for place, index in enumerate(best):
        above = place % 2 == 0  # neighbours on the line may lie close together
        axes.annotate(
            variants[index].name,
            (costs[index], variants[index].perplexity),
            xytext=(0, 5 if above else -11),
            textcoords="offset points",
            fontsize="small",
            parse_math=False,
            ha="left" if costs[index] <= (min(costs) + max(costs)) / 2 else "right",
        )
    axes.margins(0.1, 0.12)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity, geometric mean")
    return figure


def _figure(height: float) -> Figure:
    return empty_figure(_WIDTH_INCHES, height)


def _small_multiples(count: int, panel_height: float) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels, at most four a row."""
    columns = min(4, math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    figure = _figure(height=0.8 + panel_height * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def load_of(stats: ExpertStatistics) -> Tensor:
    """(L, E) float64: a layer's slots that went to each expert over an even share of them; NaN beyond the layer's
    number of experts, 0 for a layer without tokens."""
    counts = stats.routing_counts()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    load = shares * torch.tensor(stats.experts)[:, None]
    for layer, experts in enumerate(stats.experts):
        load[layer, experts:] = torch.nan
    return load
