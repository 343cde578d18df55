"""The report says what its input says, in figures with text alternatives; the page is well-formed and loads nothing."""

import dataclasses
import html
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ext import ExpertStatistics, PruningPlan, plan, score, skip_thresholds, thin_plan
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.evaluation.results import Variant
from moe_ext.reconstruction.result import SearchFileError, SearchResult
from moe_ext.report.page import render, write_figures, write_page
from moe_ext.report.sections import Picture, Report
from tests.support.report_input import demo_report, thin_report

pytestmark = pytest.mark.slow

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Tags with their attributes; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return render(demo_report())


def test_every_figure_has_a_text_alternative(page: str) -> None:
    tags = Page(page).tags
    figures = [attributes["id"] for tag, attributes in tags if tag == "figure"]
    drawn = [attributes for tag, attributes in tags if attributes.get("role") == "img"]
    assert {"load", "coactivation", "scores-man", "scores-mone", "agreement", "gate-ratios", "search-losses"} <= set(
        figures
    )
    assert {"channels", "quality-size", "quality-speed"} <= set(figures)
    # One label a figure; the gate ratios have one a layer.
    assert len(drawn) == len(figures) - 1 + demo_report().stats.num_layers
    assert all(len(attributes["aria-label"] or "") > 40 for attributes in drawn)


def test_names_in_the_page_are_unique_and_links_lead_somewhere(page: str) -> None:
    tags = Page(page).tags
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(names) == len(set(names))
    links = re.findall(r'(?:href="|url\()#([^")]+)', page)
    assert links
    assert set(links) <= set(names)


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert [source for source in sources if not source.startswith(("#", "data:image/png"))] == []
    assert "@import" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_labels_are_shown_as_text_and_not_as_markup(page: str) -> None:
    assert "a </script> b" not in page
    assert "a &lt;/script&gt; b" in page
    assert "&lt;pruned&gt; &amp; &#34;small&#34;" in page


def test_the_same_input_gives_the_same_page(page: str) -> None:
    assert render(demo_report()) == page


@pytest.fixture(scope="module")
def settings(page: str) -> dict[str, Any]:
    """What the slider of the page does, by its two meanings."""
    found = re.search(r'id="skip-settings">(.*?)</script>', page)
    assert found
    parsed: dict[str, Any] = json.loads(found[1])
    return parsed


def test_one_threshold_skips_what_the_histogram_has_below_it(settings: dict[str, Any]) -> None:
    stats = demo_report().stats
    rates = torch.tensor(settings["threshold"]["rates"])
    # At 0 nothing is skipped, at 1 every second expert but those with equal weights.
    assert bool((rates[:, 0] == 0).all())
    assert bool((rates[:, -1] == 0.5).all())
    upper_edges = stats.ratio_histogram[:, 0].cumsum(1)[:, 511]  # ratios below 512 / 1024
    assert rates[:, 50].tolist() == pytest.approx((upper_edges / stats.tokens / 2).tolist(), abs=5e-5)  # 4 decimals
    assert settings["threshold"]["high"] == [[step / 100 for step in range(101)]] * 4


def test_a_quantile_sets_the_thresholds_of_moe_ext_skip(settings: dict[str, Any]) -> None:
    quantile = settings["quantile"]
    assert quantile["start"] == 50
    for step in (0, 20, 50, 100):
        expected = skip_thresholds(demo_report().stats, step / 100)[:, 0].tolist()
        assert [row[step] for row in quantile["high"]] == pytest.approx(expected, abs=5e-5)  # 4 decimals
        # That share of the second experts, half of it of all.
        assert [row[step] for row in quantile["rates"]] == pytest.approx([step / 200] * 4, abs=5e-5)


