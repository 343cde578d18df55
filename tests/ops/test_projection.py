"""expert_projection and projected_errors against float64 brute force."""

import itertools
import os
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_ext import ops
from tests.ops.test_gram import brute_force_error
from tests.support.operators import BAD_EXPERTS, RUNNABLE_VARIANTS
from tests.support.reference import (
    ACTIVATIONS,
    DEVICES,
    DTYPES,
    ExpertsCase,
    arithmetic_of,
    assert_within,
    experts_case,
    projection_reference,
)


def gradient(case: ExpertsCase, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(case.x.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def projection_of(case: ExpertsCase, g: Tensor) -> Tensor:
    return ops.expert_projection(case.x, case.gate_up, case.down, g, case.activation, **case.options)


def assert_equals_brute_force(case: ExpertsCase, g: Tensor, device: str = "cpu") -> None:
    # CUDA's choice by shape rounds as any of the grouped kernels, also for few tokens.
    expected, bound = projection_reference(case, g, arithmetic_of(case, device, "tall"))
    got = projection_of(case.to(device), g.to(device))
    assert got.dtype == torch.float64
    assert got.shape == expected.shape == (case.x.shape[0], case.down.shape[0])
    assert_within(got, expected, bound)


@st.composite
def projections(draw: st.DrawFn) -> tuple[ExpertsCase, Tensor]:
    """H and I of every remainder of a vector, batches that fill tiles of every height, g of both dtypes."""
    dtype = draw(st.sampled_from(DTYPES))
    case = experts_case(
        draw(st.sampled_from([0, 1, 2, 5, 16, 17, 33, 45])),
        draw(st.integers(1, 9)),
        1,
        draw(st.integers(1, 140)),
        draw(st.integers(1, 70)),
        dtype=dtype,
        seed=draw(st.integers(0, 1000)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
    )
    return case, gradient(case, draw(st.sampled_from([torch.float32, dtype])))


@pytest.mark.parametrize("device", DEVICES)
@given(drawn=projections())
def test_projection_equals_float64_brute_force(device: str, drawn: tuple[ExpertsCase, Tensor]) -> None:
    assert_equals_brute_force(*drawn, device)


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_of_every_cpu_variant_equals_brute_force(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    case = experts_case(19, 5, 1, 75, 43, dtype=dtype)
    assert_equals_brute_force(case, gradient(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_tokens_than_a_part_and_more_experts_than_a_group(dtype: torch.dtype) -> None:
    case = experts_case(2050, 3, 1, 8, 16, dtype=dtype)  # parts have 2048 tokens at most
    assert_equals_brute_force(case, gradient(case))
    # 512 tokens of 32768 channels fill h, an expert at a time; the others of the 520 are a part of their own.
    wide = experts_case(520, 3, 1, 2, 32768, dtype=dtype)
    g = gradient(wide)
    got, few = projection_of(wide, g), wide.tokens(torch.tensor([0, 511, 512, 519]))
    expected, bound = projection_reference(few, g[[0, 511, 512, 519]], arithmetic_of(few, "cpu"))
    assert_within(got[[0, 511, 512, 519]], expected, bound)


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@given(drawn=projections())
def test_a_tokens_bits_depend_neither_on_its_batch_nor_on_threads(
    variant: str, drawn: tuple[ExpertsCase, Tensor]
) -> None:
    case, g = drawn
    threads = torch.get_num_threads()
    with patch.dict(os.environ, MOE_EXT_ISA=variant):
        got = projection_of(case, g)
        for token in range(len(g)):
            one = slice(token, token + 1)
            assert torch.equal(projection_of(case.tokens(one), g[one])[0], got[token])
        try:
            torch.set_num_threads(3)
            assert torch.equal(projection_of(case, g), got)
        finally:
            torch.set_num_threads(threads)


def test_many_tokens_on_several_threads_have_the_same_bits() -> None:
    case = experts_case(150, 6, 1, 160, 96, dtype=torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(projection_of(case, gradient(case)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_weighted_sum_of_projections_is_that_of_the_layers_output() -> None:
    case = experts_case(23, 6, 3, 40, 24)
    g = gradient(case)
    weights = torch.zeros(23, 6, dtype=torch.float64).scatter_(1, case.experts.long(), case.weights.double())
    got = (weights * projection_of(case, g)).sum(1)
    expected = (ops.experts(*case.arguments()).double() * g.double()).sum(1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("of_g", [False, True])
def test_nan_reaches_the_projections_of_its_own_token_only(device: str, of_g: bool) -> None:
    case = experts_case(9, 3, 1, 40, 24)
    g = gradient(case)
    expected = projection_of(case.to(device), g.to(device))
    (g if of_g else case.x)[4, 7] = torch.nan
    got = projection_of(case.to(device), g.to(device))
    clean = [row for row in range(9) if row != 4]
    assert torch.equal(got[clean], expected[clean])
    assert bool(got[4].isnan().all())


@pytest.mark.parametrize("device", DEVICES)
def test_strided_activations_and_gradients_are_accepted(device: str) -> None:
    case = experts_case(9, 4, 1, 32, 24).to(device)
    g = gradient(case).to(device)
    strided = replace(case, x=case.x.T.contiguous().T)
    assert torch.equal(projection_of(strided, g.T.contiguous().T), projection_of(case, g))


BAD_G: list[tuple[Tensor, str]] = [
    (torch.zeros(5), r"'g' has shape \(5,\); expected \(5, 16\) = \(T, H\) like 'x'"),
    (torch.zeros(4, 16), r"'g' has shape \(4, 16\); expected \(5, 16\)"),
    (torch.zeros(5, 16).half(), "'g' has dtype float16; expected float32"),
    (torch.zeros(5, 16).double(), "'g' has dtype float64; expected float32"),
]


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize(("g", "message"), BAD_G)
def test_bad_gradients_are_refused(device: str, g: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match="expert_projection: " + message):
        projection_of(experts_case(5, 4, 2, 16, 24).to(device), g.to(device))


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize(
    ("change", "message"),
    [bad for bad in BAD_EXPERTS if set(bad[0]) <= {"x", "gate_up", "down", "activation"}],
)
def test_bad_layers_are_refused(device: str, change: dict[str, Any], message: str) -> None:
    case = replace(experts_case(5, 4, 2, 16, 24), **change).to(device)
    with pytest.raises(RuntimeError, match="expert_projection: " + message):
        projection_of(case, torch.zeros(5, 16, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck_of_projection(device: str, dtype: torch.dtype, check: str) -> None:
    case = experts_case(5, 4, 2, 16, 24, dtype=dtype).to(device)
    for g in (gradient(case).to(device), gradient(case, dtype).to(device)):
        arguments = (case.x, case.gate_up, case.down, g, "silu")
        torch.library.opcheck(torch.ops.moe_ext.expert_projection, arguments, test_utils=check)


def test_projection_compiles_without_graph_breaks() -> None:
    case = experts_case(6, 4, 2, 16, 24)
    g = gradient(case)

    def layer(x: Tensor) -> Tensor:
        return ops.expert_projection(x, case.gate_up, case.down, g, "silu") * 2

    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(case.x)
    assert torch.equal(got, layer(case.x))


# ---- projected_errors


def ranking(
    tokens: int, num_experts: int, depth: int, seed: int = 0
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Projections (T, E), logits (T, E), and the operator's projections, ranks and scores of them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, num_experts, dtype=torch.float64, generator=generator)
    logits = torch.randn(tokens, num_experts, dtype=torch.float64, generator=generator)
    ranks = logits.argsort(dim=1, descending=True)[:, :depth]
    return values, logits, (values.gather(1, ranks), ranks, logits.gather(1, ranks).exp())


def all_that_drop(num_experts: int, dropped: int) -> Tensor:
    drops = list(itertools.combinations(range(num_experts), dropped))
    keep = torch.ones(len(drops), num_experts, dtype=torch.bool)
    for row, drop in zip(keep, drops, strict=True):
        row[list(drop)] = False
    return keep


@given(
    num_experts=st.integers(1, 8),
    data=st.data(),
    tokens=st.sampled_from([0, 1, 7, 30]),
    skipping=st.booleans(),
    seed=st.integers(0, 999),
)
def test_projected_errors_equal_brute_force(
    num_experts: int, data: st.DataObject, tokens: int, skipping: bool, seed: int
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    dropped = data.draw(st.integers(0, num_experts - top_k))
    depth = data.draw(st.integers(top_k + dropped, num_experts))
    values, logits, ranked = ranking(tokens, num_experts, depth, seed)
    keep = all_that_drop(num_experts, dropped)
    thresholds = torch.linspace(0.2, 0.9, top_k - 1) if skipping else None
    got = ops.projected_errors(*ranked, keep, top_k, thresholds)
    expected = [brute_force_error(values[:, :, None], logits, subset, top_k, thresholds) for subset in keep]
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-24 * max(tokens, 1)
    )


def test_projected_errors_have_the_same_bits_for_any_number_of_threads_and_other_subsets() -> None:
    _, _, ranked = ranking(3000, 9, 9)
    # So many that what a token can come to use is worked out first; of three, it is not.
    keep = torch.cat([all_that_drop(9, dropped) for dropped in range(5)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.projected_errors(*ranked, keep, 3)
        torch.set_num_threads(4)
        assert torch.equal(ops.projected_errors(*ranked, keep, 3), expected)
        assert torch.equal(ops.projected_errors(*ranked, keep[50:53], 3), expected[50:53])
    finally:
        torch.set_num_threads(threads)


def test_what_changes_no_weight_or_goes_to_an_equal_expert_has_no_error() -> None:
    _, _, (projections, ranks, scores) = ranking(20, 4, 4)
    keep = all_that_drop(4, 2)
    assert not bool(ops.projected_errors(torch.full_like(projections, 3.7), ranks, scores, keep, 2).any())
    assert ops.projected_errors(projections, ranks, scores, torch.ones(1, 4, dtype=torch.bool), 2).tolist() == [0.0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"projections": torch.zeros(3, 6).double()},
            r"'projections' has shape \(3, 6\); expected \(3, 4\) = \(T, N\)",
        ),
        ({"projections": torch.zeros(3, 4)}, "'projections' has dtype float32; expected float64"),
        ({"ranks": torch.zeros(3, 4)}, "'ranks' has dtype float32; expected int64"),
        ({"scores": torch.zeros(3, 5).double()}, r"'scores' has shape \(3, 5\); expected \(3, 4\)"),
        ({"keep": torch.ones(2, 3).bool()}, "'ranks' has N = 4 ranks a token; expected at most 3"),
        ({"top_k": 5}, "'top_k' is 5; expected 1 to 4"),
        ({"thresholds": torch.zeros(2)}, r"'thresholds' has shape \(2,\); expected \(1,\) = \(top_k - 1,\)"),
    ],
)
def test_projected_errors_refuses_bad_input(device: str, change: dict[str, Any], message: str) -> None:
    projections, ranks, scores = ranking(3, 5, 4)[2]
    arguments: dict[str, Any] = {"projections": projections, "ranks": ranks, "scores": scores, "top_k": 2}
    arguments |= {"keep": torch.ones(2, 5, dtype=torch.bool), **change}
    moved: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    with pytest.raises(RuntimeError, match="projected_errors: " + message):
        ops.projected_errors(**moved)


@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck_of_projected_errors(check: str) -> None:
    ranked = ranking(6, 5, 4)[2]
    keep = torch.tensor([[True] * 5, [True, False, True, False, True]])
    for thresholds in (None, torch.tensor([0.5])):
        arguments = (*ranked, keep, 2, thresholds)
        torch.library.opcheck(torch.ops.moe_ext.projected_errors, arguments, test_utils=check)
