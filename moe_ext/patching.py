"""Patch and unpatch: puts the operators behind a Hugging Face model's MoE layers, in place and reversibly.

The experts go through transformers' own door: ``moe_ext`` is an experts implementation next to ``eager`` and
``grouped_mm``, selected with ``model.set_experts_implementation``. Weights stay the model's own parameters, uncopied.
The router's forward is replaced on the instance, so that top-K, renormalisation and skipping are one operator. Where
gradients are required, both run transformers' own differentiable code.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_ext import ops
from moe_ext.architectures import MoeBlock, activation_of, check_experts, check_layout, moe_blocks
from moe_ext.binary import _C
from moe_ext.routing import CONFIG_KEY, check_thresholds, section_with, skip_weak, thresholds_in_config

IMPLEMENTATION = "moe_ext"
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Patch:
    """What a patched model needs to become what it was: kept on the model as ``_moe_ext_patch``."""

    implementation: dict[str, str | None]  # of transformers, as get_experts_implementation returns it
    config_entry: dict[str, Any] | None  # config.moe_ext before the patch
    thresholds: Tensor | None  # (L, K - 1) in use


def is_patched(model: PreTrainedModel) -> bool:
    return getattr(model, "_moe_ext_patch", None) is not None


def active_thresholds(model: PreTrainedModel) -> Tensor | None:
    """Skip thresholds (L, K - 1) that a patched model applies; None if it skips nothing or is not patched."""
    state: _Patch | None = getattr(model, "_moe_ext_patch", None)
    return None if state is None else state.thresholds


def patch(model: PreTrainedModel, *, skip: Tensor | Literal["config"] | None = "config") -> PreTrainedModel:
    """Runs a model's MoE layers on moe_ext's operators, in place. Patching again replaces the skip thresholds.

    Args:
        model: a supported transformers model (float32, bfloat16 or float16), on a device that has kernels.
        skip: thresholds (L, K - 1) for dynamic expert skipping, from :func:`moe_ext.skip_thresholds`; they are also
            written into ``model.config``, so that ``save_pretrained`` keeps them. "config" (default): those that the
            config holds, if it holds any. None: no skipping by this model object; thresholds that a checkpoint brought
            stay in its config.

    Returns:
        The same model.

    Raises:
        TypeError: not a transformers model.
        ValueError: no MoE layers, an unsupported model type, device, dtype, activation or experts layout, or thresholds
            that do not fit. The model is left as it was.
    """
    blocks = moe_blocks(model)
    for block in blocks:
        _check_block(block)
    if isinstance(skip, str):
        if skip != "config":
            raise ValueError(f"skip is {skip!r}; expected thresholds, 'config' or None")
        thresholds = thresholds_in_config(model.config, len(blocks), blocks[0].top_k)
    else:
        thresholds = None if skip is None else check_thresholds(skip, len(blocks), blocks[0].top_k)

    state: _Patch | None = getattr(model, "_moe_ext_patch", None)
    if state is None:
        _check_unpatched(blocks)
        entry = getattr(model.config, CONFIG_KEY, None)
        state = _Patch(model.get_experts_implementation(), None if entry is None else dict(entry), None)
    model.set_experts_implementation(IMPLEMENTATION)  # before anything else changes: transformers may refuse
    model._moe_ext_patch = state
    state.thresholds = thresholds
    if not isinstance(skip, str):
        _restore_config_entry(model, state)  # thresholds of an earlier patch are replaced, not kept
        if thresholds is not None:
            setattr(model.config, CONFIG_KEY, section_with(thresholds, state.config_entry))
    named = state.implementation[""]
    # Of transformers' implementations only eager leaves sentinel slots out; ours, when loaded by name, has no backward.
    eager = thresholds is not None or named in (None, IMPLEMENTATION)
    for layer, block in enumerate(blocks):
        block.experts._moe_ext_fallback = "eager" if eager else named  # type: ignore[assignment]
        block.router._moe_ext_thresholds = None if thresholds is None else thresholds[layer].clone()  # type: ignore[assignment]
        block.router.forward = partial(_router_forward, block.router)  # a bound method would not unpickle
    return model


def _check_unpatched(blocks: list[MoeBlock]) -> None:
    """ValueError if a block is patched already, through another model object, or has a forward of its own."""
    for block in blocks:
        if hasattr(block.router, "_moe_ext_thresholds"):
            raise ValueError(f"{block.name} is patched already as part of another model; unpatch that one first")
        if "forward" in vars(block.router):
            raise ValueError(
                f"{block.name}: the router's forward was replaced on the instance (accelerate's hooks do so); "
                "patch before, or load without them"
            )


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes :func:`patch`, thresholds in the config included. A model that is not patched is returned as it is."""
    state: _Patch | None = getattr(model, "_moe_ext_patch", None)
    if state is None:
        return model
    for block in moe_blocks(model):
        del block.router.forward, block.router._moe_ext_thresholds, block.experts._moe_ext_fallback
    model.set_experts_implementation(state.implementation)
    _restore_config_entry(model, state)
    del model._moe_ext_patch
    return model


