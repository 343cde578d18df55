"""Every CUDA kernel on experts with biases, other layouts and other formulas, against float64 brute force."""

from typing import Any

import pytest
import torch

from moe_ext import ops
from tests.ops.test_cuda import KERNELS, forced
from tests.support.operators import FORMULAS
from tests.support.reference import (
    USUAL_LAYOUT,
    WGMMA,
    arithmetic_of,
    assert_channels_within,
    assert_moments_within,
    assert_within,
    experts_case,
    experts_reference,
)

ALL_KERNELS = [*KERNELS, *["hopper_pairs"] * WGMMA]


def takes(kernels: str, formula: dict[str, Any]) -> bool:
    """Whether a call of this formula can be made to take these kernels."""
    if kernels == "plain":
        return True
    interleaved, transposed = formula.get("interleaved", False), formula.get("transposed", False)
    if interleaved and not transposed:
        return False
    if not formula.get("gated", True) and (kernels == "small_batch" or formula.get("activation") == "gelu"):
        return False
    if kernels.startswith("hopper"):
        return formula.get("gated", True) and not {"gate_cap", "up_cap"} & set(formula)
    return not transposed or kernels != "small_batch"


@pytest.mark.parametrize(
    ("kernels", "name"),
    [(kernels, name) for kernels in ALL_KERNELS for name in FORMULAS if takes(kernels, FORMULAS[name])],
)
def test_every_kernel_equals_float64_brute_force(kernels: str, name: str) -> None:
    dtype = torch.float16 if len(kernels + name) % 2 else torch.bfloat16  # either, of every kernel
    # More columns than a tile of any kernel has, in I and in H, the last tile of each not full.
    tokens = {"small_batch": 14, "plain": 40}.get(kernels, 90)
    case = experts_case(tokens, 2, 1, 264, 152, dtype=dtype, **FORMULAS[name])
    expected = experts_reference(case, arithmetic_of(case, "cuda", kernels))
    there = case.to("cuda")
    moments = torch.zeros(2, 3, 3, dtype=torch.float64, device="cuda")
    channels = torch.zeros(2, 152, dtype=torch.float64, device="cuda")
    counted = torch.arange(len(case.x)) % 5 != 0
    with forced(kernels):
        out = ops.experts(*there.arguments(), **there.options)
        observed = ops.experts_observed(*there.arguments(), moments, counted.cuda(), channels, **there.options)
    assert torch.equal(out, observed)
    assert_within(out, expected.out, expected.bound)
    some = experts_reference(case.tokens(counted), arithmetic_of(case, "cuda", kernels))
    assert_moments_within(moments, some)
    assert_channels_within(channels, some)


@pytest.mark.skipif(not WGMMA, reason="needs wgmma: an H100 or H200, and moe_ext built for 9.0a")
@pytest.mark.parametrize("kernels", ["hopper", "hopper_pairs"])
@pytest.mark.parametrize("name", ["gpt_oss", "openai_privacy_filter", "deepseek_v4"])
# Tiles of many rows and few; of two blocks that share them the second has none of up to 16.
@pytest.mark.parametrize("rows", [[1, 193, 0, 385], [16, 17, 0, 192]])
def test_wgmma_of_every_formula_in_tiles_of_any_height(kernels: str, name: str, rows: list[int]) -> None:
    case = experts_case(sum(rows), 4, 1, 72, 136, dtype=torch.bfloat16, seed=sum(rows), **FORMULAS[name])
    case.experts[:, 0] = torch.repeat_interleave(torch.arange(4), torch.tensor(rows)).to(case.experts.dtype)
    expected = experts_reference(case, arithmetic_of(case, "cuda", kernels))
    there = case.to("cuda")
    with forced(kernels):
        out = ops.experts(*there.arguments(), **there.options)
    assert_within(out, expected.out, expected.bound)


@pytest.mark.parametrize("kernels", [kernels for kernels in ALL_KERNELS if kernels not in ("small_batch", "plain")])
def test_rows_beyond_k_of_transposed_weights_are_not_the_next_experts(kernels: str) -> None:
    case = experts_case(20, 2, 1, 40, 72, dtype=torch.bfloat16, **FORMULAS["gpt_oss"])
    case.experts[:] = 0
    case.gate_up[1], case.down[1] = torch.inf, torch.nan
    expected = experts_reference(case, arithmetic_of(case, "cuda", kernels))
    there = case.to("cuda")
    with forced(kernels):
        out = ops.experts(*there.arguments(), **there.options)
    assert_within(out, expected.out, expected.bound)


@pytest.mark.parametrize(
    ("kernels", "layout"),
    [("small_batch", layout) for layout in USUAL_LAYOUT]
    + [(kernels, layout) for kernels in ("hopper", "hopper_pairs") for layout in ("gated", "interleaved")],
)
def test_kernels_that_do_not_know_a_layout_are_not_forced(kernels: str, layout: str) -> None:
    if kernels not in ALL_KERNELS:
        pytest.skip("these kernels are not here")
    options: dict[str, Any] = {layout: not USUAL_LAYOUT[layout]}
    case = experts_case(9, 2, 1, 16, 24, dtype=torch.bfloat16, **options).to("cuda")
    with forced(kernels), pytest.raises(RuntimeError, match=f"MOE_EXT_CUDA_KERNELS={kernels}.*(interleaved|no gate)"):
        ops.experts(*case.arguments(), **case.options)
