"""One MoE layer for the benchmarks: random weights in transformers' own module, inputs, and the peers beside it."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_ext import ops

# Eager rounds to the dtype after each of its five steps: 8 roundings of values of the output's size cover it.
TOLERANCE = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.float32: 2.0**-19}

GATHERED_BYTES = 4 << 30  # transformers' batched_mm copies every slot's weights: not run where that takes more


class Layer:
    """The experts of one layer, as transformers' module holds them."""

    def __init__(
        self, hidden: int, intermediate: int, num_experts: int, top_k: int, dtype: torch.dtype, device: str
    ) -> None:
        config = MixtralConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_local_experts=num_experts,
            num_experts_per_tok=top_k,
        )
        config._experts_implementation = "eager"
        with torch.device("meta"):
            module = MixtralExperts(config).to(dtype)
        self.module = module.to_empty(device=device).requires_grad_(False)
        for weight in (self.module.gate_up_proj, self.module.down_proj):
            weight.normal_(std=weight.shape[-1] ** -0.5)
        self.hidden, self.intermediate, self.num_experts, self.top_k = hidden, intermediate, num_experts, top_k
        self.dtype, self.device = dtype, device

    @property
    def expert_bytes(self) -> int:
        """Of an expert's weights."""
        return 3 * self.hidden * self.intermediate * self.dtype.itemsize

    def peer(self, name: str, x: Tensor, experts: Tensor, weights: Tensor) -> Callable[[], Tensor]:
        """One of transformers' experts implementations on these inputs."""
        function = ALL_EXPERTS_FUNCTIONS.get(name, type(self.module).forward.__wrapped__)
        return lambda: function(self.module, x, experts, weights)

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (T, H), logits (T, E), weights (T, K) and experts (T, K)."""
        generator = torch.Generator(self.device).manual_seed(tokens)
        sizes = (tokens, self.hidden), (tokens, self.num_experts)
        x, logits = (torch.randn(*s, device=self.device, generator=generator).to(self.dtype) for s in sizes)
        weights, experts = ops.route(logits, self.top_k)
        return x, logits, weights, experts

    def arguments(
        self, x: Tensor, weights: Tensor, experts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, str]:
        """The arguments of the experts operators."""
        return x, self.module.gate_up_proj, self.module.down_proj, experts, weights, "silu"

    def operators(self, x: Tensor, logits: Tensor, weights: Tensor, experts: Tensor) -> dict[str, Callable[[], object]]:
        """The operators on these inputs, by name, checked against transformers."""
        self.check(x, logits, weights, experts)
        ours, moments = self.arguments(x, weights, experts), self.new_moments()
        return {
            "route": lambda: ops.route(logits, self.top_k),
            "experts": lambda: ops.experts(*ours),
            "experts_observed": lambda: ops.experts_observed(*ours, moments),
        }

    def new_moments(self) -> Tensor:
        return torch.zeros(self.num_experts, 3, 3, dtype=torch.float64, device=self.device)

    def check(self, x: Tensor, logits: Tensor, weights: Tensor, experts: Tensor) -> None:
        """Raises AssertionError where an operator disagrees with transformers' eager experts or with torch's top-k."""
        ours = self.arguments(x, weights, experts)
        out = ops.experts(*ours)
        expected = self.peer("eager", x, experts, weights)()
        torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[x.dtype] * float(expected.abs().max()))
        moments = self.new_moments()
        assert torch.equal(ops.experts_observed(*ours, moments), out)
        counts = torch.bincount(experts.flatten(), minlength=self.num_experts)
        torch.testing.assert_close(moments[:, 0, 0], counts.double(), rtol=0, atol=0)
        top = torch.softmax(logits.float(), dim=-1).topk(self.top_k, dim=-1).values
        torch.testing.assert_close(weights, top / top.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)
