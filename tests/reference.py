"""Float64 brute force, token by token, written from the definitions and sharing nothing with the package."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICES = ["cpu"]  # a CUDA device joins with the CUDA kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]


def activate(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@dataclass
class ExpertsCase:
    """Inputs of the experts operators; T, E, K, H, I as everywhere."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    experts: Tensor
    weights: Tensor
    activation: str = "silu"

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, str]:
        return self.x, self.gate_up, self.down, self.experts, self.weights, self.activation


def experts_case(
    tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sentinels: float = 0.0,
    activation: str = "silu",
) -> ExpertsCase:
    """Random inputs with distinct experts per token; a share ``sentinels`` of the slots beyond the first is empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    experts = torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :top_k].to(torch.int32)
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    empty = torch.rand(tokens, top_k, generator=generator) < sentinels
    empty[:, :1] = False
    return ExpertsCase(
        x=normal(tokens, hidden).to(dtype),
        gate_up=(normal(num_experts, 2 * intermediate, hidden) / math.sqrt(hidden)).to(dtype),
        down=(normal(num_experts, hidden, intermediate) / math.sqrt(intermediate)).to(dtype),
        experts=experts.masked_fill(empty, num_experts),
        weights=weights.masked_fill(empty, 0.0),
        activation=activation,
    )


def expert_output(case: ExpertsCase, expert: int, token: int) -> Tensor:
    """f_e(x_t), (H,) float64."""
    gate, up = (case.gate_up[expert].double() @ case.x[token].double()).chunk(2)
    return case.down[expert].double() @ (activate(case.activation, gate) * up)


def experts_reference(case: ExpertsCase) -> tuple[Tensor, Tensor, Tensor]:
    """out (T, H), bound (T, H) on the float32 rounding error of any summation order, moments (E, 3, 3); float64."""
    tokens, hidden = case.x.shape
    num_experts, _, intermediate = case.down.shape
    out = torch.zeros(tokens, hidden, dtype=torch.float64)
    bound = torch.zeros_like(out)
    moments = torch.zeros(num_experts, 3, 3, dtype=torch.float64)
    for token in range(tokens):
        for slot in range(case.experts.shape[1]):
            expert = int(case.experts[token, slot])
            if expert == num_experts:
                continue
            weight = float(case.weights[token, slot])
            output = expert_output(case, expert, token)
            out[token] += weight * output
            # Magnitudes: the products of absolute values, through which every float32 rounding error passes.
            gate, up = (case.gate_up[expert].double().abs() @ case.x[token].double().abs()).chunk(2)
            bound[token] += abs(weight) * (case.down[expert].double().abs() @ (gate * up))
            for a in range(3):
                for b in range(3):
                    moments[expert, a, b] += weight**a * float(output.norm()) ** b
    terms = 2 * hidden + intermediate + case.experts.shape[1] + 16
    return out, bound * terms * 2.0**-24, moments


# Half a unit in the last place, relative: one rounding of the result to its dtype. float16 also has subnormals.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}


def assert_within(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|got - expected| <= float32 summation error + one rounding to got's dtype, element by element."""
    allowed = bound + ROUNDING[got.dtype] * (expected.abs() + bound) + SMALLEST[got.dtype]
    excess = (got.double() - expected).abs() - allowed
    assert bool((excess <= 0).all()), f"off by up to {float(excess.max()):.3g} beyond the bound"


def route_reference(
    logits: Tensor, top_k: int, thresholds: Tensor | None, renormalise: bool
) -> tuple[list[list[float]], list[list[int]]]:
    """weights and experts by sorting, in plain Python floats."""
    num_experts = logits.shape[1]
    all_weights, all_experts = [], []
    for row in logits.double().tolist():
        order = sorted(range(num_experts), key=lambda e: (-row[e], e))[:top_k]
        total = sum(math.exp(value - max(row)) for value in row)
        weights = [math.exp(row[e] - max(row)) / total for e in order]
        if renormalise:
            weights = [weight / sum(weights) for weight in weights]
        if thresholds is not None:
            full = sum(weights)
            skipped = [rank > 0 and weights[rank] < float(thresholds[rank - 1]) * weights[0] for rank in range(top_k)]
            weights = [0.0 if skip else weight for weight, skip in zip(weights, skipped, strict=True)]
            order = [num_experts if skip else e for e, skip in zip(order, skipped, strict=True)]
            kept = sum(weights)
            weights = [weight * full / kept for weight in weights]
        all_weights.append(weights)
        all_experts.append(order)
    return all_weights, all_experts
