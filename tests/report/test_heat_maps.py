"""Heat maps show what the scores and plans say."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from moe_ext.decision.criteria import Scores
from moe_ext.decision.plan import plan
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.report.heat_maps import heat_map_figure, heat_maps
from tests.support.scores import scored

MAN = scored([[1.0, 4.0, 2.0], [0.0, 5.0, 10.0]])
EAN = scored([[7.0, 7.0, 7.0], [3.0, 0.0, 0.0]], "ean")


def shades(figure: Figure, panel: int) -> list[list[float]]:
    values: list[list[float]] = figure.axes[panel].images[0].get_array().tolist()  # type: ignore[union-attr]
    return values


def crosses(figure: Figure, panel: int) -> set[tuple[float, float]]:
    """(expert, layer) of every cross."""
    return {(x, y) for line in figure.axes[panel].lines for x, y in np.asarray(line.get_xydata()).tolist()}


def test_a_panel_shows_scores_relative_to_the_largest_of_their_layer() -> None:
    assert shades(heat_map_figure({"MAN": MAN}), 0) == [[0.25, 1.0, 0.5], [0.0, 0.5, 1.0]]


def test_a_layer_of_zero_scores_is_shown_as_zero() -> None:
    assert shades(heat_map_figure({"MAN": scored([[0.0, 0.0]])}), 0) == [[0.0, 0.0]]


def test_criteria_stand_side_by_side_in_order_on_one_scale() -> None:
    figure = heat_map_figure({"MAN": MAN, "even": scored([[1.0, 2.0]])})
    assert [axes.get_title() for axes in figure.axes[:2]] == ["MAN", "even"]
    assert shades(figure, 1) == [[0.5, 1.0]]
    assert [axes.images[0].get_clim() for axes in figure.axes[:2]] == [(0, 1), (0, 1)]
    assert len(figure.axes) == 3  # two panels and their one colour bar


def test_removed_experts_are_crossed_out() -> None:
    figure = heat_map_figure({"MAN": MAN, "EAN": EAN}, plans={"EAN": plan(EAN, keep=2)})
    assert crosses(figure, 0) == set()
    assert crosses(figure, 1) == {(2, 0), (2, 1)}


def test_layers_may_lose_different_numbers_of_experts() -> None:
    uneven = PruningPlan("mixtral", 3, 1, MAN.layers, ((0, 1, 2), (1,)))
    assert crosses(heat_map_figure({"MAN": MAN}, plans={"MAN": uneven}), 0) == {(0, 1), (2, 1)}


def test_a_plan_that_removes_nothing_draws_no_cross() -> None:
    assert crosses(heat_map_figure({"MAN": MAN}, plans={"MAN": plan(MAN, keep=3)}), 0) == set()


def test_axes_are_labelled_in_whole_numbers() -> None:
    figure = heat_map_figure({"MAN": MAN})
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    assert {0.0, 1.0} <= set(axes.get_yticks())
    assert all(tick == round(tick) for tick in (*axes.get_xticks(), *axes.get_yticks()))


def test_the_file_is_the_figure_as_png(tmp_path: Path) -> None:
    heat_maps({"MAN": MAN}, tmp_path / "map.png", plans={"MAN": plan(MAN, keep=2)})
    pixels = io.BytesIO()
    heat_map_figure({"MAN": MAN}, plans={"MAN": plan(MAN, keep=2)}).savefig(pixels, format="png", dpi=150)
    pixels.seek(0)
    assert (imread(tmp_path / "map.png") == imread(pixels)).all()


def test_crosses_change_the_picture(tmp_path: Path) -> None:
    heat_maps({"MAN": MAN}, tmp_path / "plain.png")
    heat_maps({"MAN": MAN}, tmp_path / "crossed.png", plans={"MAN": plan(MAN, keep=2)})
    assert (imread(tmp_path / "plain.png") != imread(tmp_path / "crossed.png")).any()


def test_a_large_model_fits_a_bounded_picture() -> None:
    width, height = heat_map_figure({"MAN": scored([[1.0] * 256] * 94)}).get_size_inches()
    assert width < 16
    assert height < 16


def test_an_interrupted_picture_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(_: Figure, path: Path, **arguments: Any) -> None:
        path.write_bytes(b"\x89PNG")
        raise KeyboardInterrupt

    (tmp_path / "map.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", write_half)
    with pytest.raises(KeyboardInterrupt):
        heat_maps({"MAN": MAN}, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["map.png"]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"need matplotlib: pip install 'moe_ext\[report\]'"):
        heat_maps({"MAN": MAN}, tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


def test_another_file_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.png, got .*map\.pdf"):
        heat_maps({"MAN": MAN}, tmp_path / "map.pdf")


def test_no_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="scores: expected one or more criteria, got none"):
        heat_map_figure({})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scores_that_cannot_be_drawn_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="scores: 'MAN' holds a score that is negative, infinite or NaN"):
        heat_map_figure({"MAN": scored([[1.0, value]])})


def test_a_plan_without_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="plans: 'EAN' has no scores to be drawn on; there are MAN"):
        heat_map_figure({"MAN": MAN}, plans={"EAN": plan(EAN, keep=2)})


@pytest.mark.parametrize("other", [scored([[1.0, 2.0, 3.0]]), scored([[1.0, 2.0], [1.0, 2.0]])])
def test_a_plan_for_another_model_is_refused(other: Scores) -> None:
    with pytest.raises(ValueError, match="plans: 'MAN' is for other layers or another number of experts"):
        heat_map_figure({"MAN": MAN}, plans={"MAN": plan(other, keep=1)})
