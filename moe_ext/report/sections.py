"""What a report says: what statistics, a search and evaluations tell about a model's experts, as sections of pictures
with captions, text alternatives and tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.agreement import rank_agreement
from moe_ext.decision.criteria import CRITERIA, Scores, score
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.decision.plan import plan
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.decision.redundancy import overlap, redundant_pairs
from moe_ext.decision.thresholds import skip_thresholds
from moe_ext.evaluation.results import Variant
from moe_ext.reconstruction.result import SearchResult
from moe_ext.report.figures import (
    agreement_figure,
    channel_curves,
    channels_figure,
    coactivation_figure,
    load_figure,
    load_of,
    loss_curves,
    losses_figure,
    pareto_figure,
    ratio_figure,
)
from moe_ext.report.heat_maps import heat_map_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
            removes at ``keep`` experts a layer. Of a plan of thinner experts the width is marked, too.
        keep: experts that every layer keeps where ``removals`` is None; None: those of the search's plan if there is
            one and its layers keep the same number, else three quarters.
        search: a reconstruction search of the same model, or None.
        variants: evaluated variants of the model.

    Raises:
        ValueError: a plan or search for another model, a ``keep`` that the layers cannot have, or variants whose speeds
            have different units.
    """

    stats: ExpertStatistics
    removals: PruningPlan | None = None
    keep: int | None = None
    search: SearchResult | None = None
    variants: Sequence[Variant] = ()

    def __post_init__(self) -> None:
        for name, made in (("removals", self.removals), ("search", self.search and self.search.plan)):
            if made and (different := made.misfit(self.stats.layout)) is not None:
                raise ValueError(f"{name}: is for another model than the statistics: {different}")
        if self.removals and self.removals.channels and self.stats.width:
            planned = self.removals.channels.intermediate_size
            if planned != self.stats.width:
                raise ValueError(
                    f"removals: is for another model than the statistics: {planned} and {self.stats.width} channels"
                )
        if len({each.speed_unit for each in self.variants if each.speed is not None}) > 1:
            raise ValueError("variants: speeds in tokens/s and relative ones do not compare; give files of one kind")
        self.plans()

    def scores(self) -> dict[str, Scores]:
        """Every criterion that the statistics hold the sums for."""
        names = list(CRITERIA)
        names += ["hope"] if self.stats.output_pairs is not None else []
        names += ["mone"] if self.stats.output_sum is not None else []
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
        if self.stats.channel_errors is not None and bool((self.stats.channel_errors > 0).any()):
            sections.append(_channels(self.stats, self.stats.channel_errors, self.removals))
        if self.stats.top_k > 1 and bool((self.stats.ratio_histogram > 0).any(-1).all()):
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
    pictures += _domain_loads(stats)
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


_MOST_DOMAINS = 8  # of which the load is drawn


def _domain_loads(stats: ExpertStatistics) -> list[Picture]:
    """Of every domain, the largest first."""
    largest = sorted(stats.domains.items(), key=lambda entry: (-int(entry[1].tokens.max()), entry[0]))
    pictures = []
    of_all = load_of(stats)
    for number, (domain, part) in enumerate(largest[:_MOST_DOMAINS]):
        load = load_of(part)
        differing = (load - of_all).abs().nan_to_num(0.0)
        layer, expert = divmod(int(differing.argmax()), stats.num_experts)
        rows = []
        for index, name in enumerate(stats.layers):
            row = load[index, : stats.experts[index]]
            rows.append((name, f"{int(row.argmax())} ({row.max():.2f})", f"{int(row.argmin())} ({row.min():.2f})"))
        share = int(part.tokens.max()) / max(1, int(stats.tokens.max()))
        pictures.append(
            Picture(
                f"load-domain-{number}",
                f"Routing load, {domain}",
                f"The same on the text of one domain, {share:.0%} of all tokens.",
                f"It differs most from that of all text in layer {layer}: expert {expert} has "
                f"{load[layer, expert]:.2f} times an even load here and {of_all[layer, expert]:.2f} in all.",
                partial(load_figure, load),
                ("layer", "most (load)", "least (load)"),
                rows,
            )
        )
    return pictures


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


