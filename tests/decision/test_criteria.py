"""Scores equal their definition, computed one routed token at a time."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.criteria import CRITERIA, OBJECTIVES, Scores, point_of, score
from moe_ext.decision.plan import plan
from moe_ext.decision.weights_only import aimer
from moe_ext.models.layout import Layout
from moe_ext.pruning.prune import prune
from tests.support.families import build, keep_of, plan_for
from tests.support.mixtral import MixtralFactory

Routed = list[list[list[tuple[float, float]]]]  # layers, experts, (gate weight, output norm) of each routed token

POINTS = [(average, a, b) for average in range(2) for a in range(3) for b in range(3)]


def routed(experts: int) -> st.SearchStrategy[Routed]:
    tokens = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), max_size=4)
    layer = st.lists(tokens, min_size=experts, max_size=experts)
    return st.lists(layer, min_size=1, max_size=3)


def observed(tokens: Routed, top_k: int = 1) -> ExpertStatistics:
    layers = tuple(f"layers.{i}" for i in range(len(tokens)))
    stats = ExpertStatistics.zeros("mixtral", layers, len(tokens[0]), top_k, "softmax", "c4")
    for layer, experts in enumerate(tokens):
        for expert, slots in enumerate(experts):
            for a in range(3):
                for b in range(3):
                    stats.moments[layer, expert, a, b] = math.fsum(gate**a * norm**b for gate, norm in slots)
    return stats


ONE_LAYER = observed([[[(0.5, 2.0), (1.0, 4.0)], [(0.25, 3.0)], []]])


@given(tokens=st.integers(1, 6).flatmap(routed), point=st.sampled_from(POINTS))
@example(tokens=[[[], [(0.5, 2.0)]]], point=(1, 2, 2))
def test_a_score_is_the_sum_or_mean_over_routed_tokens(tokens: Routed, point: tuple[int, int, int]) -> None:
    average, a, b = point
    values = score(observed(tokens), point).values
    for layer, experts in enumerate(tokens):
        for expert, slots in enumerate(experts):
            total = math.fsum(gate**a * norm**b for gate, norm in slots)
            expected = total / len(slots) if average and slots else total
            assert values[layer, expert].item() == expected


def test_an_expert_that_no_token_reached_scores_zero() -> None:
    for criterion in CRITERIA:
        assert score(ONE_LAYER, criterion).values[0, 2].item() == 0, criterion


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("frequency", [2, 1, 0]),
        ("seer", [1.5, 0.25, 0]),
        ("ean", [6, 3, 0]),
        ("reap", [2.5, 0.75, 0]),
        ("man", [3, 3, 0]),
        ("msan", [10, 9, 0]),
        ("weighted_ean", [5, 0.75, 0]),
        ("weighted_squared_ean", [17, 0.5625, 0]),
    ],
)
def test_a_named_criterion_is_its_formula(criterion: str, expected: list[float]) -> None:
    scores = score(ONE_LAYER, criterion)
    assert scores.values.tolist() == [expected]
    assert scores.criterion == criterion


def test_the_default_is_man() -> None:
    assert score(ONE_LAYER).criterion == "man"


@pytest.mark.parametrize(("objective", "criterion"), [("task-agnostic", "man"), ("task-specific", "weighted_ean")])
def test_an_objective_chooses_its_criterion(objective: str, criterion: str) -> None:
    assert OBJECTIVES[objective] == criterion
    scores = score(ONE_LAYER, objective=objective)
    assert scores.criterion == criterion
    assert torch.equal(scores.values, score(ONE_LAYER, criterion).values)


def test_an_unnamed_point_is_named_by_its_numbers() -> None:
    assert score(ONE_LAYER, (1, 0, 2)).criterion == "S(1,0,2)"


def test_scores_say_where_they_come_from() -> None:
    scores = score(ONE_LAYER, "ean")
    assert (scores.model_type, scores.layers, scores.top_k, scores.dataset) == ("mixtral", ("layers.0",), 1, "c4")


@pytest.mark.parametrize("criterion", [*CRITERIA, (0, 0, 0), "random"])
def test_scores_are_float64_and_own_their_memory(criterion: str | tuple[int, int, int]) -> None:
    before = ONE_LAYER.moments.clone()
    values = score(ONE_LAYER, criterion).values
    assert values.dtype == torch.float64
    values.fill_(-1)
    assert torch.equal(ONE_LAYER.moments, before)


def test_random_scores_repeat_with_their_seed() -> None:
    assert torch.equal(score(ONE_LAYER, "random", seed=3).values, score(ONE_LAYER, "random", seed=3).values)
    assert not torch.equal(score(ONE_LAYER, "random", seed=3).values, score(ONE_LAYER, "random", seed=4).values)


def test_random_scores_use_seed_zero_unless_told() -> None:
    scores = score(ONE_LAYER, "random")
    assert scores.criterion == "random(seed=0)"
    assert torch.equal(scores.values, score(ONE_LAYER, "random", seed=0).values)


def test_random_scores_leave_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    score(ONE_LAYER, "random", seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_moments_that_are_nan_show_in_the_score() -> None:
    stats = observed([[[(1.0, 1.0)], [(1.0, math.nan)]]])
    assert score(stats, "man").values.isnan().tolist() == [[False, True]]


def test_an_unknown_criterion_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"criterion: expected one of frequency, .*, or a triple S\(avg,a,b\), got 'mean'"
    ):
        score(ONE_LAYER, "mean")


@pytest.mark.parametrize("objective", ["", "general"])
def test_an_unknown_objective_is_refused_with_the_known_ones(objective: str) -> None:
    with pytest.raises(ValueError, match=f"objective: expected one of task-agnostic, task-specific, got '{objective}'"):
        score(ONE_LAYER, objective=objective)


@pytest.mark.parametrize("point", [(2, 0, 0), (-1, 0, 0), (0, 3, 0), (0, 0, -1), (0, 0), (0, 0, 0, 0), (0, 0.5, 0)])
def test_a_point_outside_the_family_is_refused(point: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"criterion: expected \(avg, a, b\) with avg in 0..1 and a, b in 0..2"):
        score(ONE_LAYER, point)


def test_criterion_and_objective_together_are_refused() -> None:
    with pytest.raises(ValueError, match="criterion 'ean' and objective 'task-agnostic': expected one of them"):
        score(ONE_LAYER, "ean", objective="task-agnostic")


def test_a_seed_for_a_criterion_that_draws_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="seed: only criterion 'random' takes one, got 0 with 'man'"):
        score(ONE_LAYER, seed=0)


@pytest.mark.parametrize("values", [torch.zeros(2, 3), torch.zeros(3, 3, dtype=torch.float64)])
def test_scores_of_another_shape_or_dtype_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"values: is .*; expected torch.float64 of shape \(2, E\)"):
        Scores(values, "man", Layout("mixtral", ("a", "b"), (4, 4), 2), "c4")


@pytest.mark.parametrize("spelled", ["S(0,1,1)", "S(0, 1, 1)"])
def test_a_triple_can_be_spelled_as_scores_spell_it(spelled: str) -> None:
    assert point_of(spelled) == point_of("weighted_ean") == point_of((0, 1, 1)) == (0, 1, 1)


@pytest.mark.parametrize("spelled", ["S(2,1,1)", "S(0,1,3)", "S(0,1)", "0,1,1", "s(0,1,1)", "S(0,1,1) "])
def test_a_triple_outside_the_family_or_misspelled_is_refused(spelled: str) -> None:
    with pytest.raises(ValueError, match="criterion: expected"):
        point_of(spelled)


# ---- outside the family


def with_outputs(layers: list[list[list[list[float]]]], tokens: list[int]) -> ExpertStatistics:
    """Statistics of layers of experts of routed tokens' outputs (H,)."""
    hidden = next(len(out) for experts in layers for outputs in experts for out in outputs)
    names = tuple(f"layers.{i}" for i in range(len(layers)))
    stats = ExpertStatistics.zeros("mixtral", names, len(layers[0]), 1, "g", hidden_size=hidden)
    assert stats.output_sum is not None
    for layer, experts in enumerate(layers):
        stats.tokens[layer] = tokens[layer]
        for expert, outputs in enumerate(experts):
            stats.moments[layer, expert, 0, 0] = len(outputs)
            for out in outputs:
                stats.moments[layer, expert, 0, 2] += sum(value**2 for value in out)
                stats.output_sum[layer, expert] += torch.tensor(out, dtype=torch.float64)
    return stats