def test_thresholds_of_several_ranks_are_a_range() -> None:
    import moe_ext

    stats = moe_ext.ExpertStatistics.zeros("qwen3_moe", ("layers.0", "layers.1"), 8, 4, "softmax")
    stats.tokens += 100
    stats.moments += 1
    for rank, place in enumerate((800, 400, 100)):  # the same ratio at every token, lower with the rank
        stats.ratio_histogram[:, rank, place] = 100
    found = re.search(r'id="skip-settings">(.*?)</script>', render(Report(stats)))
    assert found
    quantile = json.loads(found[1])["quantile"]
    middles = [(place + 0.5) / 1024 for place in (100, 800)]
    assert [quantile["low"][0][50], quantile["high"][0][50]] == pytest.approx(middles, abs=5e-5)
    assert quantile["all"][50] == pytest.approx(3 / 8)  # half of three of four


def test_crosses_are_what_the_criterion_removes_at_the_searchs_number() -> None:
    report = demo_report()
    plans = report.plans()
    assert {len(kept) for plan in plans.values() for kept in plan.keep} == {6}
    assert plans["frequency"].keep != plans["man"].keep
    given = dataclasses.replace(report, removals=plans["man"])
    assert set(map(id, given.plans().values())) == {id(plans["man"])}
    assert {len(kept) for kept in dataclasses.replace(report, keep=4).plans()["man"].keep} == {4}


def test_descriptions_say_what_the_figures_show() -> None:
    pictures = {picture.name: picture for section in demo_report().sections() for picture in section.pictures}
    stats, search = demo_report().stats, demo_report().search
    assert search is not None
    assert pictures["scores-man"].description == "8 of 32 experts are marked."
    counts = stats.routing_counts()
    layer, expert = divmod(int(counts.argmax()), 8)  # every layer has the same number of slots
    load = float(counts.max() / counts[layer].sum() * 8)
    assert f"{load:.2f} times an even one: expert {expert} of layer {layer}" in pictures["load"].description
    medians = skip_thresholds(stats)
    assert f"from {float(medians.min()):.2f} to {float(medians.max()):.2f}" in pictures["gate-ratios"].description
    removed = [row[1] for row in pictures["search-losses"].rows]
    assert removed == [", ".join(map(str, search.plan.removed(layer))) for layer in range(4)]
    assert pictures["quality-size"].rows[1] == ('<pruned> & "small"', "7.8 MB", "120.00 tokens/s", "25.85")


def pictures_of(report: Report) -> dict[str, Picture]:
    return {picture.name: picture for section in report.sections() for picture in section.pictures}


