"""The CUDA operators on quantised weights: every way that a call can take against float64 brute force, packing on the
device, graphs, and NaN."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_ext import ops
from tests.ops.test_formulas import accumulators
from tests.ops.test_projection import gradient, projection_of
from tests.support.operators import FORMULAS, gram_of
from tests.support.quantised_layers import FORMATS, QuantisedCase, quantised_case, random_values
from tests.support.reference import (
    DEVICES,
    WGMMA,
    assert_channels_within,
    assert_moments_within,
    assert_pairs_within,
    assert_within,
    experts_reference,
    gram_reference,
    projection_reference,
)

if "cuda" not in DEVICES:
    pytest.skip("needs a GPU and moe_ext built with CUDA kernels", allow_module_level=True)

from tests.ops.test_cuda import captured, forced  # which skips itself where there is no GPU

KERNELS = ["small_batch", "flat", "narrow", *["hopper"] * WGMMA, "plain"]  # that take quantised weights
hopper = pytest.mark.skipif(not WGMMA, reason="needs wgmma: an H100 or H200, and moe_ext built for 9.0a")


def takes(kernels: str, name: str, dtype: torch.dtype) -> bool:
    """Whether a call with weights of this format can be made to take these kernels."""
    return kernels != "hopper" or dtype == torch.bfloat16 or FORMATS[name].group_size == 0


def assert_all_equal_brute_force(case: QuantisedCase, kernels: str = "", *, every_expert: bool = True) -> None:
    """`every_expert`: also of the operators that run every expert on every token."""
    there = case.packed.to("cuda")
    expected = experts_reference(case.plain, case.arithmetic("cuda", kernels))
    sums = {name: tensor.to("cuda") for name, tensor in accumulators(case.plain).items()}
    with forced(kernels):
        out = ops.experts_observed(*there.arguments(), **{**sums, **there.options})
        assert torch.equal(out.cpu(), ops.experts(*there.arguments(), **there.options).cpu())
    assert_within(out, expected.out, expected.bound)
    assert_moments_within(sums["moments"], expected)
    assert_channels_within(sums["channels"], expected)
    assert_pairs_within(sums["pairs"], expected)
    if kernels == "small_batch" or not every_expert:  # small_batch takes no list of positions
        return
    few = case.tokens(slice(0, 5))
    arithmetic = few.arithmetic("cuda", kernels or "flat")
    g = gradient(few.plain)
    there = few.packed.to("cuda")
    with forced(kernels):
        gram, projection = gram_of(there).cpu(), projection_of(there, g.to("cuda"))
    assert torch.equal(gram, gram.transpose(1, 2))
    assert_within(gram, *gram_reference(few.plain, arithmetic))
    assert_within(projection, *projection_reference(few.plain, g, arithmetic))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_way_equals_float64_brute_force(kernels: str, name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        if not takes(kernels, name, dtype) or (kernels == "plain" and dtype == torch.bfloat16):  # odd sizes, below
            continue
        case = quantised_case(FORMATS[name], 13, 3, 2, 152, 72, dtype=dtype, sentinels=0.2)
        assert_all_equal_brute_force(case, kernels, every_expert=dtype == torch.bfloat16 or kernels == "plain")


@hopper
@pytest.mark.parametrize("name", FORMATS)
def test_wgmma_in_more_steps_than_its_rings_hold_and_in_parts_of_tiles(name: str) -> None:
    # Two tiles of positions of an expert, and of rows of weights; the last of each, and the last step, are not full.
    case = quantised_case(FORMATS[name], 145, 2, 1, 712, 168, dtype=torch.bfloat16)
    case.packed.experts.copy_((torch.arange(145) >= 140)[:, None])
    assert torch.equal(case.plain.experts, case.packed.experts)
    assert_all_equal_brute_force(case, "hopper")


@hopper
@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith(("int4", "mxfp4"))])
def test_wgmma_with_scales_that_are_read_four_at_a_time(name: str) -> None:
    assert_all_equal_brute_force(quantised_case(FORMATS[name], 9, 2, 1, 1024, 384, dtype=torch.bfloat16), "hopper")


GATED = [name for name, options in FORMULAS.items() if options.get("gated", True) and "gate_cap" not in options]


@hopper
@pytest.mark.parametrize("formula", ["interleaved", *GATED])
def test_wgmma_of_every_formula_with_a_gate(formula: str) -> None:
    options = {**FORMULAS.get(formula, {"interleaved": True}), "transposed": False}
    name, dtype = ("mxfp4", torch.bfloat16) if "biases" in options else ("int8", torch.float16)
    assert_all_equal_brute_force(quantised_case(FORMATS[name], 21, 2, 1, 136, 200, dtype=dtype, **options), "hopper")


@hopper
def test_wgmma_of_more_tiles_than_multiprocessors() -> None:
    # A block goes on from one tile to the next, with as many steps in the ring as there are left.
    case = quantised_case(FORMATS["int4-64-bf16"], 140, 140, 1, 200, 8, dtype=torch.bfloat16)
    case.packed.experts.copy_(torch.arange(140)[:, None])
    assert torch.equal(case.plain.experts, case.packed.experts)
    there = case.packed.to("cuda")
    expected = experts_reference(case.plain, case.arithmetic("cuda", "hopper"))
    with forced("hopper"):
        out = ops.experts(*there.arguments(), **there.options)
    assert_within(out, expected.out, expected.bound)


@pytest.mark.parametrize("name", FORMATS)
def test_odd_sizes_and_float32_equal_float64_brute_force(name: str) -> None:
    assert_all_equal_brute_force(quantised_case(FORMATS[name], 7, 2, 1, 75, 139, dtype=torch.bfloat16))
    assert_all_equal_brute_force(quantised_case(FORMATS[name], 7, 2, 2, 136, 33))


ROWS_ONLY = {name: options for name, options in FORMULAS.items() if not options.get("transposed", False)}


@pytest.mark.parametrize("formula", ROWS_ONLY)
def test_every_formula_in_few_tokens_and_in_many(formula: str) -> None:
    for tokens, name in ((3, "mxfp4"), (20, "int4-128-fp16-zeros")):
        options = ROWS_ONLY[formula]
        assert_all_equal_brute_force(
            quantised_case(FORMATS[name], tokens, 3, 2, 72, 40, dtype=torch.bfloat16, **options)
        )


@pytest.mark.parametrize("name", ["int8", "int4-32-bf16-zeros", "fp8-blocks"])
def test_experts_of_no_token_and_of_all_and_no_expert_at_all(name: str) -> None:
    for tokens in (9, 70):
        case = quantised_case(FORMATS[name], tokens, 4, 2, 136, 40, dtype=torch.bfloat16)
        case.packed.experts.copy_(torch.tensor([3, 1]))
        assert torch.equal(case.plain.experts, case.packed.experts)
        assert_all_equal_brute_force(case)
        case.packed.experts.fill_(4)
        there = case.packed.to("cuda")
        assert not bool(ops.experts(*there.arguments(), **there.options).cpu().count_nonzero())


@pytest.mark.parametrize("name", FORMATS)
def test_the_device_packs_as_the_cpu_does(name: str) -> None:
    weight_type = FORMATS[name].weight_type
    for shape in ((3, 5, 389), (2, 1, 128), (1, 4, 1), (0, 3, 64)):
        values = random_values(weight_type, shape, torch.Generator().manual_seed(1))
        packed = ops.pack_weights(values.to("cuda"), weight_type)
        assert torch.equal(packed.cpu(), ops.pack_weights(values, weight_type))
        back = ops.unpack_weights(packed, weight_type, shape[2])
        assert torch.equal(back.cpu().view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["fp8", "fp8-blocks", "mxfp4"])
def test_a_weight_that_is_no_number_makes_its_row_none_and_no_other(name: str, kernels: str) -> None:
    form = FORMATS[name]
    case = quantised_case(form, 3, 1, 1, 40, 72, dtype=torch.bfloat16).packed
    options: dict[str, Any] = dict(case.options)
    down = ops.unpack_weights(case.down, form.weight_type, 72)
    if name == "mxfp4":
        options["down_scales"][0, 17, 1] = 255
    else:
        down.view(torch.uint8)[0, 17, 37] = 0x7F
        down.view(torch.uint8)[0, 21, 71] = 0xFF
    there = replace(case, down=ops.pack_weights(down, form.weight_type), options=options).to("cuda")
    with forced(kernels):
        out = ops.experts(*there.arguments(), **there.options).cpu()
    none = torch.zeros(40, dtype=torch.bool)
    none[[17] if name == "mxfp4" else [17, 21]] = True
    assert torch.equal(out.isnan(), none.expand(3, 40))


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_graph_replays_what_a_call_gives(kernels: str) -> None:
    case = quantised_case(FORMATS["int4-64-bf16"], 5, 3, 2, 72, 40, dtype=torch.bfloat16).packed.to("cuda")
    with forced(kernels):
        graph, out = captured(lambda: ops.experts(*case.arguments(), **case.options))
        for seed in range(2):
            case.x.copy_(torch.randn(5, 72, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(out.cpu(), ops.experts(*case.arguments(), **case.options).cpu())


def test_packed_weights_on_another_device_than_x_are_refused() -> None:
    case = quantised_case(FORMATS["int8"], 5, 4, 2, 16, 40).packed
    there = case.to("cuda")
    with pytest.raises(RuntimeError, match="experts: 'gate_up_scales' is on cpu"):
        ops.experts(*there.arguments(), **{**there.options, "gate_up_scales": case.options["gate_up_scales"]})


@pytest.mark.parametrize(
    ("kernels", "name"), [("tall", "int8"), ("hopper_pairs", "int8"), ("hopper", "int4-32"), ("hopper", "mxfp4")]
)
def test_kernels_that_do_not_take_these_weights_cannot_be_forced(kernels: str, name: str) -> None:
    case = quantised_case(FORMATS[name], 5, 4, 2, 16, 40, dtype=torch.float16).packed.to("cuda")
    with forced(kernels), pytest.raises(RuntimeError, match=f"MOE_EXT_CUDA_KERNELS={kernels}"):
        ops.experts(*case.arguments(), **case.options)