def test_mone_by_hand() -> None:
    # Expert 0 of 5 tokens' 2: variances (2 - 0)^2 / 2 = 2 and (1 - 5)^2 / 2 = 8, root of their sum sqrt(10), frequency
    # 2 / 5. Expert 1 always gives the same; expert 2 saw one token, expert 3 none.
    layer = [[[0.0, 1.0], [2.0, 5.0]], [[3.0, 4.0]] * 2, [[7.0, 7.0]], []]
    values = score(with_outputs([layer], [5]), "mone").values
    torch.testing.assert_close(values, torch.tensor([[0.4 * math.sqrt(10), 0.0, 0.0, 0.0]]).double())


@given(data=st.data())
def test_mone_is_frequency_times_the_norm_of_the_standard_deviations(data: st.DataObject) -> None:
    out = st.lists(st.floats(-10, 10), min_size=3, max_size=3)
    outputs = data.draw(st.lists(out, min_size=2, max_size=6))
    value = score(with_outputs([[outputs, [[0.0] * 3]]], [10]), "mone").values[0, 0]
    expected = len(outputs) / 10 * torch.tensor(outputs, dtype=torch.float64).std(dim=0, correction=1).norm()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-6)  # sums of squares cancel: sqrt(1e-16 * 100)


@pytest.mark.parametrize("count", range(1, 8))
def test_mone_of_outputs_that_do_not_vary_is_0_but_for_rounding(count: int) -> None:
    constant = [[[0.1 * n, 0.7, 1.3 * n]] * count for n in range(1, 20)]
    values = score(with_outputs([constant], [10]), "mone").values
    # Sums of squares up to 5000 cancel: rounding leaves some 1e-12 of either sign, of which the root is taken.
    assert float(values.min()) >= 0
    assert float(values.max()) < (1e-5 if count > 1 else 1e-300)


