"""Every operator on quantised weights against float64 brute force on the weights that they stand for; and packing."""

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
from tests.ops.test_formulas import accumulators
from tests.ops.test_projection import gradient, projection_of
from tests.support.operators import FORMULAS, RUNNABLE_VARIANTS, gram_of
from tests.support.quantised_layers import FORMATS, Format, QuantisedCase, quantised_case, random_values
from tests.support.reference import (
    ACTIVATIONS,
    DTYPES,
    assert_channels_within,
    assert_moments_within,
    assert_pairs_within,
    assert_within,
    experts_reference,
    gram_reference,
    projection_reference,
)


def assert_all_equal_brute_force(case: QuantisedCase) -> None:
    packed, arithmetic = case.packed, case.arithmetic()
    expected = experts_reference(case.plain, arithmetic)
    sums = accumulators(case.plain)
    out = ops.experts_observed(*packed.arguments(), **{**sums, **packed.options})
    assert torch.equal(out, ops.experts(*packed.arguments(), **packed.options))
    assert_within(out, expected.out, expected.bound)
    assert_moments_within(sums["moments"], expected)
    assert_channels_within(sums["channels"], expected)
    assert_pairs_within(sums["pairs"], expected)
    few = case.tokens(slice(0, 5))
    gram = gram_of(few.packed)
    assert torch.equal(gram, gram.transpose(1, 2))
    assert_within(gram, *gram_reference(few.plain, arithmetic))
    g = gradient(few.plain)
    assert_within(projection_of(few.packed, g), *projection_reference(few.plain, g, arithmetic))


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_cpu_variant_equals_float64_brute_force(variant: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    assert _C.active_cpu_variant() == variant
    for dtype in DTYPES:
        assert_all_equal_brute_force(quantised_case(FORMATS[name], 29, 3, 2, 75, 139, dtype=dtype, sentinels=0.2))


ROWS_ONLY = {name: options for name, options in FORMULAS.items() if not options.get("transposed", False)}


def drawn_case(draw: st.DrawFn, form: Format) -> QuantisedCase:
    """A layer of these weights, of any size, formula and routing."""
    num_experts = draw(st.integers(1, 4))
    usual: list[dict[str, Any]] = [{"activation": name} for name in ACTIVATIONS]
    return quantised_case(
        form,
        draw(st.sampled_from([0, 1, 2, 3, 7, 17, 50])),
        num_experts,
        draw(st.integers(1, num_experts)),
        draw(st.integers(1, 300)),
        draw(st.integers(1, 300)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
        sentinels=draw(st.sampled_from([0.0, 0.5, 1.0])),
        **draw(st.sampled_from(usual) | st.sampled_from(list(ROWS_ONLY.values()))),
    )


@st.composite
def cases(draw: st.DrawFn) -> QuantisedCase:
    return drawn_case(draw, FORMATS[draw(st.sampled_from(sorted(FORMATS)))])


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@settings(max_examples=20)
@given(case=cases())
def test_formulas_odd_sizes_and_routings_equal_float64_brute_force(variant: str, case: QuantisedCase) -> None:
    with patch.dict(os.environ, MOE_EXT_ISA=variant):
        assert_all_equal_brute_force(case)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_longer_than_what_is_unpacked_at_a_time_are_added_up(name: str) -> None:
    for dtype in DTYPES[:2]:
        for hidden, intermediate in ((2100, 5), (5, 1061)):
            assert_all_equal_brute_force(quantised_case(FORMATS[name], 9, 2, 1, hidden, intermediate, dtype=dtype))


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_tokens_bits_depend_neither_on_its_batch_nor_on_threads(
    variant: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    threads = torch.get_num_threads()
    for dtype in DTYPES[:2]:
        case = quantised_case(FORMATS[name], 43, 2, 2, 1100, 75, dtype=dtype).packed
        case.experts[:, 0], case.experts[13:, 1] = 0, 2  # one expert has all tokens, another 13
        g = gradient(case)
        whole = ops.experts(*case.arguments(), **case.options), gram_of(case), projection_of(case, g)
        for tokens in (1, 2, 3, 5, 8, 28):
            few = case.tokens(slice(4, 4 + tokens))
            assert torch.equal(ops.experts(*few.arguments(), **few.options), whole[0][4 : 4 + tokens])
            assert torch.equal(gram_of(few), whole[1][4 : 4 + tokens])
            assert torch.equal(projection_of(few, g[4 : 4 + tokens]), whole[2][4 : 4 + tokens])
        try:
            torch.set_num_threads(3)
            assert torch.equal(ops.experts(*case.arguments(), **case.options), whole[0])
            assert torch.equal(projection_of(case, g), whole[2])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize(
    ("name", "values", "scale", "expected"),
    [
        ("mxfp4", 0x22, 127, 1.0),
        ("mxfp4", 0x77, 0, 6 * 2.0**-127),
        ("mxfp4", 0x11, 254, 2.0**126),
        ("mxfp4", 0xFF, 252, -6 * 2.0**125),
        ("mxfp4", 0x22, 255, torch.nan),
        ("fp8", 0x7E, 0.5, 224.0),
        ("fp8", 0x01, 1.0, 2.0**-9),
        ("fp8", 0x87, 1.0, -7 * 2.0**-9),
        ("fp8", 0x7F, 1.0, torch.nan),
        ("fp8-blocks", 0xFF, 1.0, torch.nan),
        ("int8", 0x80, 1.0, -128.0),
    ],
)
def test_the_smallest_and_largest_numbers_and_what_is_none(
    variant: str, name: str, values: int, scale: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of down is that number, the others 0; x and h are 1."""
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    for dtype in (torch.float32, torch.bfloat16):
        case = quantised_case(FORMATS[name], 1, 1, 1, 32, 1, dtype=dtype, activation="relu2", gated=False).packed
        weights, options = ops.unpack_weights(case.down, FORMATS[name].weight_type, 1), case.options
        weights.view(torch.uint8).fill_(values)
        weights.view(torch.uint8)[:, 1:] = 0
        options["down_scales"].fill_(scale)
        ones = ops.unpack_weights(case.gate_up, FORMATS[name].weight_type, 32)
        ones.view(torch.uint8).zero_()
        ones.view(torch.uint8)[..., 0] = {"mxfp4": 0x02, "fp8": 0x38, "int8": 1}[FORMATS[name].weight_type]
        options["gate_up_scales"].fill_(127 if name == "mxfp4" else 1.0)
        gate_up, down = (ops.pack_weights(values, FORMATS[name].weight_type) for values in (ones, weights))
        case = replace(case, x=torch.ones_like(case.x), weights=torch.ones(1, 1), gate_up=gate_up, down=down)
        out = ops.experts(*case.arguments(), **options)
        rounded = torch.tensor(expected, dtype=torch.float64).to(dtype)
        assert torch.equal(out[0, 0].nan_to_num(123.0), rounded.nan_to_num(123.0))
        assert scale == 255 or not bool(out[0, 1:].count_nonzero())


# ---- packing


@given(
    name=st.sampled_from(sorted(FORMATS)),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 400)),
    seed=st.integers(0, 1000),
)
def test_unpacking_inverts_packing_and_experts_are_packed_apart(
    name: str, shape: tuple[int, int, int], seed: int
) -> None:
    weight_type = FORMATS[name].weight_type
    values = random_values(weight_type, shape, torch.Generator().manual_seed(seed))
    packed = ops.pack_weights(values, weight_type)
    assert packed.dtype == torch.uint8
    bits = 4 if weight_type in ("int4", "mxfp4") else 8
    assert packed.shape == (*shape[:2], -(-shape[2] * bits // 512) * 64)
    back = ops.unpack_weights(packed, weight_type, shape[2])
    assert back.dtype == values.dtype
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))
    last = values[-1:].clone()
    assert torch.equal(ops.pack_weights(last, weight_type), packed[-1:])


def test_many_rows_are_packed_on_several_threads_as_on_one() -> None:
    values = random_values("int4", (3, 700, 513), torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    packed = ops.pack_weights(values.mT.contiguous().mT, "int4")
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.pack_weights(values, "int4"), packed)
        assert torch.equal(ops.unpack_weights(packed, "int4", 513), values)
    finally:
        torch.set_num_threads(threads)


BAD_PACKING: list[tuple[Callable[[], Tensor], str]] = [
    (lambda: ops.pack_weights(torch.zeros(1, 2, 3, dtype=torch.int8), "int3"), "'weight_type' is \"int3\"; exp"),
    (lambda: ops.pack_weights(torch.zeros(2, 3, dtype=torch.int8), "int8"), r"'values' has shape \(2, 3\); expe"),
    (lambda: ops.pack_weights(torch.zeros(1, 2, 3), "int8"), "pack_weights: 'values' has dtype float32; expected int8"),
    (
        lambda: ops.pack_weights(torch.zeros(1, 2, 3, dtype=torch.uint8), "fp8"),
        "pack_weights: 'values' has dtype uint8; expected float8_e4m3fn",
    ),
    (
        lambda: ops.unpack_weights(torch.zeros(1, 2, 64, dtype=torch.uint8), "int4", 129),
        r"unpack_weights: 'packed' has shape \(1, 2, 64\); expected \(1, 2, 128\) = \(E, R, bytes of 'columns'\)",
    ),
    (
        lambda: ops.unpack_weights(torch.zeros(1, 2, 64, dtype=torch.uint8), "int4", -1),
        "unpack_weights: 'columns' is -1; expected the number that were packed",
    ),
    (
        lambda: ops.unpack_weights(torch.zeros(1, 2, 64, dtype=torch.int8), "int8", 64),
        "unpack_weights: 'packed' has dtype int8; expected uint8",
    ),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("call", "message"), BAD_PACKING)
def test_what_cannot_be_packed_is_refused(device: str, call: Callable[[], Tensor], message: str) -> None:
    with torch.device(device), pytest.raises(RuntimeError, match=message):
        call()


# ---- refusals


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BYTE = torch.uint8
# Changes of quantised_case(..., 5, 4, 2, 16, 40), and what the operators say of them.
BAD_LAYERS: list[tuple[str, dict[str, Any], str]] = [
    ("int8", {"weight_type": None}, "'gate_up_scales' is given without 'weight_type'"),
    ("int4-32", {"weight_type": None}, "'group_size' is given without 'weight_type'"),
    ("int8", {"weight_type": "int5"}, "'weight_type' is \"int5\"; expected \"int8\", \"int4\", \"fp8\" or \"mxfp4\""),
    ("int8", {"group_size": 32}, "'group_size' is 32; expected 0 with weight_type \"int8\""),
    ("int4-32", {"group_size": 0}, "'group_size' is 0; expected 32, 64 or 128 with weight_type \"int4\""),
    ("fp8", {"group_size": 64}, "'group_size' is 64; expected 0 or 128 with weight_type \"fp8\""),
    ("mxfp4", {"group_size": 16}, "'group_size' is 16; expected 32 with weight_type \"mxfp4\""),
    ("int8", {"transposed": True}, "'transposed' is given with 'weight_type'; quantised weights are rows"),
    ("int8", {"down_scales": None}, "'weight_type' is given without 'down_scales'"),
    ("int8", {"gate_up_zeros": zeros(4, 80, dtype=BYTE)}, "'gate_up_zeros' is given with weight_type \"int8\""),
    (
        "int4-32",
        {"down_zeros": zeros(4, 16, 2, dtype=BYTE)},
        "'down_zeros' is given alone; expected zeros of both weights, or of neither",
    ),
    ("int8", {"gate_up": zeros(4, 80, 64)}, "'gate_up' has dtype float32; expected uint8"),
    ("int8", {"gate_up": zeros(4, 80, 16, dtype=BYTE)}, r"'gate_up' has shape \(4, 80, 16\); expected \(4, 80, 64\)"),
    ("int8", {"gate_up": zeros(4, 81, 64, dtype=BYTE)}, r"'gate_up' has shape \(4, 81, 64\); expected \(E, 2I, by"),
    ("int8", {"gate_up": zeros(80, 64, dtype=BYTE)}, r"'gate_up' has shape \(80, 64\); expected 3 dimensions"),
    ("int8", {"down": zeros(4, 15, 64, dtype=BYTE)}, r"'down' has shape \(4, 15, 64\); expected \(4, 16, 64\)"),
    ("int8", {"down": zeros(4, 64, 16, dtype=BYTE).mT}, r"'down' is not contiguous; pass down.contiguous\(\)"),
    ("int8", {"down_scales": zeros(4, 16, 1)}, r"'down_scales' has shape \(4, 16, 1\); expected \(4, 16\) = a"),
    ("int8", {"down_scales": zeros(4, 16).half()}, "'down_scales' has dtype float16; expected float32"),
    ("int8", {"down_scales": zeros(16, 4).T}, "'down_scales' is not contiguous"),
    ("fp8-blocks", {"down_scales": zeros(4, 16, 1)}, r"'down_scales' has shape \(4, 16, 1\); expected \(4, 1, 1\)"),
    ("int4-32", {"down_scales": zeros(4, 16, 1)}, r"'down_scales' has shape \(4, 16, 1\); expected \(4, 16, 2"),
    (
        "int4-32",
        {"down_scales": zeros(4, 16, 2).half()},
        "'down_scales' has dtype float16; expected float32",
    ),
    ("mxfp4", {"gate_up_scales": zeros(4, 80, 1)}, "'gate_up_scales' has dtype float32; expected uint8"),
    (
        "int4-32-bf16-zeros",
        {"down_zeros": zeros(4, 16, 2)},
        "'down_zeros' has dtype float32; expected uint8",
    ),
    (
        "int4-32-bf16-zeros",
        {"down_zeros": zeros(4, 16, 3, dtype=BYTE)},
        r"'down_zeros' has shape \(4, 16, 3\); expected \(4, 16, 2\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("name", "change", "message"), BAD_LAYERS)
def test_every_operator_refuses_bad_quantised_weights(
    device: str, name: str, change: dict[str, Any], message: str
) -> None:
    packed = quantised_case(FORMATS[name], 5, 4, 2, 16, 40).packed
    changed = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in change.items()}
    case = packed.to(device)
    options = {
        **case.options,
        **{key: value for key, value in changed.items() if key in ops.LayerOptions.__annotations__},
    }
    case = replace(case, gate_up=changed.get("gate_up", case.gate_up), down=changed.get("down", case.down))
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


def test_options_of_another_type_are_refused() -> None:
    case = quantised_case(FORMATS["int8"], 5, 4, 2, 16, 40).packed
    with pytest.raises(TypeError, match="experts: 'weight_type' is of type int; expected Optional"):
        ops.experts(*case.arguments(), **{**case.options, "weight_type": 8})
    with pytest.raises(TypeError, match="experts: 'group_size' is of type Tensor; expected int"):
        ops.experts(*case.arguments(), **{**case.options, "group_size": torch.tensor(0)})
    with pytest.raises(
        ValueError, match=r"pack_weights: 'weight_type' is 'int8.x00'; expected one of int8, int4, fp8, mxfp4"
    ):
        ops.pack_weights(torch.zeros(1, 2, 3, dtype=torch.int8), "int8\0")


# ---- torch


@pytest.mark.parametrize("name", ["int8", "int4-32-bf16-zeros"])
@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck(name: str, check: str) -> None:
    form = FORMATS[name]
    case = quantised_case(form, 5, 4, 2, 16, 24, sentinels=0.5)
    packed, sums = case.packed, accumulators(case.plain)
    layer = (packed.x, packed.gate_up, packed.down)
    values = ops.unpack_weights(packed.down, form.weight_type, 24)
    for operator, arguments, named in (
        (torch.ops.moe_ext.experts, packed.arguments(), packed.options),
        (torch.ops.moe_ext.experts_observed, packed.arguments(), {**sums, **packed.options}),
        (torch.ops.moe_ext.expert_gram, (*layer, packed.activation), packed.options),
        (torch.ops.moe_ext.expert_projection, (*layer, packed.x, packed.activation), packed.options),
        (torch.ops.moe_ext.pack_weights, (values, form.weight_type), {}),
        (torch.ops.moe_ext.unpack_weights, (packed.down, form.weight_type, 24), {}),
    ):
        torch.library.opcheck(operator, arguments, named, test_utils=check)


@pytest.mark.parametrize("name", ["fp8-blocks", "mxfp4"])
def test_quantised_layers_compile_without_graph_breaks(name: str) -> None:
    form = FORMATS[name]
    case = quantised_case(form, 6, 4, 2, 130, 24).packed
    values = ops.unpack_weights(case.down, form.weight_type, 24)

    def layer(x: Tensor) -> Tensor:
        down = ops.pack_weights(values, form.weight_type)
        return ops.experts(x, case.gate_up, down, case.experts, case.weights, "silu", **case.options)

    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(case.x)
    assert torch.equal(got, layer(case.x))


def test_pruned_packed_weights_are_those_of_the_experts_left() -> None:
    case = quantised_case(FORMATS["mxfp4"], 6, 4, 1, 40, 24).packed
    case.experts.copy_(torch.tensor([1, 3, 3, 1, 1, 3])[:, None])
    kept = torch.tensor([1, 3])
    options: dict[str, Any] = {
        name: value[kept] if isinstance(value, Tensor) else value for name, value in case.options.items()
    }
    pruned = replace(case, gate_up=case.gate_up[kept], down=case.down[kept], experts=case.experts // 2)
    assert torch.equal(ops.experts(*pruned.arguments(), **options), ops.experts(*case.arguments(), **case.options))


def test_a_scale_that_requires_gradients_is_refused() -> None:
    case = quantised_case(FORMATS["int8"], 5, 4, 2, 16, 24).packed
    case.options["down_scales"].requires_grad_()
    with pytest.raises(NotImplementedError, match="experts: an input requires gradients"):
        ops.experts(*case.arguments(), **case.options)