def test_channels_are_shown_by_what_the_best_of_every_expert_hold() -> None:
    stats = demo_report().stats
    assert stats.channel_errors is not None
    channels = stats.channel_errors.shape[2]
    shares, widths = [], []
    for layer in stats.channel_errors.tolist():
        best = [sorted(expert, reverse=True) for expert in layer]
        total = sum(map(sum, best))
        held = [sum(sum(expert[:count]) for expert in best) / total for count in range(channels + 1)]
        shares.append(held[channels // 2])
        widths.append(next(count for count, share in enumerate(held) if share >= 0.9))
    picture = pictures_of(demo_report())["channels"]
    assert [row[1] for row in picture.rows] == [f"{width} channels" for width in widths]
    assert [row[3] for row in picture.rows] == [f"{share:.1%}" for share in shares]
    assert f"hold {min(shares):.1%} of the errors in layer {shares.index(min(shares))}" in picture.description
    assert f"{max(shares):.1%} in layer {shares.index(max(shares))}, the most" in picture.description
    assert "plan" not in picture.caption + picture.description


@pytest.mark.parametrize("keep", [None, 6])
def test_a_plan_of_thinner_experts_marks_its_width(keep: int | None) -> None:
    report = demo_report()
    assert report.stats.channel_errors is not None
    experts = None if keep is None else plan(score(report.stats), keep=keep)
    thinner = thin_plan(report.stats, size=0.5, plan=experts, multiple=32, blocks=16)
    assert thinner.channels is not None
    width = thinner.channels.width(0)
    held = []
    for layer, kept in enumerate(thinner.keep):
        rows = [report.stats.channel_errors[layer, expert] for expert in kept]
        inside = sum(
            float(row[channels].sum()) for row, channels in zip(rows, thinner.channels.indices(layer), strict=True)
        )
        held.append(inside / sum(float(row.sum()) for row in rows))
    marked = dataclasses.replace(report, removals=thinner)
    picture = pictures_of(marked)["channels"]
    assert picture.header[-1] == "the plan keeps"
    assert [row[-1] for row in picture.rows] == [f"{share:.1%}" for share in held]
    assert f"The plan keeps {width} channels; they hold {min(held):.1%} or more" in picture.description
    (axes,) = picture.draw().axes
    drawn = [line.get_xdata() for line in axes.lines if line.get_color() == "tab:red"]
    assert drawn == [[width / report.stats.channel_errors.shape[2]] * 2]
    assert picture.description in html.unescape(render(marked))


def test_a_layer_without_tokens_has_no_line_of_channels() -> None:
    stats = ExpertStatistics.zeros("mixtral", ("layers.0", "layers.1"), 3, 1, "softmax", width=4)
    assert stats.channel_errors is not None
    assert "channels" not in pictures_of(Report(stats))
    stats.channel_errors[0, :2] = torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 1.0]])
    picture = pictures_of(Report(stats))["channels"]
    assert picture.rows == [
        ("layers.0", "3 channels", "3 channels", "87.5%"),
        ("layers.1", "no token", "no token", "no token"),
    ]
    assert "hold 87.5% of the errors in layer 0, the least of all layers, and 87.5% in layer 0" in picture.description
    assert Page(render(Report(stats))).open == []


def test_a_report_of_little_leaves_out_what_it_cannot_show() -> None:
    names = [picture.name for section in thin_report().sections() for picture in section.pictures]
    assert "load" in names
    assert not {"channels", "coactivation", "gate-ratios", "search-losses", "quality-size"} & set(names)
    page = render(thin_report())
    assert "<script" not in page


def test_a_model_with_many_experts_is_drawn() -> None:
    import moe_ext

    stats = moe_ext.ExpertStatistics.zeros("qwen3_moe", tuple(f"layers.{i}" for i in range(26)), 128, 8, "softmax")
    stats.tokens += 100
    stats.moments[:] = torch.rand(26, 128, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stats.ratio_histogram += 1
    page = render(Report(stats))
    assert len(page) < 4_000_000


@pytest.mark.parametrize("name", ["; font-family: x", "$\\frac{$", '<b id="a">', "#010203 [/b]", "</script>{{ 1 }}"])
def test_a_name_is_shown_as_it_is_and_breaks_nothing(name: str) -> None:
    variants = (Variant(name, 2.0, 10, 1.0), Variant("other", 3.0, 5, 2.0))
    layers = tuple(f"{name}.{layer}" for layer in range(4))
    report = demo_report()
    layout = dataclasses.replace(report.stats.layout, layers=layers)
    stats = dataclasses.replace(report.stats, layout=layout, dataset=name)
    page = render(Report(stats, variants=variants))
    texts = Page(page).texts
    drawn = page[page.index('<figure id="quality-size">') :]
    assert html.escape(name, quote=False) in drawn[: drawn.index("</svg>")]
    assert texts.count(f"{name}.0") >= 3  # rows of tables
    assert page.count("<script") == 2


def test_figures_alone_are_png_files(tmp_path: Path) -> None:
    names = write_figures(demo_report(), tmp_path / "figures")
    assert sorted(names) == sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert "search-losses.png" in names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "figures").iterdir())


def test_an_interrupted_page_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        write_page(thin_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == b"old"


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"need jinja2: pip install 'moe_ext\[report\]'"):
        render(thin_report())


