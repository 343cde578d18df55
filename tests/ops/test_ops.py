"""The operators against float64 brute force and transformers' own modules."""

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

from moe_ext import ops
from moe_ext.binary import _C
from tests.support.operators import BAD_EXPERTS, RUNNABLE_VARIANTS, gram_of
from tests.support.reference import (
    ACTIVATIONS,
    DEVICES,
    DTYPES,
    Arithmetic,
    ExpertsCase,
    arithmetic_of,
    assert_channels_within,
    assert_moments_within,
    assert_pairs_within,
    assert_within,
    experts_case,
    experts_reference,
    route_reference,
)


@st.composite
def experts_shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Half of them as the tensor cores take them: H and I multiples of 8, often of no larger power of 2."""
    num_experts = draw(st.integers(1, 9))
    size = st.integers(1, 17).map(lambda eights: 8 * eights) if draw(st.booleans()) else st.integers(1, 70)
    return {
        "tokens": draw(st.sampled_from([0, 1, 2, 3, 6, 7, 8, 9, 13, 16, 17, 33, 300])),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, num_experts)),
        "hidden": draw(size),
        "intermediate": draw(size),
        "seed": draw(st.integers(0, 1000)),
        "sentinels": draw(st.sampled_from([0.0, 0.5, 1.0])),
    }


# ---- experts


@pytest.mark.parametrize("device", DEVICES)
@given(shape=experts_shapes(), dtype=st.sampled_from(DTYPES), activation=st.sampled_from(ACTIVATIONS))
def test_experts_equals_float64_brute_force(
    device: str, shape: dict[str, Any], dtype: torch.dtype, activation: str
) -> None:
    case = experts_case(**shape, dtype=dtype, activation=activation)
    expected = experts_reference(case, arithmetic_of(case, device))
    got = ops.experts(*case.to(device).arguments())
    assert got.dtype == dtype
    assert_within(got, expected.out, expected.bound)


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_cpu_variant_equals_float64_brute_force(
    variant: str, dtype: torch.dtype, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    assert _C.active_cpu_variant() == variant
    case = experts_case(29, 3, 2, 75, 43, dtype=dtype, sentinels=0.2, activation=activation)
    expected = experts_reference(case, arithmetic_of(case, "cpu"))
    moments = torch.zeros(3, 3, 3, dtype=torch.float64)
    assert_within(ops.experts_observed(*case.arguments(), moments), expected.out, expected.bound)
    assert_moments_within(moments, expected)


def test_an_unknown_cpu_variant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", "sse9")
    known = "avx512_bf16, avx512, avx2, portable"
    with pytest.raises(RuntimeError, match=f"MOE_EXT_ISA=sse9 is unknown; the variants are {known}"):
        ops.experts(*experts_case(2, 2, 1, 8, 8).arguments())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_equals_transformers_eager(device: str, dtype: torch.dtype, tokens: int) -> None:
    config = MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    module = MixtralExperts(config).to(dtype).to(device)
    case = experts_case(tokens, 4, 2, 64, 96, dtype=dtype, sentinels=0.3).to(device)
    with torch.no_grad():
        module.gate_up_proj.copy_(case.gate_up)
        module.down_proj.copy_(case.down)
        eager = module(case.x, case.experts.long(), case.weights)
    # The eager path rounds to the dtype after each of its five steps (gate, act, product, down, sum): 8 roundings of
    # values of the output's size cover it.
    tolerance = 8 * {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    scale = float(eager.abs().max())
    torch.testing.assert_close(ops.experts(*case.arguments()), eager, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 1, 1), (5, 4, 4), (50, 2, 1), (1, 64, 8)])
def test_experts_handles_awkward_shapes(device: str, tokens: int, num_experts: int, top_k: int) -> None:
    case = experts_case(tokens, num_experts, top_k, 33, 17)
    expected = experts_reference(case)
    assert_within(ops.experts(*case.to(device).arguments()), expected.out, expected.bound)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [5, 37])
def test_all_tokens_on_one_expert_leave_the_others_unread(device: str, dtype: torch.dtype, tokens: int) -> None:
    case = experts_case(tokens, 5, 1, 24, 40, dtype=dtype)
    case.experts.fill_(3)
    expected = experts_reference(case, arithmetic_of(case, device))
    for expert in (0, 1, 2, 4):  # NaN weights would show in the output if they were read
        case.gate_up[expert], case.down[expert] = torch.nan, torch.nan
    assert_within(ops.experts(*case.to(device).arguments()), expected.out, expected.bound)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [4, 20])
def test_a_token_whose_slots_are_all_empty_gives_zeros(device: str, dtype: torch.dtype, tokens: int) -> None:
    case = experts_case(tokens, 3, 2, 16, 16, dtype=dtype)
    case.experts[2] = 3
    case.weights[2] = torch.nan  # whatever stands in an empty slot is not read
    got = ops.experts(*case.to(device).arguments())
    assert torch.equal(got[2].cpu(), torch.zeros(16, dtype=dtype))
    assert bool(got[[0, 1, 3]].isfinite().all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [9, 18])
def test_index_and_weight_dtypes_do_not_change_the_result(
    device: str, index_dtype: torch.dtype, dtype: torch.dtype, tokens: int
) -> None:
    case = experts_case(tokens, 4, 2, 32, 24, dtype=dtype).to(device)
    case.weights = case.weights.to(dtype)
    expected = ops.experts(case.x, case.gate_up, case.down, case.experts, case.weights.float(), "silu")
    got = ops.experts(case.x, case.gate_up, case.down, case.experts.to(index_dtype), case.weights, "silu")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [9, 18])
def test_strided_activations_and_routing_are_accepted(device: str, dtype: torch.dtype, tokens: int) -> None:
    case = experts_case(tokens, 4, 2, 32, 24, dtype=dtype).to(device)
    expected = ops.experts(*case.arguments())
    strided = ops.experts(
        case.x.T.contiguous().T, case.gate_up, case.down, case.experts.T.contiguous().T, case.weights.T.contiguous().T,
        "silu",
    )  # fmt: skip
    assert torch.equal(strided, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_logits_thresholds_and_masks_are_accepted(device: str) -> None:
    case = experts_case(9, 4, 2, 32, 24).to(device)
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(device)
    thresholds = torch.linspace(0.1, 0.9, 6, device=device)[::2]
    for got, expected in zip(
        ops.route(logits.T, 4, thresholds), ops.route(logits.T.contiguous(), 4, thresholds.contiguous()), strict=True
    ):
        assert torch.equal(got, expected)
    counted = (torch.arange(18, device=device) % 3 == 0)[::2]
    moments = torch.zeros(2, 4, 3, 3, dtype=torch.float64, device=device)
    ops.experts_observed(*case.arguments(), moments[0], counted)
    ops.experts_observed(*case.arguments(), moments[1], counted.contiguous())
    assert torch.equal(moments[0], moments[1])
    assert float(moments[0, :, 0, 0].sum()) == 2 * int(counted.sum())


def test_many_tokens_on_torchs_threads_equal_their_parts() -> None:
    # Large enough for several workers in every pass, and for more than one run of kTokensPerRun tokens.
    case = experts_case(4500, 8, 2, 48, 16)
    logits = torch.randn(4500, 64, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for _ in range(5):  # a race shows in some runs only
            moments = torch.zeros(8, 3, 3, dtype=torch.float64)
            out = ops.experts_observed(*case.arguments(), moments)
            weights, experts = ops.route(logits, 6)
            part_moments = torch.zeros(8, 3, 3, dtype=torch.float64)
            torch.set_num_threads(1)
            for first in range(0, 4500, 500):
                part = slice(first, first + 500)
                expected = ops.experts_observed(
                    case.x[part], case.gate_up, case.down, case.experts[part], case.weights[part], "silu", part_moments
                )
                assert torch.equal(out[part], expected)
                part_weights, part_experts = ops.route(logits[part], 6)
                assert torch.equal(weights[part], part_weights)
                assert torch.equal(experts[part], part_experts)
            torch.testing.assert_close(moments, part_moments, rtol=1e-12, atol=0)
            torch.set_num_threads(4)
    finally:
        torch.set_num_threads(threads)


def test_a_row_has_the_same_bits_in_any_batch_and_for_any_number_of_threads() -> None:
    case = experts_case(150, 4, 2, 160, 96, dtype=torch.bfloat16)
    expected = ops.experts(*case.arguments())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.experts(*case.arguments()), expected)
    finally:
        torch.set_num_threads(threads)
    for row in (0, 77, 149):
        one = ops.experts(
            case.x[row : row + 1], case.gate_up, case.down, case.experts[row : row + 1], case.weights[row : row + 1],
            "silu",
        )  # fmt: skip
        assert torch.equal(one[0], expected[row])


@st.composite
def odd_cases(draw: st.DrawFn) -> ExpertsCase:
    """H and I of every remainder of a vector, batches that fill tiles of every height."""
    num_experts = draw(st.integers(1, 8))
    return experts_case(
        draw(st.integers(2, 45)),
        num_experts,
        draw(st.integers(1, num_experts)),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 70)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
        sentinels=draw(st.sampled_from([0.0, 0.3])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
    )


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@given(case=odd_cases(), height=st.integers(2, 7))
def test_a_tokens_bits_do_not_depend_on_its_batch(variant: str, case: ExpertsCase, height: int) -> None:
    tokens, num_experts = case.x.shape[0], case.down.shape[0]
    with patch.dict(os.environ, MOE_EXT_ISA=variant):
        moments, of_tokens = torch.zeros(2, num_experts, 3, 3, dtype=torch.float64)
        out = ops.experts_observed(*case.arguments(), moments)
        gram = gram_of(case)
        for token in range(tokens):
            one, of_token = case.tokens(slice(token, token + 1)), torch.zeros_like(moments)
            assert torch.equal(ops.experts_observed(*one.arguments(), of_token)[0], out[token])
            assert torch.equal(gram_of(one)[0], gram[token])
            of_tokens += of_token  # in the order of the tokens, as within a batch
        assert torch.equal(of_tokens, moments)
        for first in range(0, tokens, height):
            rows = slice(first, first + height)
            assert torch.equal(ops.experts(*case.tokens(rows).arguments()), out[rows])


@given(
    tokens=st.integers(2, 130),
    num_experts=st.sampled_from([1, 2, 8, 60, 257]),
    top_k=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    renormalise=st.booleans(),
    skipping=st.booleans(),
)
def test_a_tokens_routing_does_not_depend_on_its_batch(
    tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, renormalise: bool, skipping: bool
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    top_k = min(top_k, num_experts)
    logits = torch.randn(tokens, num_experts, generator=generator).to(dtype)
    thresholds = torch.rand(top_k - 1, generator=generator) if skipping else None
    weights, experts = ops.route(logits, top_k, thresholds, renormalise)
    for token in range(tokens):
        one = ops.route(logits[token : token + 1], top_k, thresholds, renormalise)
        assert torch.equal(one[0][0], weights[token])
        assert torch.equal(one[1][0], experts[token])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [12, 24])
def test_nan_and_infinity_in_x_reach_their_own_rows_only(device: str, dtype: torch.dtype, tokens: int) -> None:
    case = experts_case(tokens, 3, 2, 40, 24, dtype=dtype)
    expected = ops.experts(*case.to(device).arguments())
    case.x[4, 7], case.x[9, 0] = torch.nan, torch.inf
    got = ops.experts(*case.to(device).arguments())
    clean = [row for row in range(tokens) if row not in (4, 9)]
    assert torch.equal(got[clean], expected[clean])
    assert bool(got[4].isnan().all())
    assert not bool(got[9].isfinite().any())


# ---- experts_observed


@pytest.mark.parametrize("device", DEVICES)
@given(shape=experts_shapes(), dtype=st.sampled_from(DTYPES), masked=st.booleans())
def test_moments_equal_float64_brute_force(
    device: str, shape: dict[str, Any], dtype: torch.dtype, masked: bool
) -> None:
    case = experts_case(**shape, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    counted = torch.rand(shape["tokens"], generator=generator) < 0.6 if masked else None
    start = torch.rand(shape["num_experts"], 3, 3, dtype=torch.float64, generator=generator)
    moments = start.clone().to(device)
    moved = case.to(device)
    got = ops.experts_observed(*moved.arguments(), moments, None if counted is None else counted.to(device))
    assert torch.equal(got, ops.experts(*moved.arguments()))
    # The arithmetic depends on the batch, the moments on its counted tokens.
    arithmetic = arithmetic_of(case, device)
    expected = experts_reference(case if counted is None else case.tokens(counted), arithmetic)
    assert_moments_within(moments, expected, start)
    if device == "cpu" and arithmetic == Arithmetic():
        # Norms are float32 sums of squares of float32 outputs: 2^-17 relative covers 136 terms, twice for ||f||^2.
        torch.testing.assert_close(moments, start + expected.moments, rtol=2.0**-16, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@given(shape=experts_shapes(), dtype=st.sampled_from(DTYPES), masked=st.booleans())
def test_energies_of_channels_equal_float64_brute_force(
    device: str, shape: dict[str, Any], dtype: torch.dtype, masked: bool
) -> None:
    case = experts_case(**shape, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    counted = torch.rand(shape["tokens"], generator=generator) < 0.6 if masked else None
    moments = torch.zeros(2, shape["num_experts"], 3, 3, dtype=torch.float64, device=device)
    start = torch.rand(shape["num_experts"], shape["intermediate"], dtype=torch.float64, generator=generator)
    channels, moved = start.clone().to(device), case.to(device)
    moved_counted = None if counted is None else counted.to(device)
    got = ops.experts_observed(*moved.arguments(), moments[0], moved_counted, channels)
    assert torch.equal(got, ops.experts_observed(*moved.arguments(), moments[1], moved_counted))
    assert torch.equal(moments[0], moments[1])
    arithmetic = arithmetic_of(case, device)
    expected = experts_reference(case if counted is None else case.tokens(counted), arithmetic)
    assert_channels_within(channels, expected, start)
    unreached = torch.bincount(case.experts.flatten(), minlength=shape["num_experts"] + 1)[:-1] == 0
    assert torch.equal(channels.cpu()[unreached], start[unreached])


@pytest.mark.parametrize("device", DEVICES)
@given(shape=experts_shapes(), dtype=st.sampled_from(DTYPES), masked=st.booleans())
def test_products_of_pairs_equal_float64_brute_force(
    device: str, shape: dict[str, Any], dtype: torch.dtype, masked: bool
) -> None:
    case = experts_case(**shape, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    counted = torch.rand(shape["tokens"], generator=generator) < 0.6 if masked else None
    moments = torch.zeros(2, shape["num_experts"], 3, 3, dtype=torch.float64).to(device)
    start = torch.rand(shape["num_experts"], shape["num_experts"], dtype=torch.float64, generator=generator)
    start = start + start.T
    pairs, moved = start.clone().to(device), case.to(device)
    there = None if counted is None else counted.to(device)
    got = ops.experts_observed(*moved.arguments(), moments[0], there, None, pairs)
    assert torch.equal(got, ops.experts_observed(*moved.arguments(), moments[1], there))
    assert torch.equal(moments[0], moments[1])
    expected = experts_reference(case if counted is None else case.tokens(counted), arithmetic_of(case, device))
    assert_pairs_within(pairs, expected, start)
    assert torch.equal(pairs, pairs.T)
    # An expert with itself: the moment of g^2 ||f||^2, whose parts are summed in another order.
    torch.testing.assert_close((pairs - start.to(device)).diagonal(), moments[0][:, 2, 2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_products_of_pairs_do_not_see_padding_threads_or_batches(device: str) -> None:
    case = experts_case(200, 6, 3, 64, 48, sentinels=0.3)
    counted = torch.arange(200) % 3 > 0
    case.x[0] = float("nan")
    case.weights[3] = float("inf")
    moved, threads = case.to(device), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            moments, pairs = torch.zeros(6, 3, 3).double().to(device), torch.zeros(6, 6).double().to(device)
            ops.experts_observed(*moved.arguments(), moments, counted.to(device), None, pairs)
            results.append(pairs.cpu())
    finally:
        torch.set_num_threads(threads)
    assert_pairs_within(results[0], experts_reference(case.tokens(counted), arithmetic_of(case, device)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_energies_of_channels_do_not_see_padding_or_threads(dtype: torch.dtype) -> None:
    case = experts_case(200, 4, 2, 64, 48, dtype=dtype)
    counted = torch.arange(200) % 3 > 0
    case.x[0] = float("nan")
    case.weights[3] = float("inf")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            moments, channels = torch.zeros(4, 3, 3).double(), torch.zeros(4, 48).double()
            ops.experts_observed(*case.arguments(), moments, counted, channels)
            results.append(channels)
    finally:
        torch.set_num_threads(threads)
    assert_channels_within(results[0], experts_reference(case.tokens(counted), arithmetic_of(case, "cpu")))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_moments_have_the_same_bits_for_any_number_of_threads() -> None:
    case = experts_case(200, 4, 2, 64, 48)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            moments = torch.zeros(4, 3, 3, dtype=torch.float64)
            ops.experts_observed(*case.arguments(), moments)
            results.append(moments)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- route


@pytest.mark.parametrize("device", DEVICES)
@given(
    tokens=st.sampled_from([0, 1, 5, 70]),
    num_experts=st.sampled_from([1, 2, 8, 32, 33, 60, 64, 65, 130, 257, 512]),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    renormalise=st.booleans(),
    skipping=st.booleans(),
)
def test_route_equals_brute_force(
    device: str,
    tokens: int,
    num_experts: int,
    data: st.DataObject,
    dtype: torch.dtype,
    renormalise: bool,
    skipping: bool,
) -> None:
    top_k = data.draw(st.integers(1, min(num_experts, data.draw(st.sampled_from([9, 40])))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = (torch.randn(tokens, num_experts, generator=generator) * 2).to(dtype)
    thresholds = torch.rand(top_k - 1, generator=generator) if skipping else None
    weights, experts = ops.route(
        logits.to(device), top_k, None if thresholds is None else thresholds.to(device), renormalise
    )
    expected_weights, expected_experts = route_reference(logits, top_k, thresholds, renormalise)
    assert weights.dtype == torch.float32
    assert experts.dtype == torch.int64
    assert experts.cpu().tolist() == expected_experts
    expected = torch.tensor(expected_weights, dtype=torch.float64).reshape(tokens, top_k)
    # exp to 2 ulp, a sum over E and two divisions in float32.
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=(num_experts + 8) * 2.0**-24, atol=1e-30)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("renormalise", [True, False])
def test_route_over_hundreds_of_experts_loses_no_more_than_over_a_few(device: str, renormalise: bool) -> None:
    num_experts = 600 if device == "cpu" else 512
    for top_k in (8, num_experts):
        # Multiples of 1/64, of which float32 takes differences exactly.
        logits = torch.randint(-128, 128, (3, num_experts), generator=torch.Generator().manual_seed(top_k)) / 64
        weights, experts = ops.route(logits.to(device), top_k, None, renormalise)
        expected = logits.double().softmax(-1).gather(1, experts.cpu())
        if renormalise:
            expected /= expected.sum(-1, keepdim=True)
        # exp to 2 ulp in up to four places and four roundings; CUDA sums 16 of a lane and then 32 lanes in float32.
        rounding = (20 if device == "cpu" else 20 + 2 * 21) * 2.0**-24
        torch.testing.assert_close(weights.cpu().double(), expected, rtol=rounding, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_route_equals_transformers_router(device: str, dtype: torch.dtype) -> None:
    config = MixtralConfig(hidden_size=48, num_local_experts=8, num_experts_per_tok=2)
    router = MixtralTopKRouter(config).to(device).to(dtype)
    torch.nn.init.normal_(router.weight, std=0.3, generator=torch.Generator(device).manual_seed(0))
    x = torch.randn(100, 48, generator=torch.Generator().manual_seed(1)).to(device).to(dtype)
    with torch.no_grad():
        logits, weights, experts = router(x)
    distinct = logits.float().sort(-1).values.diff(dim=-1).min(-1).values > 0  # equal logits may rank either way there
    got_weights, got_experts = ops.route(logits, 2)
    assert torch.equal(got_experts[distinct], experts[distinct])
    torch.testing.assert_close(got_weights, weights, rtol=2e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_equal_logits_rank_by_expert_index(device: str) -> None:
    _, experts = ops.route(torch.zeros(3, 6, device=device), 4)
    assert experts.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_of_either_sign_rank_by_expert_index(device: str) -> None:
    _, experts = ops.route(torch.tensor([[-0.0, 0.0, -1.0, -0.0, 0.0]], device=device), 4)
    assert experts.tolist() == [[0, 1, 3, 4]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("renormalise", [True, False])
def test_nan_logits_reach_the_weights_of_their_token_only(device: str, renormalise: bool) -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(device)
    expected, _ = ops.route(logits, 3, None, renormalise)
    logits[1, 4] = torch.nan
    logits[2] = torch.nan
    weights, experts = ops.route(logits, 3, torch.full((2,), 0.5, device=device), renormalise)
    assert bool(weights[[1, 2]].isnan().all())
    for row in experts.tolist():
        chosen = [expert for expert in row if expert != 6]
        assert len(set(chosen)) == len(chosen)
        assert all(0 <= expert < 6 for expert in chosen)
    unskipped, _ = ops.route(logits, 3, None, renormalise)
    torch.testing.assert_close(unskipped[[0, 3]], expected[[0, 3]], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_threshold_of_one_skips_all_slots_but_the_first(device: str) -> None:
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).to(device)
    weights, experts = ops.route(logits, 4, torch.ones(3, device=device))
    assert torch.equal(experts[:, 0], logits.argmax(-1))
    assert bool((experts[:, 1:] == 8).all())
    assert torch.equal(weights.cpu(), torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(20, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_very_large_and_very_small_logits_do_not_overflow(device: str) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3.1e38]], device=device)
    weights, experts = ops.route(logits, 2)
    assert weights.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert experts.tolist() == [[0, 2], [0, 1]]


# ---- how torch sees the operators


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck(device: str, dtype: torch.dtype, check: str) -> None:
    case = experts_case(5, 4, 2, 16, 24, dtype=dtype, sentinels=0.5).to(device)
    logits = torch.randn(5, 4).to(dtype).to(device)
    moments = torch.zeros(4, 3, 3, dtype=torch.float64).to(device)
    counted = torch.tensor([True, False, True, True, False]).to(device)
    channels = torch.zeros(4, 24, dtype=torch.float64).to(device)
    pairs = torch.zeros(4, 4, dtype=torch.float64).to(device)
    for operator, arguments in (
        (torch.ops.moe_ext.route, (logits, 2)),
        (torch.ops.moe_ext.route, (logits, 2, torch.rand(1).to(device), False)),
        (torch.ops.moe_ext.experts, case.arguments()),
        (torch.ops.moe_ext.experts_observed, (*case.arguments(), moments)),
        (torch.ops.moe_ext.experts_observed, (*case.arguments(), moments, counted)),
        (torch.ops.moe_ext.experts_observed, (*case.arguments(), moments, counted, channels)),
        (torch.ops.moe_ext.experts_observed, (*case.arguments(), moments, counted, None, pairs)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=check)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_compile_without_graph_breaks(device: str, dtype: torch.dtype) -> None:
    case = experts_case(6, 4, 2, 16, 24, dtype=dtype).to(device)
    logits = torch.randn(6, 4).to(device)
    thresholds = torch.full((1,), 0.5).to(device)

    def layer(logits: torch.Tensor, x: torch.Tensor, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = ops.route(logits, 2, thresholds)
        out = ops.experts(x, case.gate_up, case.down, experts, weights, "silu")
        return out, ops.experts_observed(x, case.gate_up, case.down, experts, weights, "silu", moments)

    moments = [torch.zeros(4, 3, 3, dtype=torch.float64).to(device) for _ in range(2)]
    expected = layer(logits, case.x, moments[0])
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(logits, case.x, moments[1])
    for a, b in zip((*got, moments[1]), (*expected, moments[0]), strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    assert float(moments[1].cpu()[:, 0, 0].sum()) >= 6


def differentiated(namespace: Any) -> list[tuple[str, Callable[[torch.Tensor], Any], torch.Tensor]]:
    """Every operator of moe_ext.ops or of torch.ops.moe_ext as a function of one of its inputs, and that input."""
    case = experts_case(3, 2, 1, 8, 8)
    x, gate_up, down, experts, weights, activation = case.arguments()
    moments = torch.zeros(2, 3, 3, dtype=torch.float64)
    ranks, keep = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    scores, distances = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    return [
        ("route", lambda logits: namespace.route(logits, 2)[0], torch.ones(3, 4)),
        ("experts", lambda x: namespace.experts(x, gate_up, down, experts, weights, activation), x),
        ("experts", lambda gate_up: namespace.experts(x, gate_up, down, experts, weights, activation), gate_up),
        ("experts", lambda weights: namespace.experts(x, gate_up, down, experts, weights, activation), weights),
        (
            "experts_observed",
            lambda down: namespace.experts_observed(x, gate_up, down, experts, weights, activation, moments),
            down,
        ),
        ("expert_gram", lambda x: namespace.expert_gram(x, gate_up, down, activation), x),
        ("expert_projection", lambda g: namespace.expert_projection(x, gate_up, down, g, activation), x),
        ("subset_errors", lambda distances: namespace.subset_errors(distances, ranks, scores, keep, 1), distances),
        ("projected_errors", lambda values: namespace.projected_errors(values, ranks, scores, keep, 1), scores),
    ]


@pytest.mark.parametrize("namespace", [ops, torch.ops.moe_ext], ids=["ops", "torch.ops"])
def test_gradients_and_tangents_are_refused_where_they_are_required(namespace: Any) -> None:
    for name, function, value in differentiated(namespace):
        refused = pytest.raises(NotImplementedError, match=f"{name}: an input requires gradients or carries a tangent")
        tangent = torch.ones_like(value)
        expected = function(value)
        with refused:
            function(value.clone().requires_grad_())
        with refused:
            torch.func.grad(lambda value, f=function: f(value).sum())(value)
        with refused:
            torch.func.jvp(function, (value,), (tangent,))
        if name != "experts_observed":  # torch refuses to run what writes into its arguments under vmap
            with refused:
                torch.func.jvp(torch.func.vmap(function), (value[None],), (tangent[None],))
            with refused:
                torch.func.jacfwd(function)(value)
        with forward_ad.dual_level():
            assert torch.equal(function(value), expected)
            with refused, torch.no_grad():  # which forward mode does not heed
                function(forward_ad.make_dual(value, tangent))
        with torch.no_grad():
            assert torch.equal(function(value.clone().requires_grad_()), expected)
        with torch.inference_mode():
            assert torch.equal(function(value), expected)


def test_in_place_moments_of_functionalize_are_refused() -> None:
    arguments = experts_case(3, 2, 1, 8, 8).arguments()
    moments = torch.zeros(2, 3, 3, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="experts_observed: 'moments' is updated in place"):
        torch.func.functionalize(lambda moments: ops.experts_observed(*arguments, moments))(moments)
    assert not bool(moments.any())
    functional = torch.func.functionalize(lambda x: ops.experts(x, *arguments[1:]))(arguments[0])
    assert torch.equal(functional, ops.experts(*arguments))


# ---- fake kernels


@pytest.mark.parametrize(("change", "message"), BAD_EXPERTS)
def test_fake_kernels_refuse_what_the_kernels_refuse(change: dict[str, Any], message: str) -> None:
    case = experts_case(5, 4, 2, 16, 24)
    for name, value in change.items():
        setattr(case, name, value)
    case = case.to("meta")
    with pytest.raises(RuntimeError, match="experts: " + message):
        ops.experts(*case.arguments())
    with pytest.raises(RuntimeError, match="experts_observed: " + message):
        ops.experts_observed(*case.arguments(), torch.zeros(4, 3, 3, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("inputs", ["first", "second"])
def test_meta_tensors_and_others_do_not_mix(inputs: str) -> None:
    case = experts_case(5, 4, 2, 16, 24)
    x, gate_up, down, experts, weights, activation = case.arguments()
    moments, counted = torch.zeros(4, 3, 3, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    ranks, keep = torch.tensor([[0, 1, 2]]), torch.ones(1, 4, dtype=torch.bool)
    scores = torch.ones(1, 3, dtype=torch.float64)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (ops.route, (torch.ones(5, 4), 2, torch.ones(1))),
        (ops.experts, (x, gate_up, down, experts, weights, activation)),
        (ops.experts_observed, (x, gate_up, down, experts, weights, activation, moments, counted)),
        (ops.expert_gram, (x, gate_up, down, activation)),
        (ops.expert_projection, (x, gate_up, down, x, activation)),
        (ops.subset_errors, (scores, ranks, scores, keep, 2, torch.ones(1))),
        (ops.projected_errors, (scores, ranks, scores, keep, 2, torch.ones(1))),
    ]
    for operator, arguments in calls:
        tensors = [index for index, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)]
        for moved in tensors:
            chosen = [moved] if inputs == "first" else [index for index in tensors if index != moved]
            mixed = [arg.to("meta") if index in chosen else arg for index, arg in enumerate(arguments)]
            message = rf"{operator.__name__}: '\w+' is on (cpu|meta); expected (cpu|meta) like"
            with pytest.raises(RuntimeError, match=message):
                operator(*mixed)
        meta = operator(*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in arguments))
        real = operator(*arguments)
        pairs = zip(meta, real, strict=True) if isinstance(meta, tuple) else [(meta, real)]
        for got, expected in pairs:
            assert got.device.type == "meta"
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


# ---- bad input: a message that names the argument, and nothing changed


# On CUDA the host would have to wait for the indices: there the kernels assert them (tests/ops/test_cuda.py).
BAD_INDICES: list[tuple[dict[str, Any], str]] = [
    ({"experts": torch.full((5, 2), 5)}, "'experts' holds 5 at token 0, slot 0; expected 0 to 4"),
    ({"experts": torch.tensor([[0, 1]] * 4 + [[2, -1]])}, "'experts' holds -1 at token 4, slot 1; expected 0 to 4"),
]


@pytest.mark.parametrize(
    ("device", "change", "message"),
    [(device, *bad) for device in DEVICES for bad in BAD_EXPERTS] + [("cpu", *bad) for bad in BAD_INDICES],
)
def test_experts_refuses_bad_input(device: str, change: dict[str, Any], message: str) -> None:
    case = experts_case(5, 4, 2, 16, 24)
    for name, value in change.items():
        setattr(case, name, value)
    # A moved tensor keeps its strides: what is not contiguous on the CPU is not on the device either.
    case = case.to(device)
    with pytest.raises(RuntimeError, match="experts: " + message):
        ops.experts(*case.arguments())
    moments = torch.full((4, 3, 3), 7.0, dtype=torch.float64).to(device)
    with pytest.raises(RuntimeError, match="experts_observed: " + message):
        ops.experts_observed(*case.arguments(), moments)
    assert bool((moments == 7.0).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("moments", "counted", "message"),
    [
        (torch.zeros(3, 3, 3).double(), None, r"'moments' has shape \(3, 3, 3\); expected \(4, 3, 3\)"),
        (torch.zeros(4, 3, 3), None, "'moments' has dtype float32; expected float64"),
        (torch.zeros(3, 3, 4).double().permute(2, 0, 1), None, "'moments' is not contiguous"),
        (torch.zeros(4, 3, 3).double(), torch.ones(4).bool(), r"'counted' has shape \(4,\); expected \(5,\)"),
        (torch.zeros(4, 3, 3).double(), torch.ones(5), "'counted' has dtype float32; expected bool"),
    ],
)
def test_experts_observed_refuses_bad_accumulators(
    device: str, moments: torch.Tensor, counted: torch.Tensor | None, message: str
) -> None:
    case = experts_case(5, 4, 2, 16, 24).to(device)
    with pytest.raises(RuntimeError, match="experts_observed: " + message):
        ops.experts_observed(*case.arguments(), moments.to(device), None if counted is None else counted.to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (torch.zeros(4, 23).double(), r"'channels' has shape \(4, 23\); expected \(4, 24\) = \(E, I\)"),
        (torch.zeros(4, 24), "'channels' has dtype float32; expected float64"),
        (torch.zeros(24, 4).double().T, "'channels' is not contiguous"),
    ],
)
def test_experts_observed_refuses_bad_channels(device: str, channels: torch.Tensor, message: str) -> None:
    case = experts_case(5, 4, 2, 16, 24).to(device)
    moments = torch.zeros(4, 3, 3).double().to(device)
    with pytest.raises(RuntimeError, match="experts_observed: " + message):
        ops.experts_observed(*case.arguments(), moments, None, channels.to(device))
    assert not bool(moments.any())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (torch.zeros(4, 3).double(), r"'pairs' has shape \(4, 3\); expected \(4, 4\) = \(E, E\)"),
        (torch.zeros(4, 4), "'pairs' has dtype float32; expected float64"),
        (torch.zeros(4, 8).double()[:, ::2], "'pairs' is not contiguous"),
    ],
)
def test_experts_observed_refuses_bad_pairs(device: str, pairs: torch.Tensor, message: str) -> None:
    moments = torch.zeros(4, 3, 3).double().to(device)
    # Not pairs.to(device), which is contiguous.
    pairs = torch.empty_strided(pairs.shape, pairs.stride(), dtype=pairs.dtype, device=device).zero_()
    with pytest.raises(RuntimeError, match="experts_observed: " + message):
        ops.experts_observed(*experts_case(5, 4, 2, 16, 24).to(device).arguments(), moments, None, None, pairs)
    assert not bool(moments.any())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("logits", "top_k", "thresholds", "message"),
    [
        (torch.zeros(4), 1, None, r"'logits' has shape \(4,\); expected 2 dimensions \(T, E\)"),
        (torch.zeros(2, 4).long(), 1, None, "'logits' has dtype int64"),
        (torch.zeros(2, 4), 0, None, "'top_k' is 0; expected 1 to 4"),
        (torch.zeros(2, 4), 5, None, "'top_k' is 5; expected 1 to 4"),
        (torch.zeros(2, 4), 2**62, None, f"'top_k' is {2**62}; expected 1 to 4"),
        (torch.zeros(2, 4), 3, torch.zeros(3), r"'thresholds' has shape \(3,\); expected \(2,\) = \(top_k - 1,\)"),
        (torch.zeros(2, 4), 3, torch.zeros(2).double(), "'thresholds' has dtype float64; expected float32"),
    ],
)
def test_route_refuses_bad_input(
    device: str, logits: torch.Tensor, top_k: int, thresholds: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(RuntimeError, match="route: " + message):
        ops.route(logits.to(device), top_k, None if thresholds is None else thresholds.to(device))


# Found by tests/fuzz/operators.py: what torch's dispatcher refuses, at any length, before a kernel sees it.
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"down": None}, TypeError, "'down' is of type NoneType; expected Tensor"),
        ({"weights": [[0.25] * 1000]}, TypeError, "'weights' is of type list; expected Tensor"),
        ({"counted": 3}, TypeError, r"'counted' is of type int; expected Optional\[Tensor\]"),
        ({"moments": None}, TypeError, "'moments' is of type NoneType; expected Tensor"),
        ({"moments": torch._neg_view(torch.zeros(4, 3, 3).double())}, ValueError, "'moments' is a negated view"),
        (
            {"x": torch.zeros(5, 16).to_sparse()},
            TypeError,
            "'x' is of layout torch.sparse_coo; expected a dense tensor",
        ),
        ({"activation": 1}, TypeError, "'activation' is of type int; expected str"),
        ({"activation": "\ud800"}, ValueError, r"'activation' is '\\ud800'; expected one of silu, gelu, gelu_tanh"),
        ({"activation": "s" * 10000}, RuntimeError, r"'activation' is \"sss"),
    ],
)
def test_what_no_kernel_sees_is_refused_by_name_in_a_line(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, gate_up, down, experts, weights, activation = experts_case(5, 4, 2, 16, 24).arguments()
    arguments: dict[str, Any] = {"x": x, "gate_up": gate_up, "down": down, "experts": experts, "weights": weights}
    arguments |= {"activation": activation, "moments": torch.zeros(4, 3, 3, dtype=torch.float64)}
    arguments |= {"channels": torch.zeros(4, 24).double(), "pairs": torch.zeros(4, 4).double()}
    with pytest.raises(error, match="experts_observed: " + message) as refused:
        ops.experts_observed(**(arguments | change))
    assert len(str(refused.value)) < 200
    assert not arguments["channels"].any()
    assert not arguments["pairs"].any()


def test_sizes_beyond_memory_are_refused() -> None:
    many = 2**40
    case = experts_case(1, 2, 1, 8, 8)
    x, experts, weights = (tensor.expand(many, -1) for tensor in (case.x, case.experts, case.weights))
    with pytest.raises(RuntimeError, match=rf"route: torch gave no memory for .* 'logits' of shape \({many}, 8\)"):
        ops.route(x, 2)
    with pytest.raises(RuntimeError, match=rf"experts: torch gave no memory for .* 'x' of shape \({many}, 8\)"):
        ops.experts(x, case.gate_up, case.down, experts, weights, "silu")
    with pytest.raises(RuntimeError, match=rf"experts: torch gave no memory for .* 'experts' of shape \(1, {many}\)"):
        ops.experts(case.x, case.gate_up, case.down, experts.T, weights.T, "silu")
    with pytest.raises(RuntimeError, match=r"expert_gram: torch gave no memory for .* 'x'"):
        ops.expert_gram(x, case.gate_up, case.down, "silu")
    one, keep = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    ranks, none = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"subset_errors: torch gave no memory for .* 'keep'"):
        ops.subset_errors(none, ranks, one, keep.expand(many, -1), 1)
