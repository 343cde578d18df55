"""A search keeps the super experts that statistics show, and names those that its losses alone would let go."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.reconstruction.subsets import GreedySearch
from tests.support.batches import padded_batches
from tests.support.command_line import inside, moe_json
from tests.support.mixtral import MixtralFactory
from tests.support.paths import DEMO_MODEL

LAYER = "model.layers.1.mlp"


def with_outlier(stats: ExpertStatistics, layer: int, expert: int) -> ExpertStatistics:
    """The statistics, of a model one of whose experts once gave an output a thousand times as large."""
    stats.moments[layer, expert, 0, 1:] += torch.tensor([1e3, 1e6]).double()
    return stats


@pytest.fixture
def searched(tiny_mixtral: MixtralFactory) -> tuple[Any, ExpertStatistics, moe_ext.SearchResult, int]:
    """A model, statistics with an outlier that the plain search drops, that search, and the outlier in layer 1."""
    model = tiny_mixtral()
    plain = moe_ext.search(model, padded_batches(), keep=5, progress=False)
    dropped = plain.plan.removed(1)[0]
    stats = moe_ext.calibrate(model, padded_batches(), progress=False)
    return model, with_outlier(stats, 1, dropped), plain, dropped


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "progressive"},
        {"method": "greedy"},
        {"max_subsets": 0},
        {"budget": "model"},
        {"loss": "fisher"},
        {"loss": "fisher", "budget": "layer"},
    ],
)
def test_what_the_statistics_show_stays(
    searched: tuple[Any, ExpertStatistics, moe_ext.SearchResult, int],
    options: dict[str, Any],
    recwarn: pytest.WarningsRecorder,
) -> None:
    model, stats, _, dropped = searched
    asked: dict[str, Any] = {"keep": 5, "progress": False, **options}
    found = moe_ext.search(model, padded_batches(), statistics=stats, **asked)
    assert dropped in found.plan.keep[1]
    assert found.plan.made_by["super_experts_kept"] == [[LAYER, dropped]]
    unguarded = moe_ext.search(model, padded_batches(), **asked)
    assert "super_experts_kept" not in unguarded.plan.made_by
    for layer in range(3):
        loss = found.losses[layer]
        if loss.is_exact(len(found.plan.keep[layer])):  # the best of those that keep it
            allowed = loss.keep[:, [dropped]].all(1) if layer == 1 else torch.ones(len(loss.keep), dtype=torch.bool)
            fitting = allowed & (loss.keep.sum(1) == len(found.plan.keep[layer]))
            assert found.layer_losses()[layer] == float(loss.losses[fitting].min())
    named = [str(each.message) for each in recwarn if "super expert" in str(each.message)]
    if "method" not in options and "max_subsets" not in options and dropped not in unguarded.plan.keep[1]:
        assert named[0].startswith("by the losses would go, and are kept: 1 super expert")
        assert f"expert {dropped} of '{LAYER}'" in named[0]


def test_it_may_go_if_it_is_allowed_and_is_named(
    searched: tuple[Any, ExpertStatistics, moe_ext.SearchResult, int], tmp_path: Path
) -> None:
    model, stats, plain, dropped = searched
    asked: dict[str, Any] = {"keep": 5, "progress": False, "resume": tmp_path / "losses.safetensors"}
    with pytest.warns(UserWarning, match=f"by the losses would go, and are removed: .* expert {dropped} of"):
        found = moe_ext.search(model, padded_batches(), statistics=stats, allow_super=True, **asked)
    assert found.plan.keep == plain.plan.keep
    with pytest.raises(ValueError, match=r"is of another search \(super_experts_kept differ\)"):
        moe_ext.search(model, padded_batches(), statistics=stats, **asked)


def test_statistics_of_another_model_are_refused(
    searched: tuple[Any, ExpertStatistics, moe_ext.SearchResult, int], tiny_mixtral: MixtralFactory
) -> None:
    model, _, _, _ = searched
    other = moe_ext.calibrate(tiny_mixtral(num_hidden_layers=2), padded_batches(), progress=False)
    with pytest.raises(ValueError, match="statistics: of another model: layers"):
        moe_ext.search(model, padded_batches(), keep=5, statistics=other, progress=False)


def test_the_walk_drops_no_expert_that_stays() -> None:
    values = torch.arange(6.0).double()
    walk = GreedySearch(lambda keep: (~keep).double() @ values, 6, lambda *_: None, stay=[0, 2])
    walk.run([3])
    keep, losses = walk.subsets()
    assert bool(keep[:, [0, 2]].all())
    best = int(losses.masked_fill(keep.sum(1) != 3, torch.inf).argmin())
    assert keep[best].nonzero().flatten().tolist() == [0, 2, 5]


def test_the_command_takes_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text((DEMO_MODEL / "held_out" / "c.txt").read_text()[:400])
    options = ("--text", "text.txt", "--window", "64")
    assert inside("calibrate", str(DEMO_MODEL), *options, "--out", "s.safetensors") == 0
    search = ("search", str(DEMO_MODEL), *options, "--keep", "6")
    plain = moe_json(*search, "--out", "p.json")["layers"]
    dropped = next(expert for expert in range(8) if expert not in plain[LAYER]["keep"])
    with_outlier(ExpertStatistics.load("s.safetensors"), 1, dropped).save("s.safetensors")
    with pytest.warns(UserWarning, match="and are kept: 1 super expert"):
        guarded = moe_json(*search, "--statistics", "s.safetensors", "--out", "q.json")["layers"]
    assert dropped in guarded[LAYER]["keep"]
    assert inside(*search, "--allow-super", "--out", "r.json") == 2
