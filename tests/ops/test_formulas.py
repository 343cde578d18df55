"""Every operator on experts with biases, other layouts and other formulas, against float64 brute force."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_ext import ops
from moe_ext.binary import _C
from tests.ops.test_projection import assert_equals_brute_force, gradient, projection_of
from tests.support.operators import FORMULAS, RUNNABLE_VARIANTS, assert_gram_equals_brute_force, gram_of
from tests.support.reference import (
    DEVICES,
    DTYPES,
    ExpertsCase,
    arithmetic_of,
    assert_channels_within,
    assert_moments_within,
    assert_pairs_within,
    assert_within,
    experts_case,
    experts_reference,
)


def accumulators(case: ExpertsCase) -> dict[str, Any]:
    num_experts, device = len(case.down), case.x.device
    shapes = {
        "moments": (num_experts, 3, 3),
        "channels": (num_experts, case.intermediate),
        "pairs": (num_experts, num_experts),
    }
    return {name: torch.zeros(shape, dtype=torch.float64).to(device) for name, shape in shapes.items()}


def assert_all_equal_brute_force(case: ExpertsCase, device: str = "cpu") -> None:
    expected = experts_reference(case, arithmetic_of(case, device))
    there = case.to(device)
    sums = accumulators(there)
    out = ops.experts_observed(*there.arguments(), **{**sums, **there.options})
    assert torch.equal(out, ops.experts(*there.arguments(), **there.options))
    assert_within(out, expected.out, expected.bound)
    assert_moments_within(sums["moments"], expected)
    assert_channels_within(sums["channels"], expected)
    assert_pairs_within(sums["pairs"], expected)
    few = case.tokens(slice(0, 19))
    assert_gram_equals_brute_force(few, device)
    assert_equals_brute_force(few, gradient(few), device)


@st.composite
def cases(draw: st.DrawFn) -> ExpertsCase:
    num_experts = draw(st.integers(1, 5))
    size = st.integers(1, 17).map(lambda eights: 8 * eights) if draw(st.booleans()) else st.integers(1, 140)
    return experts_case(
        draw(st.sampled_from([0, 1, 2, 7, 16, 17, 50])),
        num_experts,
        draw(st.integers(1, num_experts)),
        draw(size),
        draw(size),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
        sentinels=draw(st.sampled_from([0.0, 0.5, 1.0])),
        **FORMULAS[draw(st.sampled_from(sorted(FORMULAS)))],
    )


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases())
def test_every_operator_equals_float64_brute_force(device: str, case: ExpertsCase) -> None:
    assert_all_equal_brute_force(case, device)


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize("name", FORMULAS)
def test_every_cpu_variant_equals_float64_brute_force(variant: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    assert _C.active_cpu_variant() == variant
    for dtype in DTYPES:
        assert_all_equal_brute_force(experts_case(29, 3, 2, 75, 107, dtype=dtype, sentinels=0.2, **FORMULAS[name]))


def test_rows_longer_than_a_chunk_are_added_up() -> None:
    for dtype in DTYPES:
        assert_all_equal_brute_force(experts_case(9, 2, 1, 1100, 530, dtype=dtype, **FORMULAS["gpt_oss"]))


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@settings(max_examples=15)
@given(case=cases())
def test_a_tokens_bits_depend_neither_on_its_batch_nor_on_threads(variant: str, case: ExpertsCase) -> None:
    g = gradient(case)
    threads = torch.get_num_threads()
    with patch.dict(os.environ, MOE_EXT_ISA=variant):
        whole = ops.experts(*case.arguments(), **case.options), gram_of(case), projection_of(case, g)
        for token in range(0, len(g), 3):
            one = case.tokens(slice(token, token + 1))
            assert torch.equal(ops.experts(*one.arguments(), **one.options)[0], whole[0][token])
            assert torch.equal(gram_of(one)[0], whole[1][token])
            assert torch.equal(projection_of(one, g[token : token + 1])[0], whole[2][token])
        try:
            torch.set_num_threads(3)
            assert torch.equal(ops.experts(*case.arguments(), **case.options), whole[0])
            assert torch.equal(projection_of(case, g), whole[2])
        finally:
            torch.set_num_threads(threads)


def test_gates_beyond_the_limit_and_what_is_no_number_come_through() -> None:
    case = experts_case(3, 1, 1, 4, 4, **FORMULAS["minimax_m3_vl"])
    case.x[0], case.x[1, 0] = 1e4, torch.nan
    out = ops.experts(*case.arguments(), **case.options)
    expected = experts_reference(case.tokens(slice(0, 1)))
    assert_within(out[:1], expected.out, expected.bound)
    assert bool(out[1].isnan().all())
    assert bool(out[2].isfinite().all())


def test_an_interleaved_layer_equals_the_one_whose_rows_are_in_order() -> None:
    case = experts_case(20, 3, 2, 40, 35, dtype=torch.bfloat16)
    gate, up = case.gate_up.chunk(2, dim=1)
    turned = torch.stack((gate, up), dim=2).flatten(1, 2)
    got = ops.experts(*replace(case, gate_up=turned).arguments(), interleaved=True)
    assert torch.equal(got, ops.experts(*case.arguments()))


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"limit": 0.0}, "'limit' is 0; expected more than 0, or none"),
    ({"limit": float("nan")}, "'limit' is nan; expected more than 0"),
    ({"gate_cap": -1.5}, "'gate_cap' is -1.5; expected more than 0"),
    ({"up_cap": float("inf")}, "'up_cap' is inf; expected more than 0"),
    ({"alpha": float("inf")}, "'alpha' is inf; expected a finite number"),
    ({"up_offset": float("nan")}, "'up_offset' is nan; expected a finite number"),
    ({"limit_after": True}, "'limit_after' is given without 'limit'"),
    ({"alpha": 2.0, "activation": "gelu"}, '\'alpha\' is given with activation "gelu"; it belongs to "silu"'),
    ({"gate_cap": 2.0, "activation": "relu2"}, "'gate_cap' is given with activation \"relu2\""),
    ({"gated": False}, r"'down' has shape \(4, 16, 24\); expected \(4, 16, 48\) = \(E, H, I\)"),
    ({"gated": False, "interleaved": True}, "'interleaved' is given with gated=False; it belongs to experts with a"),
    ({"gated": False, "limit": 2.0}, "'limit' is given with gated=False"),
    ({"transposed": True}, r"'gate_up' has shape \(4, 48, 16\); expected \(4, 16, 16\) = \(E, H, 2I\) with H"),
    ({"gate_up_bias": torch.zeros(4, 24)}, r"'gate_up_bias' has shape \(4, 24\); expected \(4, 48\) = \(E, 2I\)"),
    ({"gate_up_bias": torch.zeros(4, 48).half()}, "'gate_up_bias' has dtype float16; expected float32"),
    ({"gate_up_bias": torch.zeros(48, 4).T}, r"'gate_up_bias' is not contiguous; pass gate_up_bias.contiguous\(\)"),
    ({"down_bias": torch.zeros(16)}, r"'down_bias' has shape \(16,\); expected \(4, 16\) = \(E, H\)"),
]


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize(("change", "message"), BAD_OPTIONS)
def test_every_operator_refuses_bad_options(device: str, change: dict[str, Any], message: str) -> None:
    case = experts_case(5, 4, 2, 16, 24)
    options: dict[str, Any] = {
        key: value.to(device) if isinstance(value, Tensor) else value for key, value in change.items()
    }
    case = replace(case, activation=options.pop("activation", "silu")).to(device)
    moments = torch.full((4, 3, 3), 2.0, dtype=torch.float64, device=device)
    layer = (case.x, case.gate_up, case.down)
    operators: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = [
        (ops.experts, case.arguments()),
        (ops.experts_observed, (*case.arguments(), moments)),
        (ops.expert_gram, (*layer, case.activation)),
        (ops.expert_projection, (*layer, case.x, case.activation)),
    ]
    for operator, arguments in operators:
        with pytest.raises(RuntimeError, match=f"{operator.__name__}: {message}"):
            operator(*arguments, **options)
    assert device == "meta" or bool((moments == 2.0).all())


def test_an_unknown_option_and_one_of_another_type_are_refused() -> None:
    case = experts_case(5, 4, 2, 16, 24)
    with pytest.raises(TypeError, match="experts: got an unexpected argument 'biased'; known options are gate_up_bias"):
        ops.experts(*case.arguments(), biased=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="experts: 'limit' is of type str; expected Optional"):
        ops.experts(*case.arguments(), limit="7")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h"])
@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck(device: str, name: str, check: str) -> None:
    case = experts_case(5, 4, 2, 16, 24, sentinels=0.5, **FORMULAS[name]).to(device)
    layer, sums = (case.x, case.gate_up, case.down), accumulators(case)
    for operator, arguments, named in (
        (torch.ops.moe_ext.experts, case.arguments(), {}),
        (torch.ops.moe_ext.experts_observed, case.arguments(), sums),
        (torch.ops.moe_ext.expert_gram, (*layer, case.activation), {}),
        (torch.ops.moe_ext.expert_projection, (*layer, case.x, case.activation), {}),
    ):
        torch.library.opcheck(operator, arguments, {**named, **case.options}, test_utils=check)


@pytest.mark.parametrize("device", DEVICES)
def test_options_compile_without_graph_breaks(device: str) -> None:
    case = experts_case(6, 4, 2, 16, 24, **FORMULAS["gpt_oss"]).to(device)

    def layer(x: Tensor) -> Tensor:
        return ops.experts(x, case.gate_up, case.down, case.experts, case.weights, "silu", **case.options)

    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(case.x)
    assert torch.equal(got.cpu(), layer(case.x).cpu())


def test_a_bias_that_requires_gradients_is_refused() -> None:
    case = experts_case(5, 4, 2, 16, 24, **FORMULAS["gpt_oss"])
    case.options["down_bias"].requires_grad_()
    with pytest.raises(NotImplementedError, match="experts: an input requires gradients"):
        ops.experts(*case.arguments(), **case.options)
