"""Every CUDA kernel on experts with biases, other layouts and other formulas, against float64 brute force."""

from typing import Any

import pytest
import torch

from moe_ext import ops
from tests.ops.test_cuda import KERNELS, forced
from tests.support.operators import FORMULAS
from tests.support.reference import (
    USUAL_LAYOUT,
    arithmetic_of,
    assert_channels_within,
    assert_moments_within,
    assert_within,
    experts_case,
    experts_reference,
)


def takes(kernels: str, formula: dict[str, Any]) -> bool:
    """Whether a call of this formula can be made to take these kernels."""
    if kernels in ("plain", "hopper"):  # wgmma's kernels take the usual experts alone
        return kernels == "plain"
    interleaved, transposed = formula.get("interleaved", False), formula.get("transposed", False)
    if interleaved and not transposed:
        return False
    if not formula.get("gated", True) and (kernels == "small_batch" or formula.get("activation") == "gelu"):
        return False
    return not transposed or kernels != "small_batch"


@pytest.mark.parametrize(
    ("kernels", "name"), [(kernels, name) for kernels in KERNELS for name in FORMULAS if takes(kernels, FORMULAS[name])]
)
def test_every_kernel_equals_float64_brute_force(kernels: str, name: str) -> None:
    dtype = torch.float16 if len(kernels + name) % 2 else torch.bfloat16  # either, of every kernel
    # More columns than a tile of any kernel has, in I and in H, the last tile of each not full.
    case = experts_case(14 if kernels == "small_batch" else 150, 2, 1, 264, 152, dtype=dtype, **FORMULAS[name])
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


@pytest.mark.parametrize("kernels", ["small_batch", "hopper"])
@pytest.mark.parametrize("layout", USUAL_LAYOUT)
def test_kernels_that_do_not_know_a_layout_are_not_forced(kernels: str, layout: str) -> None:
    if kernels not in KERNELS:
        pytest.skip("these kernels are not here")
    options: dict[str, Any] = {layout: not USUAL_LAYOUT[layout]}
    case = experts_case(9, 2, 1, 16, 24, dtype=torch.bfloat16, **options).to("cuda")
    with forced(kernels), pytest.raises(RuntimeError, match=f"MOE_EXT_CUDA_KERNELS={kernels}.*interleaved"):
        ops.experts(*case.arguments(), **case.options)