FITTING = PruningPlan("mixtral", 8, 2, tuple(f"model.layers.{i}.mlp" for i in range(4)), (tuple(range(8)),) * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 9}, "keep: 9 keeps 9 of 8 experts"),
        (
            {"removals": PruningPlan("mixtral", 8, 2, ("other",), (tuple(range(8)),))},
            "removals: is for another model than the statistics: layers",
        ),
        ({"removals": dataclasses.replace(FITTING, top_k=3)}, "removals: is for another model .*: top_k 3 and 2"),
        ({"removals": dataclasses.replace(FITTING, model_type="olmoe")}, "model_type 'olmoe' and 'mixtral'"),
        (
            {
                "removals": dataclasses.replace(
                    FITTING, channels=KeptChannels.of([torch.arange(8).repeat(8, 1)] * 4, 24)
                )
            },
            "removals: is for another model than the statistics: 24 and 224 channels",
        ),
        ({"variants": [Variant("a", 2.0, speed=1.0), Variant("b", 2.0, speed=1.0, speed_unit="x")]}, "do not compare"),
    ],
)
def test_input_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(demo_report(), **changes)


def test_a_searchs_json_reads_back(tmp_path: Path) -> None:
    search = demo_report().search
    assert search is not None
    search.save(tmp_path / "search.json")
    loaded = SearchResult.load(tmp_path / "search.json")
    assert loaded.plan == search.plan
    for one, other in zip(loaded.losses, search.losses, strict=True):
        assert torch.equal(one.keep, other.keep)
        assert torch.equal(one.losses, other.losses)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("moe_ext.search", "other"), "not a search's result"),
        (('"exact": true, "keep": [[', '"exact": true, "keep": [[99, '), "search.json: "),
        (('"plan"', '"plane"'), "'plan' is missing"),
        (('"keep": [[', '"keep": [[-1, '), r"expected 0 to 7, got expert -1"),
        (('"exact": true, "keep": [[', '"exact": true, "keep": [[true, '), "keep: expected a tuple of integers"),
        (('"exact": true, "keep": [[', '"exact": true, "keep": [null, ['), "keep: expected a JSON list of lists"),
        (('"losses": [', '"losses": [1e999, '), "1e999 is beyond float64"),
        (('"losses": [', '"losses": [Infinity, '), "Infinity is not JSON"),
        ((']], "losses": [', ']], "losses": [true, '), "losses: expected a JSON list of numbers"),
        (('{"name": "model', '{"name": "other'), "layers: have other names than those of the plan"),
        ((']], "losses": [', ']], "losses": [-'), "expected finite values >= 0"),
        (('"format_version": 2', '"format_version": 3'), "format version 3"),
    ],
)
def test_a_searchs_json_that_is_not_valid_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    search = demo_report().search
    assert search is not None
    path = tmp_path / "search.json"
    path.write_text(search.to_json().replace(*change, 1))
    with pytest.raises(SearchFileError, match=message):
        SearchResult.load(path)


def test_the_load_of_every_domain_is_shown_beside_that_of_all() -> None:
    stats = ExpertStatistics.zeros("mixtral", ("layers.0", "layers.1"), 4, 1, "softmax")
    for number in range(9):
        part = stats.of_domain("<code>" if number == 8 else f"d{number}")
        part.tokens += number + 1
        part.moments[0, number % 4, 0, 0] = part.moments[1, 3, 0, 0] = number + 1
    for layer in range(2):
        stats.add_up_domains(layer)
    pictures = {picture.name: picture for section in Report(stats).sections() for picture in section.pictures}
    loads = [picture for name, picture in pictures.items() if name.startswith("load-domain")]
    assert [picture.title for picture in loads] == [
        "Routing load, <code>", *(f"Routing load, d{number}" for number in range(7, 0, -1))
    ]  # fmt: skip
    # 9 of 45 tokens, all of them to expert 0 of layer 0, which has 15 of all.
    assert "20% of all tokens" in loads[0].caption
    assert "in layer 0: expert 0 has 4.00 times an even load here and 1.33 in all" in loads[0].description
    assert loads[0].rows[0] == ("layers.0", "0 (4.00)", "1 (0.00)")