def _channels(stats: ExpertStatistics, errors: Tensor, plan: PruningPlan | None) -> Section:
    """Of statistics with errors of channels, (L, E, I)."""
    curves, channels = channel_curves(errors), errors.shape[2]
    half = curves[:, channels // 2].tolist()
    known = [layer for layer, share in enumerate(half) if not math.isnan(share)]
    flat, steep = min(known, key=lambda layer: half[layer]), max(known, key=lambda layer: half[layer])
    caption = (
        "The share of a layer's errors that the best channels of every expert hold, a line a layer: the steeper, the "
        "more channels can go. Gray: channels that are all alike."
    )
    seen = (
        f"The best {channels // 2} of {channels} channels hold {half[flat]:.1%} of the errors in layer {flat}, the "
        f"least of all layers, and {half[steep]:.1%} in layer {steep}, the most."
    )
    header: tuple[str, ...] = ("layer", "90 % in", "99 % in", f"best {channels // 2} of {channels}")
    rows: list[tuple[str, ...]] = [
        (
            name,
            *(f"{int((curve < share).sum())} channels" if layer in known else "no token" for share in (0.9, 0.99)),
            _percent(half[layer]),
        )
        for layer, (name, curve) in enumerate(zip(stats.layers, curves, strict=True))
    ]
    width = None
    if plan is not None and plan.channels is not None:
        widths = [plan.channels.width(layer) for layer in range(stats.num_layers)]
        width = round(sum(widths) / len(widths))
        planned = [_share_kept(errors[layer], plan.channels, keep, layer) for layer, keep in enumerate(plan.keep)]
        rows = [(*row, _percent(share)) for row, share in zip(rows, planned, strict=True)]
        header = (*header, "the plan keeps")
        caption += " Red: the plan's width."
        least = min((share for share in planned if not math.isnan(share)), default=math.nan)
        seen += (
            f" The plan keeps {width} channels; they hold {_percent(least)} or more of the errors of the experts that "
            "it keeps."
        )
    return Section(
        "What thinner experts lose",
        "The error of a channel is what the squared error of the layer's output gains if that channel alone goes. All "
        "experts of a layer keep the same number.",
        [
            Picture(
                "channels",
                "Errors of channels",
                caption,
                seen,
                lambda: channels_figure(curves, width),
                header,
                rows,
            )
        ],
    )


def _share_kept(errors: Tensor, channels: KeptChannels, keep: tuple[int, ...], layer: int) -> float:
    """What a plan's channels hold of the errors (E, I) of the experts that it keeps; NaN if these have none."""
    whole = errors[list(keep)]
    return float(whole.gather(1, channels.indices(layer)).sum() / whole.sum())


def _percent(share: float) -> str:
    return "no token" if math.isnan(share) else f"{share:.1%}"


def _search(search: SearchResult) -> Section:
    curves = loss_curves(search)
    rows = []
    for layer, (name, kept, curve, loss) in enumerate(
        zip(search.plan.layers, search.plan.keep, curves, search.layer_losses(), strict=True)
    ):
        removed = ", ".join(map(str, search.plan.removed(layer))) or "none"
        how = "all" if search.losses[layer].is_exact(len(kept), search.groups) else "some"
        rows.append((name, removed, f"{loss:.4g}", f"{how} {len(curve)}", f"{curve[len(curve) // 2]:.2f}"))
    widest = max(range(len(curves)), key=lambda layer: curves[layer][-1])
    return Section(
        "Reconstruction search" if search.measure != "nats" else "Search by what the model loses",
        "A subset's loss is how far the layer's output moves when only these experts are kept."
        if search.measure != "nats"
        else "A subset's loss is what the model's predictions are expected to lose when only these experts are kept, "
        "in nats a token.",
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
