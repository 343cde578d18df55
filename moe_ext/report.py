"""The report: what statistics, a search and evaluations say about a model's experts, as one HTML page or as PNG files.

The page needs nothing but itself: figures are inline SVG in the page's own colours, light or dark, every figure has a
text alternative, and a content security policy keeps it from loading anything. Figures are drawn by matplotlib, the
page is a jinja2 template; ``pip install 'moe_ext[report]'`` brings both.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_ext.agreement import rank_agreement
from moe_ext.canvas import need
from moe_ext.criteria import CRITERIA, Scores, score
from moe_ext.figures import (
    agreement_figure,
    coactivation_figure,
    load_figure,
    load_of,
    loss_curves,
    losses_figure,
    pareto_figure,
    ratio_bars,
    ratio_figure,
)
from moe_ext.files import replace_file, replace_folder
from moe_ext.heat_maps import heat_map_figure
from moe_ext.plan import PruningPlan, plan
from moe_ext.redundancy import overlap, redundant_pairs
from moe_ext.routing import skip_thresholds
from moe_ext.search_result import SearchResult
from moe_ext.statistics import ExpertStatistics
from moe_ext.variants import Variant
from moe_ext.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Drawn in this colour, replaced by the page's text colour.
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moe_ext",  # the same page from the same input
    "font.size": 9.0,
    **dict.fromkeys(
        ["text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"], _INK
    ),
    "legend.framealpha": 0.0,
}
_STEPS = 100  # of the slider


@dataclass(frozen=True)
class Picture:
    """A figure and what stands for it where it cannot be seen.

    Attributes:
        name: of its file, without suffix.
        title: a few words.
        caption: what it shows and how to read it.
        description: the text alternative: what there is to see.
        draw: makes the figure.
        header, rows: its numbers as a table; empty: none.
    """

    name: str
    title: str
    caption: str
    description: str
    draw: Callable[[], Figure]
    header: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and pictures."""

    title: str
    text: str
    pictures: list[Picture]


