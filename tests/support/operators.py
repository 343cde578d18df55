"""What the tests of the operators share with those of their CUDA kernels: a check of Gram matrices, bad input."""

from typing import Any

import torch
from torch import Tensor

from moe_ext import ops
from moe_ext.binary import _C
from tests.support.reference import ExpertsCase, arithmetic_of, assert_within, gram_reference

RUNNABLE_VARIANTS = [name for name, runs in _C.cpu_variants() if runs]

# Changes of experts_case(5, 4, 2, 16, 24), and what the operators say of them.
BAD_EXPERTS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(4)}, r"'x' has shape \(4,\); expected 2 dimensions \(T, H\)"),
    ({"x": torch.zeros(5, 17)}, r"'gate_up' has shape \(4, 48, 16\); expected \(4, 48, 17\) = \(E, 2I, H\)"),
    ({"x": torch.zeros(5, 16, dtype=torch.float64)}, "'x' has dtype float64; expected float32 or bfloat16 or float16"),
    ({"gate_up": torch.zeros(4, 47, 16)}, r"'gate_up' has shape \(4, 47, 16\); expected \(E, 2I, H\) with an even"),
    ({"gate_up": torch.zeros(0, 48, 16)}, r"'gate_up' has shape \(0, 48, 16\)"),
    ({"gate_up": torch.zeros(4, 48, 16).half()}, "'gate_up' has dtype float16; expected float32"),
    ({"gate_up": torch.zeros(4, 16, 48).transpose(1, 2)}, "'gate_up' is not contiguous; pass gate_up.contiguous()"),
    ({"down": torch.zeros(4, 16, 25)}, r"'down' has shape \(4, 16, 25\); expected \(4, 16, 24\) = \(E, H, I\)"),
    ({"down": torch.zeros(4, 24, 16).transpose(1, 2)}, "'down' is not contiguous"),
    ({"experts": torch.zeros(5, 2)}, "'experts' has dtype float32; expected int32 or int64"),
    ({"experts": torch.zeros(6, 2, dtype=torch.int32)}, r"'experts' has shape \(6, 2\); expected \(5, 2\)"),
    ({"weights": torch.zeros(5, 3)}, r"'weights' has shape \(5, 3\); expected \(5, 2\)"),
    ({"weights": torch.zeros(5, 2).double()}, "'weights' has dtype float64; expected float32"),
    ({"activation": "relu"}, "'activation' is \"relu\"; expected \"silu\", \"gelu\", \"gelu_tanh\" or"),
]  # fmt: skip

# The formulas and layouts of experts that families have, with limits small enough to be reached, and further ones.
FORMULAS: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "biases": True, "transposed": True, "interleaved": True, "limit": 1.25, "alpha": 1.702, "up_offset": 1.0,
    },
    "openai_privacy_filter": {"biases": True, "transposed": True, "limit": 1.25, "alpha": 1.702, "up_offset": 1.0},
    "minimax_m3_vl": {"limit": 0.75, "alpha": 1.702, "up_offset": 1.0},
    "deepseek_v4": {"limit": 1.0},
    "step3p7": {"limit": 0.5, "limit_after": True},
    "inkling2": {"gate_cap": 1.5, "up_cap": 2.5},
    "nemotron_h": {"activation": "relu2", "gated": False},
    "aria": {"transposed": True},
    "interleaved rows": {"interleaved": True, "biases": True},
    "no gate, transposed": {"activation": "gelu", "gated": False, "transposed": True, "biases": True},
    "squares, transposed": {"activation": "relu2", "gated": False, "transposed": True, "biases": True},
    "limited gelu": {"activation": "gelu_tanh", "limit": 0.75, "up_offset": -0.5},
    "quick gelu without gate": {"alpha": 1.702, "gated": False},
}  # fmt: skip


def gram_of(case: ExpertsCase) -> Tensor:
    return ops.expert_gram(case.x, case.gate_up, case.down, case.activation, **case.options)


def assert_gram_equals_brute_force(case: ExpertsCase, device: str, kernels: str = "tall") -> None:
    """kernels: CUDA's; the choice by shape rounds as any of the grouped ones, also for few tokens."""
    expected, bound = gram_reference(case, arithmetic_of(case, device, kernels))
    got = gram_of(case.to(device))
    assert got.dtype == torch.float64
    assert got.shape == expected.shape
    assert torch.equal(got, got.transpose(1, 2))
    assert_within(got, expected, bound)
