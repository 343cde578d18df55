"""A MoE layer of vLLM that skips: what vLLM builds in the place of its own ``MoERunner`` and ``RoutedExperts``."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.utils import extract_layer_index

from moe_ext_vllm import counts
from moe_ext_vllm.checkpoint import Checkpoint, read
from moe_ext_vllm.experts import MoeExtExperts
from moe_ext_vllm.router import SkippingRouter
from moe_ext_vllm.rule import Carried

TAKE_ONE_TWICE = frozenset(
    {
        "CPUUnquantizedExperts",
        "TritonExperts",
        "MarlinExperts",
        "DeepGemmExperts",
        "CutlassExpertsFp8",
        "TritonOrDeepGemmExperts",
        "TritonOrCutlassExperts",
    }
)
"""Kernels of vLLM's that compute a token's slots each by itself: the same expert may be in two of them."""
TAKE_MINUS_ONE = frozenset({"OAITritonExperts", "UnfusedOAITritonExperts"})
"""Kernels on triton_kernels, whose bitmatrix of a token's experts has no room for one of them twice."""


def of_layer(layer_name: str) -> tuple[Checkpoint, int | None]:
    """What the checkpoint under construction says, and the number of a decoder layer; None of a layer that is none, as
    those for multi-token prediction, which moe_ext leaves as they are."""
    model_config = get_current_vllm_config().model_config
    if model_config is None:  # vLLM's own tests of a single layer
        return Checkpoint({}), None
    checkpoint = read(model_config)
    if checkpoint.is_plain:
        return checkpoint, None
    layer = extract_layer_index(layer_name)
    return checkpoint, layer if layer < model_config.hf_text_config.num_hidden_layers else None


class SkippingRoutedExperts(RoutedExperts):
    """Experts whose routing is nobody's formula: kernels that route by themselves are not chosen for them."""

    def __init__(self, layer_name: str, params_dtype: torch.dtype, moe_config: Any, *args: Any, **kwargs: Any) -> None:
        checkpoint, layer = of_layer(layer_name)
        if layer is not None and checkpoint.changes_routing:
            moe_config.routing_method = RoutingMethodType.Custom
        super().__init__(layer_name, params_dtype, moe_config, *args, **kwargs)


class SkippingRunner(MoERunner):
    """A MoE layer that skips, where the checkpoint says so; elsewhere vLLM's own.

    Attributes:
        skips: whether the router has the rule behind it.
        skip_thresholds: (K - 1,) float32, or None.
        skip_counts: (2,) int64, slots skipped and slots, or None: they are not counted.
    """

    def __init__(
        self, layer_name: str, moe_config: Any, router: Any, routed_experts: Any, *args: Any, **kwargs: Any
    ) -> None:
        checkpoint, layer = of_layer(layer_name)
        skips = layer is not None and checkpoint.changes_routing
        row = checkpoint.thresholds.get(layer) if layer is not None else None
        if skips:
            _check(layer_name, checkpoint, row, moe_config, router, kwargs)
            router = SkippingRouter(router, checkpoint.scale)
        super().__init__(layer_name, moe_config, router, routed_experts, *args, **kwargs)
        self.skips = skips
        thresholds = None if row is None else torch.tensor(row, dtype=torch.float32)
        self.register_buffer("skip_thresholds", thresholds, persistent=False)
        seconds = None if row is None else counts.wanted()
        counted = None if seconds is None else torch.zeros(2, dtype=torch.int64)
        self.register_buffer("skip_counts", counted, persistent=False)
        if skips:
            router.runner = self
            self._refuse_monolithic()
            # Before weights are loaded, where the kernel is known by then; otherwise by the first token.
            if (experts := getattr(self._quant_method, "experts_cls", None)) is not None:
                self._carried_to(experts)
        if seconds is not None:
            counts.add(layer_name, self, seconds)

    def carried(self) -> Carried:
        """What a skipped slot of this layer carries to its kernel.

        Raises:
            ValueError: the kernel that vLLM chose has not been seen to take any mark.
        """
        kernel = self._quant_method.moe_kernel
        return self._carried_to(type(self._quant_method if kernel is None else kernel.fused_experts))

    def _carried_to(self, experts: type) -> Carried:
        if experts is MoeExtExperts:
            return Carried.PAST_THE_LAST
        parallel = self.moe_config.moe_parallel_config
        if parallel.use_ep and any(cls.__name__ == "CPUUnquantizedExperts" for cls in experts.__mro__):
            raise ValueError(
                f"{self.layer_name}: vLLM's kernel for CPUs ({experts.__name__}) takes every expert for one of its own "
                "rank. Serve without --enable-expert-parallel, or with moe_ext's kernel."
            )
        for cls in experts.__mro__:
            if cls.__name__ in TAKE_MINUS_ONE and not parallel.use_ep:  # a map of experts to ranks has no place -1
                return Carried.MINUS_ONE
            if cls.__name__ in TAKE_ONE_TWICE:
                return Carried.STRONGEST
        raise ValueError(
            f"{self.layer_name}: the checkpoint skips experts, and nobody has looked at what a skipped slot does to "
            f"the kernel that vLLM chose ({experts.__name__}). Choose another with --moe-backend (triton), or serve "
            "with MOE_EXT_VLLM=0 and without skipping."
        )

    def _apply_quant_method(self, *args: Any, **kwargs: Any) -> Any:
        if self.skips:
            self._refuse_monolithic()
        return super()._apply_quant_method(*args, **kwargs)

    def _refuse_monolithic(self) -> None:
        """Raises ValueError if the chosen kernel routes by itself: it would skip nothing."""
        method = self._quant_method
        if getattr(method, "experts_cls", method) is not None and method.is_monolithic:
            raise ValueError(
                f"{self.layer_name}: the checkpoint skips experts, and the kernel that vLLM chose "
                f"({type(method).__name__}) routes by itself. Choose another with --moe-backend (triton), or serve "
                "without skipping with MOE_EXT_VLLM=0."
            )


def _check(
    layer_name: str,
    checkpoint: Checkpoint,
    row: tuple[float, ...] | None,
    moe_config: Any,
    router: Any,
    others: dict[str, Any],
) -> None:
    """Raises ValueError if a layer cannot skip as the checkpoint says."""
    top_k = moe_config.experts_per_token
    if checkpoint.thresholds and (row is None or len(row) != top_k - 1):
        has = "none" if row is None else f"{len(row)}"
        raise ValueError(f"{layer_name}: config.moe_ext has {has} skip thresholds of this layer; expected {top_k - 1}")
    if isinstance(router, ZeroExpertRouter):
        raise ValueError(f"{layer_name}: layers with zero-computation experts do not skip")
    if moe_config.moe_parallel_config.use_all2all_kernels:
        raise ValueError(
            f"{layer_name}: a skipped slot has never been sent through the kernels that exchange tokens between ranks "
            "(data and expert parallelism together). Serve with tensor parallelism, or with MOE_EXT_VLLM=0 and without "
            "skipping."
        )
    if getattr(router, "num_fused_shared_experts", 0) or moe_config.num_experts != moe_config.num_logical_experts:
        raise ValueError(f"{layer_name}: shared experts among the routed ones, or redundant experts, do not skip")
    if isinstance(checkpoint.scale, int) and not top_k <= checkpoint.scale <= moe_config.num_experts:
        raise ValueError(
            f"{layer_name}: config.moe_ext.renormalise is {checkpoint.scale}; "
            f"expected {top_k} to {moe_config.num_experts} experts"
        )