@dataclass(frozen=True, eq=False)
class Report:
    """What is in a report.

    Attributes:
        stats: statistics of the calibration text.
        removals: the plan that is marked in every criterion's heat map, or None to mark what the criterion itself
            removes at ``keep`` experts a layer.
        keep: experts that every layer keeps where ``removals`` is None; None: those of the search's plan if there is
            one and its layers keep the same number, else three quarters.
        search: a reconstruction search of the same model, or None.
        variants: evaluated variants of the model.

    Raises:
        ValueError: a plan or search for other layers, a ``keep`` that the layers cannot have, variants whose speeds
            have different units, or a perplexity that is not a finite positive number.
    """

    stats: ExpertStatistics
    removals: PruningPlan | None = None
    keep: int | None = None
    search: SearchResult | None = None
    variants: Sequence[Variant] = ()

    def __post_init__(self) -> None:
        for name, made in (("removals", self.removals), ("search", self.search and self.search.plan)):
            if made and (made.layers != self.stats.layers or made.num_experts != self.stats.num_experts):
                raise ValueError(f"{name}: is for other layers or another number of experts than the statistics")
        for each in self.variants:
            if not 0 < each.perplexity < float("inf"):
                raise ValueError(f"variants: {each.name!r} has perplexity {each.perplexity}; a finite one is needed")
        if len({each.speed_unit for each in self.variants if each.speed is not None}) > 1:
            raise ValueError("variants: speeds in tokens/s and relative ones do not compare; give files of one kind")
        self.plans()

    def scores(self) -> dict[str, Scores]:
        """Every criterion that the statistics hold the sums for."""
        names = [*CRITERIA, *(["mone"] if self.stats.output_sum is not None else [])]
        return {name: score(self.stats, name) for name in names}

    def plans(self) -> dict[str, PruningPlan]:
        """The removals to mark, by criterion."""
        if self.removals is not None:
            return dict.fromkeys(self.scores(), self.removals)
        if len(set(self.stats.experts)) > 1:
            return {}  # pruned already
        keep = self.keep if self.keep is not None else self._usual_keep()
        return {name: plan(scores, keep=keep) for name, scores in self.scores().items()}

    def _usual_keep(self) -> int:
        searched = {len(kept) for kept in self.search.plan.keep} if self.search else set()
        if len(searched) == 1:
            return searched.pop()
        experts, groups = self.stats.num_experts, self.stats.groups
        return max(self.stats.fewest, experts - experts // (4 * groups) * groups)

    def sections(self) -> list[Section]:
        """All that can be shown, in order."""
        sections = [_routing(self.stats), self._criteria()]
        if self.stats.top_k > 1 and bool((self.stats.ratio_histogram.sum(-1) > 0).all()):
            sections.append(_skipping(self.stats))
        if self.search is not None:
            sections.append(_search(self.search))
        if self.variants:
            sections.append(_variants(self.variants))
        return [section for section in sections if section.pictures]

    def _criteria(self) -> Section:
        scores, plans = self.scores(), self.plans()
        pictures = [_heat_map(name, panel, plans.get(name)) for name, panel in scores.items()]
        agreement = rank_agreement(list(scores.values()))
        names = list(scores)
        flat = [(agreement[i, j].item(), names[i], names[j]) for i in range(len(names)) for j in range(i)]
        known = [entry for entry in flat if entry[0] == entry[0]]
        seen = "No layer has scores that differ."
        if known:
            (low, one, two), (high, three, four) = min(known), max(known)
            seen = f"Most alike: {three} and {four}, {high:.2f}. Least alike: {one} and {two}, {low:.2f}."
        pictures.append(
            Picture(
                "agreement",
                "Rank agreement",
                "Spearman's correlation of two criteria's order of a layer's experts, mean over the "
                "layers. 1: the same order, 0: unrelated, -1: reversed.",
                seen,
                lambda: agreement_figure(names, agreement),
                ("", *names),
                [
                    (name, *(f"{value:.2f}" for value in row))
                    for name, row in zip(names, agreement.tolist(), strict=True)
                ],
            )
        )
        whose = "the given plan removes" if self.removals is not None else "the criterion itself would remove"
        return Section(
            "What each criterion removes",
            "Shades are scores relative to the largest of their layer; the lowest are removed first. "
            f"Crosses: what {whose}.",
            pictures,
        )


def _routing(stats: ExpertStatistics) -> Section:
    load = load_of(stats)
    rows = []
    for layer, name in enumerate(stats.layers):
        row = load[layer, : stats.experts[layer]]
        rows.append((name, f"{int(row.argmax())} ({row.max():.2f})", f"{int(row.argmin())} ({row.min():.2f})"))
    flat = load.nan_to_num(-1.0)
    layer, expert = divmod(int(flat.argmax()), stats.num_experts)
    pictures = [
        Picture(
            "load",
            "Routing load",
            "The share of a layer's slots that went to an expert, over an even share.",
            f"The largest load is {float(flat.max()):.2f} times an even one: expert {expert} of layer {layer}. "
            f"Unused experts: {int((load == 0).sum())}.",
            lambda: load_figure(load),
            ("layer", "most (load)", "least (load)"),
            rows,
        )
    ]
    if stats.top_k > 1:
        shares, pairs = overlap(stats), redundant_pairs(stats)
        first = max(pairs, key=lambda pair: pair.overlap, default=None)
        seen = "No two experts share a token."
        if first is not None:
            seen = (
                f"Most in common: experts {first.first} and {first.second} of {first.layer}, "
                f"{first.overlap:.0%} of the tokens of either."
            )
        pictures.append(
            Picture(
                "coactivation",
                "Coactivation",
                "Experts by experts, a panel a layer; the share of the tokens of either expert that went to both.",
                seen,
                lambda: coactivation_figure(shares),
                ("layer", "experts", "tokens", "in common", "times chance"),
                [
                    (
                        pair.layer,
                        f"{pair.first}, {pair.second}",
                        f"{pair.together}",
                        f"{pair.overlap:.1%}",
                        f"{pair.lift:.2f}",
                    )
                    for pair in pairs
                ],
            )
        )
    return Section("Where tokens go", "", pictures)


def _heat_map(name: str, scores: Scores, removals: PruningPlan | None) -> Picture:
    rows, seen = [], "Nothing is marked."
    if removals is not None:
        removed = [removals.removed(layer) for layer in range(len(removals.layers))]
        rows = [
            (layer, ", ".join(map(str, gone)) or "none") for layer, gone in zip(removals.layers, removed, strict=True)
        ]
        seen = f"{sum(map(len, removed))} of {sum(scores.experts) or scores.values.numel()} experts are marked."
    return Picture(
        f"scores-{name}",
        name,
        "Scores, layers by experts.",
        seen,
        lambda: heat_map_figure({name: scores}, plans={} if removals is None else {name: removals}),
        ("layer", "removes") if rows else (),
        rows,
    )


def _skipping(stats: ExpertStatistics) -> Section:
    thresholds = skip_thresholds(stats)
    medians = thresholds.mean(1)
    return Section(
        "Skipping a token's weak experts",
        "The gate ratio of a token's expert is its weight over the weight of the token's first expert. An expert whose "
        "ratio lies below its layer's threshold is skipped: below a quantile of the layer's own ratios, by default the "
        "median, or below a threshold that all layers share.",
        [
            Picture(
                "gate-ratios",
                "Gate ratios",
                "How often a ratio occurs, a panel a layer, and the median of rank 2: with it as the threshold half of "
                "the second experts are skipped.",
                f"Median ratios run from {float(medians.min()):.2f} to {float(medians.max()):.2f}.",
                lambda: ratio_figure(stats, thresholds),
                ("layer", "medians by rank"),
                [
                    (name, ", ".join(f"{value:.3f}" for value in row))
                    for name, row in zip(stats.layers, thresholds.tolist(), strict=True)
                ],
            )
        ],
    )


def _search(search: SearchResult) -> Section:
    curves = loss_curves(search)
    rows = []
    for layer, (name, kept, curve, loss) in enumerate(
        zip(search.plan.layers, search.plan.keep, curves, search.layer_losses(), strict=True)
    ):
        removed = ", ".join(map(str, search.plan.removed(layer))) or "none"
        how = "all" if search.losses[layer].is_exact(len(kept)) else "some"
        rows.append((name, removed, f"{loss:.4g}", f"{how} {len(curve)}", f"{curve[len(curve) // 2]:.2f}"))
    widest = max(range(len(curves)), key=lambda layer: curves[layer][-1])
    return Section(
        "Reconstruction search",
        "A subset's loss is how far the layer's output moves when only these experts are kept.",
        [
            Picture(
                "search-losses",
                "Losses by subset",
                "Losses of the evaluated subsets of the plan's size, over the lowest of their layer: the steeper, the "
                "more it matters which experts go.",
                f"The worst subset of layer {widest} loses {curves[widest][-1]:.1f} times as much as the best, "
                "the most of all layers.",
                lambda: losses_figure(search),
                ("layer", "removes", "loss", "evaluated", "median subset"),
                rows,
            )
        ],
    )


def _variants(variants: Sequence[Variant]) -> Section:
    rows = [
        (
            each.name,
            "" if each.weight_bytes is None else f"{each.weight_bytes / 1e6:.1f} MB",
            "" if each.speed is None else f"{each.speed:.2f} {each.speed_unit}",
            f"{each.perplexity:.2f}",
        )
        for each in variants
    ]
    best = min(variants, key=lambda each: each.perplexity)
    header = ("variant", "weights", "speed", "perplexity")
    pictures = []
    if sized := [each for each in variants if each.weight_bytes is not None]:
        sizes = [(each.weight_bytes or 0) / 1e6 for each in sized]
        pictures.append(
            Picture(
                "quality-size",
                "Quality against size",
                "The line joins the variants that no other beats in both.",
                f"{len(sized)} variants from {min(sizes):.1f} to {max(sizes):.1f} MB; {best.name} is the best.",
                lambda: pareto_figure(sized, sizes, "weights in MB", higher_is_better=False),
                header,
                rows,
            )
        )
    if timed := [each for each in variants if each.speed is not None]:
        speeds = [each.speed or 0.0 for each in timed]
        unit = timed[0].speed_unit if timed[0].speed_unit != "x" else "times the first variant's"
        pictures.append(
            Picture(
                "quality-speed",
                "Quality against decode speed",
                "The line joins the variants that no other beats in both.",
                f"{len(timed)} variants from {min(speeds):.2f} to {max(speeds):.2f} {unit}.",
                lambda: pareto_figure(timed, speeds, f"decode speed, {unit}", higher_is_better=True),
                header,
                rows,
            )
        )
    return Section("Quality, size and speed", "Perplexity on held-out text, lower is better.", pictures)


def write_page(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report as one HTML page, whole or not at all.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        OSError: the file cannot be written.
    """
    page = render(report)
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def write_figures(report: Report, folder: str | os.PathLike[str]) -> list[str]:
    """Write every figure as a PNG file into a folder, which appears when it is complete.

    Returns:
        The files' names.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the folder holds something, or cannot be written.
    """
    need("matplotlib")
    names = []
    with replace_folder(folder) as temporary:
        for section in report.sections():
            for picture in section.pictures:
                names.append(f"{picture.name}.png")
                picture.draw().savefig(Path(temporary) / names[-1], format="png", dpi=150)
    return names


def render(report: Report) -> str:
    """The page as text.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    need("matplotlib", "jinja2")
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("moe_ext").joinpath("report.html").read_text(encoding="utf-8"))
    sections = report.sections()
    drawn = {picture.name: _inline_svg(picture) for section in sections for picture in section.pictures}
    return template.render(
        stats=report.stats,
        tokens=int(report.stats.tokens.max()),
        sections=sections,
        drawn=drawn,
        slider=_slider(report.stats) if "gate-ratios" in drawn else None,
        version=__version__,
    )


def _inline_svg(picture: Picture) -> str:
    """A figure as an SVG element in the page's colours, whose names do not clash with another figure's."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = picture.draw()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    width = figure.get_figwidth()
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>|; font-family: [^;]*", "", svg, flags=re.DOTALL)  # the page's font
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{picture.name}-", svg)
    # The page says what the figure shows; its size follows the column, within reason.
    size = f'style="max-width: {width * 110:.0f}px; min-width: {min(width, 2.9) * 100:.0f}px"'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 aria-hidden="true" {size}>', svg, count=1)


def _slider(stats: ExpertStatistics) -> dict[str, Any]:
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
    weights = stats.tokens.double() / stats.tokens.sum()

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
