"""Super experts are found where they were planted, named, and kept unless they are allowed to go."""

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ext
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.criteria import score
from moe_ext.decision.plan import plan
from moe_ext.decision.super_experts import peak_norms, super_experts
from moe_ext.decision.thin_plan import thin_plan
from moe_ext.models.layout import Layout
from tests.support.batches import padded_batches
from tests.support.command_line import inside, moe_json
from tests.support.mixtral import MixtralFactory

LAYERS = tuple(f"model.layers.{layer}.mlp" for layer in range(3))


def statistics(
    norms: torch.Tensor,
    *,
    groups: int = 1,
    planted: dict[tuple[int, int], float] | None = None,
    width: int | None = None,
) -> ExpertStatistics:
    """Of four tokens an expert, one of whose outputs has the planted norm, the others that of ``norms`` (L, E)."""
    layers, experts = norms.shape
    layout = Layout("mixtral", LAYERS[:layers], (experts,) * layers, 2, groups)
    stats = ExpertStatistics.empty(layout, "softmax", "prose", width=width)
    stats.moments[:, :, 0, 0] = 4
    for power in (1, 2):
        stats.moments[:, :, 0, power] = 4 * norms.double() ** power
        for (layer, expert), norm in (planted or {}).items():
            stats.moments[layer, expert, 0, power] += norm**power - float(norms[layer, expert]) ** power
    stats.tokens += 2 * experts
    # Routing counts that rise with the index, so that the first experts go first.
    stats.moments[:, :, 1, 0] = torch.arange(1.0, experts + 1).double()
    return stats


def ones(layers: int, experts: int) -> torch.Tensor:
    return torch.ones(layers, experts)


@pytest.mark.parametrize("scale", [1000.0, 0.001])
def test_a_planted_super_expert_is_found_by_calibration(tiny_mixtral: MixtralFactory, scale: float) -> None:
    model = tiny_mixtral()
    assert super_experts(moe_ext.calibrate(model, padded_batches(), progress=False)) == ()
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[5] *= scale
    stats = moe_ext.calibrate(model, padded_batches(), progress=False)
    found = [(each.layer, each.name, each.expert) for each in super_experts(stats)]
    assert found == ([(2, "model.layers.2.mlp", 5)] if scale > 1 else [])