def _restore_config_entry(model: PreTrainedModel, state: _Patch) -> None:
    if state.config_entry is not None:
        setattr(model.config, CONFIG_KEY, dict(state.config_entry))
    elif hasattr(model.config, CONFIG_KEY):
        delattr(model.config, CONFIG_KEY)


def _check_block(block: MoeBlock) -> None:
    """ValueError, naming the layer, if the operators cannot run this block."""
    check_layout(block)
    try:
        activation_of(block.experts.config)
    except ValueError as error:
        raise ValueError(f"{block.name}: {error}") from None
    gate_up = cast(Tensor, block.experts.gate_up_proj)
    if gate_up.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"{block.name}: dtype {gate_up.dtype} is not supported; use float32, bfloat16 or float16")
    if gate_up.device.type == "cuda" and not _C.cuda_archs:
        raise ValueError(
            f"{block.name} is on {gate_up.device}, but this build of moe_ext has no CUDA kernels; "
            "move the model to the CPU, or build with MOE_EXT_CUDA=1"
        )
    if gate_up.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{block.name}: device {gate_up.device} is not supported; use the CPU")
    for name, parameter in block.experts.named_parameters():
        if (parameter.dtype, parameter.device) != (gate_up.dtype, gate_up.device):
            raise ValueError(f"{block.name}: {name} has another dtype or device than gate_up_proj")
        if not parameter.is_contiguous():
            raise ValueError(f"{block.name}: {name} is not contiguous; replace its data by data.contiguous()")


def _gradients_required(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation ``moe_ext`` of transformers' interface: (T, H), (T, K), (T, K) -> (T, H)."""
    gate_up, down = cast(Tensor, self.gate_up_proj), cast(Tensor, self.down_proj)
    if _gradients_required(hidden_states, top_k_weights, gate_up, down):
        differentiable = _differentiable_forward(self)
        return differentiable(self, hidden_states, top_k_index, top_k_weights)
    if not hasattr(self, "_moe_ext_fallback"):  # selected by name, without patch: nobody has checked this module
        check_experts("experts", self)
    activation = activation_of(self.config)
    x = hidden_states.to(gate_up.dtype)  # under autocast the two differ; transformers' grouped_mm casts alike
    observer = getattr(self, "_moe_ext_observer", None)
    if observer is None:
        out = ops.experts(x, gate_up, down, top_k_index, top_k_weights, activation)
    else:
        out = observer(x, gate_up, down, top_k_index, top_k_weights, activation)
    return out.to(hidden_states.dtype)


def _differentiable_forward(experts: nn.Module) -> Any:
    """What transformers ran before the patch: a function of (self, hidden_states, top_k_index, top_k_weights)."""
    name = getattr(experts, "_moe_ext_fallback", "eager")
    eager = type(experts).forward.__wrapped__  # type: ignore[attr-defined]  # under the interface's wrapper
    return ALL_EXPERTS_FUNCTIONS.get(name, eager)


def _router_forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A patched router: logits (T, E), weights (T, K) float32, experts (T, K) int64, E where a slot is skipped."""
    weight = cast(Tensor, self.weight)
    thresholds = cast(Tensor | None, self._moe_ext_thresholds)
    if thresholds is not None and thresholds.device != hidden_states.device:
        thresholds = self._moe_ext_thresholds = thresholds.to(hidden_states.device)
    if _gradients_required(hidden_states, weight):
        logits, weights, experts = type(self).forward(self, hidden_states)
        if thresholds is not None:
            weights, experts = skip_weak(weights, experts, thresholds, weight.shape[0])
        return logits, weights, experts
    logits = F.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), weight)  # (T, E)
    weights, experts = ops.route(logits, cast(int, self.top_k), thresholds)
    return logits, weights, experts


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
