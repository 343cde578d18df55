"""A router of vLLM with the skip rule behind it: it works above any of them, whatever formula that computes."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter

from moe_ext_vllm.rule import share_of_largest, skip_weak


class SkippingRouter(FusedMoERouter):
    """Routes as another router does, then skips.

    Attributes:
        inner: that router. What is asked of this one or set on it and is not about skipping is its.
        runner: the layer, which holds the thresholds and knows what its kernel wants in a skipped slot.
        scale: as in :class:`moe_ext_vllm.checkpoint.Checkpoint`.
    """

    def __init__(self, inner: FusedMoERouter, scale: str | int) -> None:
        # Not the base class's: it would set on `inner` what models may have set there already.
        self._routing_replay_out: Tensor | None = None
        self.inner = inner
        self.runner: Any = None
        self.scale = scale

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        ours = name in ("inner", "runner", "scale", "_routing_replay_out")
        object.__setattr__(self if ours else self.inner, name, value)

    def set_capture_fn(self, capture_fn: Any) -> None:
        self.inner.set_capture_fn(capture_fn)

    @property
    def routing_method_type(self) -> Any:
        return self.inner.routing_method_type

    def _select_experts(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        topk_indices_dtype: torch.dtype | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """Weights (T, K) and experts (T, K), with skipped slots as :class:`moe_ext_vllm.rule.Carried` says."""
        weights, experts = self.inner._select_experts(hidden_states, router_logits, topk_indices_dtype, **others)
        runner = self.runner
        if isinstance(self.scale, int):
            share = share_of_largest(router_logits, weights.shape[-1], self.scale)
            weights = (weights * share).to(weights.dtype)
        if runner.skip_thresholds is None:
            return weights, experts
        weights, experts, skipped = skip_weak(
            weights,
            experts,
            runner.skip_thresholds,
            runner.moe_config.num_experts,
            runner.carried(),
            rescale=self.scale == "kept",
        )
        if runner.skip_counts is not None:
            runner.skip_counts[0].add_(skipped.sum())
            runner.skip_counts[1].add_(skipped.numel())
        return weights, experts