def test_mone_without_sums_of_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"criterion 'mone' needs the sums of outputs: calibrate\(..., outputs=True\)"):
        score(ONE_LAYER, "mone")


def test_aimer_by_hand(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[0], experts.down_proj[0] = 0.5, -0.5  # mean |w| = RMS: the paper's score is 1, the highest
        experts.gate_up_proj[1], experts.down_proj[1] = 0.0, 2.0  # a third of the weights: 2 / 3 over 2 / sqrt(3)
        experts.gate_up_proj[2], experts.down_proj[2] = 0.0, 0.0
    scores = aimer(model)
    torch.testing.assert_close(scores.values[1, :3], torch.tensor([1.0, math.sqrt(3), 0.0]).double())
    weights = torch.cat([experts.gate_up_proj[3].flatten(), experts.down_proj[3].flatten()]).double()
    of_paper = float(weights.abs().mean() / weights.square().mean().sqrt())
    assert scores.values[1, 3].item() == pytest.approx(1 / of_paper)
    assert (scores.criterion, scores.model_type, scores.top_k) == ("aimer", "mixtral", 2)


def test_aimer_removes_the_highest_score_of_the_paper_first(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    made = plan(aimer(model), keep=7)
    for layer, block in enumerate(model.model.layers):
        of_paper = []
        for expert in range(8):
            tensors = (block.mlp.experts.gate_up_proj[expert], block.mlp.experts.down_proj[expert])
            weights = torch.cat([tensor.detach().flatten() for tensor in tensors]).double()
            of_paper.append(float(weights.abs().mean() / weights.square().mean().sqrt()))
        assert made.removed(layer) == (of_paper.index(max(of_paper)),)


def test_aimer_knows_the_groups_and_the_layers_sizes() -> None:
    model = build("deepseek_v3")
    scores = aimer(model)
    assert (scores.groups, scores.fewest, scores.experts) == (2, 6, (12, 12))
    with pytest.raises(ValueError, match="keep: 4 keeps 4 of 12 experts; expected 6 to 12"):
        plan(scores, keep=4)
    made = plan(scores, keep=8)
    for kept in made.keep:
        assert [sum(expert // 6 == group for expert in kept) for group in range(2)] == [4, 4]
    prune(model, plan_for(model, keep_of(model, "deepseek_v3", fewer=2)))
    scores = aimer(model)
    assert scores.experts == (8, 6)
    assert bool((scores.values[0] > 1).all())  # the root mean square is the larger mean
    assert scores.values[1, 6:].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="scores: the layers have 6 to 8 experts"):
        plan(scores, keep=6)


def test_scores_of_statistics_know_the_groups_and_the_layers_sizes() -> None:
    stats = ExpertStatistics.zeros("deepseek_v3", ("layers.1", "layers.2"), (6, 4), 2, "g", groups=2, fewest=4)
    scores = score(stats, "man")
    assert (scores.groups, scores.fewest, scores.experts) == (2, 4, (6, 4))


def test_aimer_of_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"aimer scores a model, not statistics: moe_ext.aimer\(model\)"):
        score(ONE_LAYER, "aimer")
