"""A model built: refused before, or looked over after, so that no checkpoint is served otherwise than it says."""

from typing import Any

from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.model_executor.model_loader import utils
from vllm.model_executor.models.utils import extract_layer_index

from moe_ext_vllm.checkpoint import COUNTS, Checkpoint, read
from moe_ext_vllm.runner import SkippingRunner

_initialize_model = utils.initialize_model


def initialize_model(vllm_config: Any, *args: Any, model_config: Any = None, **kwargs: Any) -> Any:
    """vLLM's function, for a checkpoint that can be served.

    Raises:
        ValueError: it cannot be, in this configuration or at all; the reason is named.
    """
    of_model = vllm_config.model_config if model_config is None else model_config
    checkpoint = read(of_model)
    if not checkpoint.is_plain:
        _refuse(checkpoint, vllm_config.parallel_config)
    model = _initialize_model(vllm_config, *args, model_config=model_config, **kwargs)
    if not checkpoint.is_plain:
        _look_over(model, checkpoint, of_model, vllm_config.parallel_config)
    return model


def _refuse(checkpoint: Checkpoint, parallel: Any) -> None:
    if checkpoint.novices:
        raise ValueError(
            "this checkpoint has means in the place of experts (novices, config.moe_ext.experts_left), which vLLM does "
            "not compute. It loads with moe_ext.from_pretrained; prune without novices to serve it."
        )
    if checkpoint.own_counts:
        raise ValueError(
            "this checkpoint has layers with different numbers of experts of a family whose config has one for all "
            "(they are in config.moe_ext.num_experts), which vLLM does not build. It loads with "
            "moe_ext.from_pretrained; prune with one number for all layers (plan --scope layer) to serve it."
        )
    what = "skips experts" if checkpoint.changes_routing else "has layers that differ" if checkpoint.unequal else ""
    if what and parallel.enable_eplb:
        raise ValueError(
            f"this checkpoint {what}, which balancing of experts (--enable-eplb) does not know: it counts and moves "
            "experts as if every slot had one and all layers were alike. Serve it without --enable-eplb."
        )
    if checkpoint.unequal & set(COUNTS) and parallel.enable_expert_parallel:
        raise ValueError(
            "this checkpoint has layers with different numbers of experts, which vLLM's expert parallelism "
            "(--enable-expert-parallel) does not divide. Serve it with tensor parallelism."
        )


def _look_over(model: Any, checkpoint: Checkpoint, model_config: Any, parallel: Any) -> None:
    """Raises ValueError if a layer that was built is not what the checkpoint says."""
    text = model_config.hf_text_config
    runners: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, MoERunnerInterface):
            layer = extract_layer_index(module.layer_name)
            if layer < text.num_hidden_layers:
                runners[layer] = module
    if checkpoint.changes_routing:
        for runner in runners.values():
            if not (isinstance(runner, SkippingRunner) and runner.skips):
                raise ValueError(
                    f"this checkpoint skips experts, and {type(model).__name__} in vLLM runs {runner.layer_name} as "
                    f"{type(runner).__name__}, which moe_ext_vllm does not know. MOE_EXT_VLLM=0 serves it without "
                    "skipping."
                )
        here = range(*model_config.get_layers_start_end_indices(parallel))
        without = sorted(layer for layer in checkpoint.thresholds if layer in here and layer not in runners)
        if without:
            raise ValueError(
                f"config.moe_ext has skip thresholds of decoder layers {without}, and {type(model).__name__} in vLLM "
                "has no experts there that moe_ext_vllm knows. MOE_EXT_VLLM=0 serves it without skipping."
            )
    counts = checkpoint.unequal & set(COUNTS)
    for layer, runner in runners.items():
        for name in counts:
            expected, built = getattr(text.per_layer_config[layer], name), runner.moe_config.num_logical_experts
            if expected != built:
                raise ValueError(
                    f"{runner.layer_name} was built with {built} experts and has {expected} in the checkpoint: "
                    f"{type(model).__name__} in vLLM does not build its layers one by one."
                )
