"""Products of whole numbers: quantised weights by activations in eight bits, ``activation_type="int8"``."""

import os
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_ext import ops
from tests.ops.test_formulas import accumulators
from tests.ops.test_projection import gradient, projection_of
from tests.ops.test_weights import drawn_case
from tests.support.operators import RUNNABLE_VARIANTS, gram_of
from tests.support.quantised_layers import FORMATS, QuantisedCase, quantised_case
from tests.support.reference import (
    DTYPES,
    Arithmetic,
    ExpertsCase,
    assert_channels_within,
    assert_moments_within,
    assert_pairs_within,
    assert_within,
    experts_reference,
)

WHOLE = [name for name, form in FORMATS.items() if form.weight_type != "fp8"]


def in_bytes(case: QuantisedCase) -> QuantisedCase:
    packed = replace(case.packed, options={**case.packed.options, "activation_type": "int8"})
    return QuantisedCase(packed, case.plain)


def assert_equals_brute_force(case: QuantisedCase) -> None:
    """Sums are float32 of every 32 to 128 columns, whatever the variant multiplies other activations in."""
    packed = in_bytes(case).packed
    arithmetic = Arithmetic(y=packed.x.dtype)
    expected = experts_reference(case.plain, arithmetic, eight_bits=True)
    sums = accumulators(case.plain)
    out = ops.experts_observed(*packed.arguments(), **{**sums, **packed.options})
    assert torch.equal(out, ops.experts(*packed.arguments(), **packed.options))
    assert_within(out, expected.out, expected.bound)
    assert_moments_within(sums["moments"], expected)
    assert_channels_within(sums["channels"], expected)
    assert_pairs_within(sums["pairs"], expected)


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize("name", WHOLE)
def test_every_cpu_variant_equals_float64_brute_force(variant: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    for dtype in DTYPES:
        assert_equals_brute_force(quantised_case(FORMATS[name], 29, 3, 2, 275, 339, dtype=dtype, sentinels=0.2))


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
def test_whole_lines_of_mxfp4_and_exponents_that_are_no_floats(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    case = quantised_case(FORMATS["mxfp4"], 6, 3, 2, 256, 384)
    assert_equals_brute_force(case)
    packed = in_bytes(case).packed
    packed.down[:, 1:5] = packed.down[:, :1]
    scales, x = packed.options["down_scales"], packed.x.clone()
    scales[:, :5] = torch.tensor([0, 1, 126, 254, 126]).to(torch.uint8)[:, None]
    scales[:, 4, 7] = 255
    packed.x.copy_(x * 2.0**40)
    out = ops.experts(*packed.arguments(), **packed.options)
    assert torch.equal(out[:, 0] * 2, out[:, 1])
    assert bool(out[:, 0].count_nonzero())
    packed.x.copy_(x * 2.0**-20)
    out = ops.experts(*packed.arguments(), **packed.options)
    assert torch.equal(out[:, 2] * 2.0**64 * 2.0**64, out[:, 3])
    assert bool(out[:, 4].isnan().all())
    assert bool(out[:, [3, 5]].isfinite().all())


@st.composite
def cases(draw: st.DrawFn) -> QuantisedCase:
    form = FORMATS[draw(st.sampled_from(WHOLE))]
    if form.weight_type == "int4":
        scales = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        sizes, zeros = st.sampled_from([32, 64, 128]), draw(st.booleans())
        form = replace(form, group_size=draw(sizes), scales=scales, zeros=zeros)
    return drawn_case(draw, form)


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@settings(max_examples=40)
@given(case=cases())
def test_formulas_odd_sizes_and_routings_equal_float64_brute_force(variant: str, case: QuantisedCase) -> None:
    with patch.dict(os.environ, MOE_EXT_ISA=variant):
        assert_equals_brute_force(case)


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize("name", WHOLE)
def test_a_tokens_bits_depend_neither_on_its_batch_nor_on_threads(
    variant: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    threads = torch.get_num_threads()
    case = in_bytes(quantised_case(FORMATS[name], 21, 2, 2, 1100, 75)).packed
    case.experts[:, 0], case.experts[13:, 1] = 0, 2  # one expert has all tokens, another 13
    whole, g = ops.experts(*case.arguments(), **case.options), gradient(case)
    projected = projection_of(case, g)
    for tokens in (1, 2, 3, 5, 8):
        few = case.tokens(slice(4, 4 + tokens))
        assert torch.equal(ops.experts(*few.arguments(), **few.options), whole[4 : 4 + tokens])
        assert torch.equal(projection_of(few, g[4 : 4 + tokens]), projected[4 : 4 + tokens])
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.experts(*case.arguments(), **case.options), whole)
        assert torch.equal(projection_of(case, g), projected)
    finally:
        torch.set_num_threads(threads)


def outputs(case: ExpertsCase) -> Tensor:
    """(T, E, H) float64: every expert's output for every token."""
    tokens, num_experts = case.x.shape[0], case.down.shape[0]
    columns = []
    for expert in range(num_experts):
        one = torch.full((tokens, 1), expert)
        given = (case.x, case.gate_up, case.down, one, torch.ones(tokens, 1), case.activation)
        columns.append(ops.experts(*given, **case.options))
    return torch.stack(columns, 1).double()


@pytest.mark.parametrize("name", WHOLE)
def test_gram_and_projection_are_of_the_same_outputs(name: str) -> None:
    case = in_bytes(quantised_case(FORMATS[name], 9, 3, 2, 140, 200)).packed
    y, g = outputs(case), gradient(case)
    torch.testing.assert_close(gram_of(case), y @ y.mT, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(projection_of(case, g), (y @ g.double()[:, :, None])[..., 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_number_reaches_its_token_alone(variant: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    case = in_bytes(quantised_case(FORMATS[name], 4, 2, 1, 200, 140)).packed
    before = ops.experts(*case.arguments(), **case.options)
    case.x[1, 150], case.x[2, 3] = torch.nan, torch.inf
    after = ops.experts(*case.arguments(), **case.options)
    assert bool(after[1:3].isnan().all())
    assert torch.equal(after[[0, 3]], before[[0, 3]])


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize("name", WHOLE)
def test_zeros_and_numbers_near_the_smallest_give_zero(
    variant: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    case = in_bytes(quantised_case(FORMATS[name], 2, 2, 1, 200, 140)).packed
    case.x[0], case.x[1] = 0.0, 2.0**-149
    assert not bool(ops.experts(*case.arguments(), **case.options).count_nonzero())


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("int8", {"activation_type": "int4"}, '\'activation_type\' is "int4"; expected "int8", or none'),
    ("fp8", {}, "'activation_type' is given with weights that are no whole numbers; expected weight_type \"int8\", "),
    ("fp8-blocks", {}, "'activation_type' is given with weights that are no whole numbers"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_refusals(device: str, name: str, change: dict[str, Any], message: str) -> None:
    case = in_bytes(quantised_case(FORMATS[name], 5, 4, 2, 16, 40)).packed.to(device)
    with pytest.raises(RuntimeError, match=f"experts: {message}"):
        ops.experts(*case.arguments(), **{**case.options, **change})


def test_float_weights_and_other_types_are_refused() -> None:
    plain = quantised_case(FORMATS["int8"], 5, 4, 2, 16, 40).plain
    layer = (plain.x, plain.gate_up.float(), plain.down.float(), plain.experts, plain.weights, "silu")
    with pytest.raises(RuntimeError, match="experts: 'activation_type' is given with weights that are no whole number"):
        ops.experts(*layer, activation_type="int8")
    with pytest.raises(TypeError, match="experts: 'activation_type' is of type int; expected Optional"):
        ops.experts(*layer, activation_type=8)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_refuses_it() -> None:
    case = in_bytes(quantised_case(FORMATS["int8"], 5, 4, 2, 16, 40)).packed.to("cuda")
    with pytest.raises(RuntimeError, match="experts: 'activation_type' is \"int8\"; CUDA kernels multiply activations"):
        ops.experts(*case.arguments(), **case.options)


@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck(check: str) -> None:
    packed = in_bytes(quantised_case(FORMATS["int4-32-bf16-zeros"], 5, 4, 2, 16, 24, sentinels=0.5)).packed
    torch.library.opcheck(torch.ops.moe_ext.experts, packed.arguments(), packed.options, test_utils=check)
