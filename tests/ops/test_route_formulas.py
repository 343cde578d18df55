"""route with every formula against plain Python floats, a token at a time."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_ext import ops
from tests.support.reference import DEVICES, DTYPES


def score_of(row: list[float], score: str) -> list[float]:
    if score == "softmax":
        total = sum(math.exp(value - max(row)) for value in row)
        return [math.exp(value - max(row)) / total for value in row]
    if score == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in row]
    return [math.sqrt(math.log1p(math.exp(value))) for value in row]


def reference(
    logits: Tensor,
    top_k: int,
    thresholds: Tensor | None,
    renormalise: bool,
    score: str,
    bias: Tensor | None,
    by_logits: bool,
    groups: int,
    groups_per_token: int,
    group_best: int,
    outside_zero: bool,
    epsilon: float,
    least: float,
    scale: float,
) -> tuple[list[list[float]], list[list[int]], list[bool]]:
    """Weights and experts (T, K), and whether choices and weights lie so far apart that float32 ranks them alike."""
    num_experts = logits.shape[1]
    size, distance = num_experts // groups, math.inf
    all_weights, all_experts, clear = [], [], []

    def ranked(values: list[float], wanted: int) -> list[int]:
        nonlocal distance
        order = sorted(range(len(values)), key=lambda index: (-values[index], index))
        for a, b in itertools.pairwise(order[: wanted + 1]):
            if values[a] != values[b]:
                distance = min(distance, values[a] - values[b])
        return order[:wanted]

    for row in logits.double().tolist():
        distance = math.inf
        scores = score_of(row, score)
        plain = score == "softmax" and bias is None and groups == 1
        offsets = [0.0] * num_experts if bias is None else bias.double().tolist()
        base = row if by_logits or plain else scores
        choices = [value + offset for value, offset in zip(base, offsets, strict=True)]
        if groups > 1:
            members = [choices[group * size : (group + 1) * size] for group in range(groups)]
            sums = [sum(sorted(values, reverse=True)[:group_best]) for values in members]
            chosen = ranked(sums, groups_per_token)
            outside = 0.0 if outside_zero else -math.inf
            choices = [value if e // size in chosen else outside for e, value in enumerate(choices)]
        experts = ranked(choices, top_k)
        weights = [scores[e] for e in experts]
        full = sum(weights)
        if thresholds is not None:
            order = ranked(weights, top_k)
            for rank, slot in enumerate(order[1:]):
                ratio = float(thresholds[rank]) * weights[order[0]]
                distance = min(distance, abs(weights[slot] - ratio))
            skipped = [slot for rank, slot in enumerate(order[1:])
                       if weights[slot] < float(thresholds[rank]) * weights[order[0]]]  # fmt: skip
            for slot in skipped:
                weights[slot], experts[slot] = 0.0, num_experts
            weights = [weight * full / sum(weights) for weight in weights]
        if renormalise:
            weights = [weight / max(full + epsilon, least) for weight in weights]
        all_weights.append([weight * scale for weight in weights])
        all_experts.append(experts)
        clear.append(distance > 1e-5)
    return all_weights, all_experts, clear


@st.composite
def formulas(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes, and the operator's arguments for them."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    size = draw(st.integers(1, 24))
    num_experts = groups * size
    groups_per_token = draw(st.integers(1, groups))
    formula = {
        "renormalise": draw(st.booleans()),
        "score": draw(st.sampled_from(ops.SCORES)),
        "by_logits": draw(st.booleans()),
        "groups": groups,
        "groups_per_token": groups_per_token,
        "group_best": draw(st.integers(1, min(size, 3))),
        "outside_zero": draw(st.booleans()),
        "epsilon": draw(st.sampled_from([0.0, 1e-20, 1e-6, 0.1])),
        "least": draw(st.sampled_from([0.0, 1e-12, 0.7])),
        "scale": draw(st.sampled_from([1.0, 2.5, 0.5])),
    }
    sizes = {
        "tokens": draw(st.sampled_from([0, 1, 2, 5, 70])),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, groups_per_token * size)),
        "corrected": draw(st.booleans()),
        "skipping": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }
    return sizes, formula


@pytest.mark.parametrize("device", DEVICES)
@given(case=formulas(), dtype=st.sampled_from(DTYPES))
def test_route_equals_brute_force_whatever_the_formula(
    device: str, case: tuple[dict[str, Any], dict[str, Any]], dtype: torch.dtype
) -> None:
    sizes, formula = case
    generator = torch.Generator().manual_seed(sizes["seed"])
    num_experts, top_k = sizes["num_experts"], sizes["top_k"]
    logits = (torch.randn(sizes["tokens"], num_experts, generator=generator) * 2).to(dtype)
    bias = torch.randn(num_experts, generator=generator) * 0.3 if sizes["corrected"] else None
    thresholds = torch.rand(top_k - 1, generator=generator) if sizes["skipping"] else None
    weights, experts, clear = reference(logits, top_k, thresholds, bias=bias, **formula)
    moved = [None if each is None else each.to(device) for each in (thresholds, bias)]
    got, chosen = ops.route(logits.to(device), top_k, moved[0], bias=moved[1], **formula)
    assert got.shape == chosen.shape == (len(logits), top_k)
    assert chosen.cpu()[clear].tolist() == [row for row, alike in zip(experts, clear, strict=True) if alike]
    expected = torch.tensor(weights, dtype=torch.float64).reshape(len(logits), top_k)[clear]
    # Exponentials of differences up to 16 and sums of K of them: a few 2^-20, as for softmax alone.
    torch.testing.assert_close(got.cpu()[clear].double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ops.SCORES)
@pytest.mark.parametrize("groups", [1, 2])
def test_equal_choices_take_the_lower_expert(device: str, score: str, groups: int) -> None:
    of_groups: dict[str, Any] = {"groups": groups, "groups_per_token": 1, "group_best": 2}
    bias = torch.zeros(8).to(device)
    weights, experts = ops.route(torch.zeros(3, 8).to(device), 3, score=score, bias=bias, **of_groups)
    assert experts.tolist() == [[0, 1, 2]] * 3
    torch.testing.assert_close(weights.cpu(), torch.full((3, 3), 1 / 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ops.SCORES)
def test_a_nan_reaches_the_output_and_no_other_token(device: str, score: str) -> None:
    logits = torch.randn(3, 6)
    logits[1, 4] = torch.nan
    weights, experts = ops.route(logits.to(device), 2, score=score, bias=torch.zeros(6).to(device), groups=2,
                                 groups_per_token=1, group_best=2)  # fmt: skip
    assert weights[1].isnan().any()
    assert bool(weights[[0, 2]].isfinite().all())
    assert bool(((experts >= 0) & (experts < 6)).all())


@pytest.mark.parametrize("device", DEVICES)
def test_all_slots_skipped_but_the_heaviest_which_need_not_come_first(device: str) -> None:
    logits, bias = torch.tensor([[0.0, 3.0, 1.0, -2.0]]), torch.tensor([5.0, 0.0, 0.0, 0.0])
    weights, experts = ops.route(
        logits.to(device), 3, torch.ones(2).to(device), score="sigmoid", bias=bias.to(device), scale=2.0
    )
    assert experts.tolist() == [[4, 1, 4]]
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.0, 2.0, 0.0]]))


@pytest.mark.parametrize("device", DEVICES)
def test_scores_that_vanish_stay_zero_where_the_sum_has_an_epsilon(device: str) -> None:
    logits = torch.full((2, 4), -200.0).to(device)
    weights, _ = ops.route(logits, 2, torch.full((1,), 0.5).to(device), score="sigmoid", epsilon=1e-20)
    assert weights.tolist() == [[0.0, 0.0]] * 2
    assert bool(ops.route(logits, 2, score="sigmoid")[0].isnan().all())  # 0 / 0, as the family's code has it


@pytest.mark.parametrize("device", DEVICES)
def test_strided_arguments_and_threads_change_nothing(device: str) -> None:
    logits, bias = torch.randn(400, 32), torch.randn(32)
    formula: dict[str, Any] = {"score": "sigmoid", "groups": 4, "groups_per_token": 2, "group_best": 2}
    expected = ops.route(logits.to(device), 5, bias=bias.to(device), **formula)
    wide = torch.stack([bias, bias], dim=1)[:, 0]
    got = ops.route(logits.T.contiguous().T.to(device), 5, bias=wide.to(device), **formula)
    one = ops.route(logits[17:18].to(device), 5, bias=bias.to(device), **formula)
    for a, b, c in zip(got, expected, one, strict=True):
        assert torch.equal(a.cpu(), b.cpu())
        assert torch.equal(c.cpu(), b[17:18].cpu())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"score": "tanh"}, r'\'score\' is "tanh"; expected "softmax", "sigmoid" or "sqrtsoftplus"'),
    ({"bias": torch.zeros(7)}, r"'bias' has shape \(7,\); expected \(8,\) = \(E,\) with E from 'logits'"),
    ({"bias": torch.zeros(8, dtype=torch.float64)}, "'bias' has dtype float64; expected float32"),
    ({"groups": 3}, "'groups' is 3; expected a divisor of 8, the number of experts"),
    ({"groups": 0}, "'groups' is 0; expected a divisor of 8"),
    ({"groups": 4, "groups_per_token": 1}, "'groups_per_token' is 1; expected 2 to 4, which hold 'top_k' experts"),
    ({"groups": 4, "groups_per_token": 5}, "'groups_per_token' is 5; expected 2 to 4"),
    ({"groups": 2, "groups_per_token": 1, "group_best": 5}, "'group_best' is 5; expected 1 to 4, the experts of a"),
    ({"epsilon": -1.0}, "'epsilon' is -1; expected a number from 0 on"),
    ({"least": math.inf}, "'least' is inf; expected a number from 0 on"),
    ({"scale": math.nan}, "'scale' is nan; expected a finite number"),
]


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_arguments_are_named(device: str, bad: dict[str, Any], message: str) -> None:
    moved: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in bad.items()
    }
    with pytest.raises(RuntimeError, match=f"route: {message}"):
        ops.route(torch.randn(2, 8).to(device), 3, **moved)


def test_values_of_other_types_are_named() -> None:
    with pytest.raises(TypeError, match="route: 'scale' is of type str; expected float"):
        ops.route(torch.randn(2, 8), 3, scale="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="route: 'bias' is of type list"):
        ops.route(torch.randn(2, 8), 3, bias=[0.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck(device: str, check: str) -> None:
    logits, bias = torch.randn(5, 8).to(device), torch.randn(8).to(device)
    thresholds = torch.rand(2).to(device)
    for more in (
        (None, True, "sigmoid", bias),
        (thresholds, False, "sqrtsoftplus", None, True),
        (thresholds, True, "sigmoid", bias, False, 2, 1, 2, True, 1e-20, 1e-12, 2.5),
    ):
        torch.library.opcheck(torch.ops.moe_ext.route, (logits, 3, *more), test_utils=check)
