"""moe_ext's ``experts`` operator as a kernel of vLLM's for experts that are not quantised.

vLLM's ``w13`` (E, 2I, H) and ``w2`` (E, H, I) are the operator's own layout: nothing is packed anew or copied. Rows of
gate and up that take turns, biases and bounds, as gpt-oss has them, are options of the operator.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from moe_ext_vllm import library

_logger = init_logger("vllm.moe_ext")

ON_CUDA = "MOE_EXT_VLLM_KERNELS"
"""Environment variable: 1 runs moe_ext's CUDA kernels too. Not by default until they were measured inside vLLM."""
# vLLM's activations: the operator's, and what it is told beside it. vLLM has gpt-oss's numbers in its kernels, too.
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("silu", {}),
    "gelu": ("gelu", {}),
    "gelu_tanh": ("gelu_tanh", {}),
    "swigluoai": ("silu", {"interleaved": True, "limit": 7.0, "alpha": 1.702, "up_offset": 1.0}),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MoeExtExperts(mk.FusedMoEExpertsModular):
    """Experts computed by ``torch.ops.moe_ext.experts``."""

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu() or (current_platform.is_cuda() and os.environ.get(ON_CUDA) == "1")

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value in _ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_all2all_kernels  # whose tokens come in other forms

    @staticmethod
    def _supports_batch_invariance() -> bool:
        # On the CPU a token's result depends on no other token; CUDA chooses a kernel by the number of tokens.
        return current_platform.is_cpu()

    @staticmethod
    def is_supported_config(
        cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
    ) -> tuple[bool, str | None]:
        supported, reason = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        if not supported:
            return supported, reason
        if moe_config.in_dtype not in _DTYPES:
            return False, f"kernel does not support {moe_config.in_dtype}"
        limits = [getattr(moe_config, name, None) for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")]
        if any(limit is not None for limit in limits):
            return False, "kernel does not support bounds of the activation"
        return True, None

    def workspace_shapes(self, M: int, N: int, K: int, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
        return (0,), (0,), (M, K)  # the operator has its own memory

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Writes (T, H), weighted and summed, into ``output``."""
        weights = topk_weights.to(torch.float32)
        if apply_router_weight_on_input:  # of one expert a token, already multiplied in
            weights = torch.ones_like(weights)
        ids = topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.to(torch.int64)
        if expert_map is not None:
            ids = _of_this_rank(ids, expert_map, len(w1))
        name, options = _ACTIVATIONS[activation.value]
        # On other ranks than the first vLLM has loaded zeros for the biases of w2.
        biases = {"gate_up_bias": self.w1_bias, "down_bias": self.w2_bias}
        output.copy_(torch.ops.moe_ext.experts(hidden_states, w1, w2, ids, weights, name, **options, **biases))


def _of_this_rank(ids: Tensor, expert_map: Tensor, held: int) -> Tensor:
    """Experts (T, K) by the rank's own numbers; ``held`` in slots of other ranks' experts, and in skipped ones.

    Args:
        ids: (T, K) by the model's numbers; past the last of them where a slot is skipped.
        expert_map: (E,) the rank's number of every expert, or -1.
        held: experts that the rank has.
    """
    own = F.pad(expert_map, (0, 1), value=-1)[ids.long()]
    return own.masked_fill(own < 0, held)


class MoeExtMethod(UnquantizedFusedMoEMethod):
    """vLLM's method for experts that are not quantised, with moe_ext's kernel where that computes them."""

    def __init__(self, moe: Any) -> None:
        super().__init__(moe)
        reason = library.load()
        if reason is None:
            supported, unsupported = MoeExtExperts.is_supported_config(
                MoeExtExperts, self.moe, None, None, MoeExtExperts.activation_format()
            )
            if supported:
                self.experts_cls = MoeExtExperts
                _logger.info_once("Using moe_ext's experts kernel.")
                return
            reason = unsupported
        _logger.info_once(f"Not using moe_ext's experts kernel: {reason}.")