@settings(max_examples=50)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 300)),
    planted=st.integers(0, 4),
    unreached=st.booleans(),
)
def test_the_rule_is_the_papers_with_a_comparison_within_the_layer(
    seed: int, shape: tuple[int, int], planted: int, unreached: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(shape, generator=generator) + 0.1
    for _ in range(planted):
        place = torch.randint(shape[0] * shape[1], (1,), generator=generator)
        norms.view(-1)[place] = 10 ** float(torch.rand(1, generator=generator) * 3)
    stats = statistics(norms)
    if unreached:
        stats.moments[:, 0] = 0
    peaks = [[float(row[0, 2] / row[0, 1]) if row[0, 0] else None for row in layer.numpy()] for layer in stats.moments]
    every = [peak for layer in peaks for peak in layer if peak is not None]
    expected = [
        (layer, expert)
        for layer, row in enumerate(peaks)
        for expert, peak in enumerate(row)
        if peak is not None
        and peak > numpy.percentile(every, 99.5)
        and peak > max(every) / 10
        and peak > 10 * sorted(other for other in row if other is not None)[(sum(p is not None for p in row) - 1) // 2]
    ]
    assert [(each.layer, each.expert) for each in super_experts(stats)] == expected
    assert len(expected) <= -(-len(every) // 200)


def test_the_norm_is_between_mean_and_largest_and_near_the_largest_for_outliers() -> None:
    stats = statistics(ones(1, 4), planted={(0, 1): 1000.0})
    peaks = peak_norms(stats)
    assert peaks[0, 0] == 1
    assert 990 < float(peaks[0, 1]) <= 1000
    assert float(peak_norms(statistics(torch.zeros(1, 4))).max()) == 0
    assert super_experts(ExpertStatistics.zeros("mixtral", LAYERS, 4, 2, "softmax")) == ()


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("layer", ((2, 3, 4, 5), (0, 3, 4, 5), (2, 3, 4, 5))),
        ("model", ((2, 3, 4, 5), (0, 2, 3, 4, 5), (3, 4, 5))),  # the next of all layers
    ],
)
def test_a_plan_keeps_a_super_expert_and_the_next_one_goes_in_its_place(
    scope: str, expected: tuple[tuple[int, ...], ...]
) -> None:
    stats = statistics(ones(3, 6), planted={(1, 0): 50.0})
    scores = score(stats, "seer")
    with pytest.warns(UserWarning, match=r"would go, and are kept: 1 super expert \(arXiv 2507.23279\): expert 0 of"):
        made = plan(scores, keep=4, scope=scope)
    assert made.keep == expected
    assert made.made_by["super_experts_kept"] == [[LAYERS[1], 0]]
    with pytest.warns(UserWarning, match="would go, and are removed: 1 super expert"):
        gone = plan(scores, keep=4, scope=scope, allow_super=True)
    assert gone.keep == ((2, 3, 4, 5),) * 3
    assert gone.made_by["super_experts_removed"] == [[LAYERS[1], 0]]


def test_a_plan_that_keeps_it_anyway_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    made = plan(score(statistics(ones(3, 6), planted={(1, 5): 50.0}), "seer"), keep=4)
    assert made.keep == ((2, 3, 4, 5),) * 3
    assert "super" not in json.dumps(made.made_by)
    assert not recwarn.list


def test_chance_does_not_remove_it_either() -> None:
    stats = statistics(ones(3, 6), planted={(1, 0): 50.0})
    for seed in range(10):
        scores = score(stats, "random", seed=seed)
        unguarded = plan(replace(scores, super_experts=()), keep=2)
        if 0 in unguarded.keep[1]:
            assert plan(scores, keep=2).keep == unguarded.keep
        else:
            with pytest.warns(UserWarning, match="super expert"):
                assert 0 in plan(scores, keep=2).keep[1]


def test_groups_lose_the_same_number_beside_it() -> None:
    stats = statistics(ones(2, 8), groups=2, planted={(0, 4): 50.0})
    with pytest.warns(UserWarning, match="expert 4"):
        made = plan(score(stats, "seer"), keep=4)
    assert made.keep == ((2, 3, 4, 7), (2, 3, 6, 7))
    with pytest.warns(UserWarning, match="expert 4"):
        assert plan(score(stats, "seer"), keep=4, scope="model").keep[0] == (2, 3, 4, 7)


def test_two_in_a_layer_of_a_large_model_stay() -> None:
    stats = statistics(ones(3, 100), planted={(0, 3): 50.0, (0, 8): 70.0})
    with pytest.warns(UserWarning, match="2 super experts"):
        assert plan(score(stats, "seer"), keep=2).keep[0] == (3, 8)
    with pytest.warns(UserWarning, match="2 super experts"):
        assert plan(score(stats, "seer"), keep=2, scope="model").keep[0] == (3, 8)


def test_more_of_them_than_a_layer_keeps_is_an_error() -> None:
    scores = score(statistics(ones(3, 200), planted={(0, expert): 60.0 + expert for expert in range(3)}), "seer")
    assert len(scores.super_experts) == 3
    for scope in ("layer", "model"):
        with pytest.raises(ValueError, match=r"keep: 2 leaves no place for 1 super expert .*; keep more"):
            plan(scores, keep=2, scope=scope)


def test_thinner_experts_of_a_plan_that_removes_one_are_refused() -> None:
    stats = statistics(ones(3, 6), planted={(1, 0): 50.0}, width=8)
    scores = score(stats, "seer")
    with pytest.warns(UserWarning, match="super expert"):
        gone, kept = plan(scores, keep=4, allow_super=True), plan(scores, keep=4)
    with pytest.raises(ValueError, match=r"plan: removes 1 super expert .* expert 0 of 'model.layers.1.mlp'"):
        thin_plan(stats, channels=4, multiple=4, plan=gone)
    assert thin_plan(stats, channels=4, multiple=4, plan=gone, allow_super=True).keep == gone.keep
    assert thin_plan(stats, channels=4, multiple=4, plan=kept).keep == kept.keep


def test_the_commands_name_it_and_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    statistics(ones(3, 6), planted={(1, 0): 50.0}).save("s.safetensors")
    (shown,) = moe_json("score", "s.safetensors", "--criterion", "seer")["super_experts"]
    assert (shown["name"], shown["expert"]) == (LAYERS[1], 0)
    assert inside("score", "s.safetensors", "--criterion", "seer") == 0
    assert "1 super expert (arXiv 2507.23279): expert 0 of 'model.layers.1.mlp'" in capsys.readouterr().out
    arguments = ("plan", "s.safetensors", "--criterion", "seer", "--keep", "4", "--out", "p.json")
    with pytest.warns(UserWarning, match=r"and are kept: .*--allow-super"):
        assert moe_json(*arguments)["keep"][LAYERS[1]] == [0, 3, 4, 5]
    with pytest.warns(UserWarning, match="and are removed"):
        assert moe_json(*arguments, "--allow-super")["keep"][LAYERS[1]] == [2, 3, 4, 5]
