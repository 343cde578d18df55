"""Which experts the operators can run, and why others not."""

from typing import Any, cast

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from moe_ext.binary import _C
from moe_ext.models.blocks import MoeBlock, check_plain, device_of, expert_tensors, tensors_of
from moe_ext.models.dtypes import DTYPES
from moe_ext.models.router_formula import known_router

# transformers' names (config.hidden_act) of the activations that the operators compute.
ACTIVATION_OF_HIDDEN_ACT = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def check_experts(name: str, experts: nn.Module) -> None:
    """Checks that an experts module computes ``down (act(gate x) * (up x))`` on plain (E, 2I, H) and (E, H, I) weights.

    Raises:
        ValueError: what is different, beginning with ``name``.
    """
    flags = {
        "is_transposed": "transposed weights",
        "has_bias": "biases",
        "has_post_expert_norm": "a norm after each expert",
        "_is_expert_parallel": "expert parallelism",
    }
    found = [reason for flag, reason in flags.items() if getattr(experts, flag, False)]
    if not getattr(experts, "has_gate", True):
        found.append("no gate projection")
    if not getattr(experts, "is_concatenated", True):
        found.append("interleaved gate and up rows")
    if getattr(type(experts), "_apply_gate", None) is not _default_apply_gate:
        found.append("its own gating function")
    elif not _is_activation_of(experts.config, experts.act_fn):
        found.append("another activation than its config names")
    if found:
        raise ValueError(f"{name}: {type(experts).__name__} has {' and '.join(found)}, which moe_ext does not support")
    tensors = tensors_of(experts)
    if set(tensors) != {"gate_up_proj", "down_proj"}:
        raise ValueError(
            f"{name}: {type(experts).__name__} has parameters {sorted(tensors)}; "
            "expected plain ['down_proj', 'gate_up_proj']"
        )
    for key, tensor in tensors.items():
        check_plain(name, experts, key, tensor)


def _is_activation_of(config: Any, activation: object) -> bool:
    name = getattr(config, "hidden_act", None)
    return name in ACT2FN and type(ACT2FN[name]) is type(activation)


def activation_of(config: Any) -> str:
    """The operators' name of a config's activation.

    Raises:
        ValueError: the operators do not compute that activation.
    """
    activation = ACTIVATION_OF_HIDDEN_ACT.get(config.hidden_act)
    if activation is None:
        raise ValueError(
            f"hidden_act {config.hidden_act!r} is not supported; supported: {', '.join(ACTIVATION_OF_HIDDEN_ACT)}"
        )
    return activation


def check_tensors(block: MoeBlock) -> None:
    """ValueError, naming the layer, unless the block's weights are plain tensors in memory in the expected shapes."""
    expert_tensors(block)
    weight = tensors_of(block.router).get("weight")
    if known_router(block) is not None:  # others run their own code, whatever they hold
        for name, tensor in tensors_of(block.router).items():
            check_plain(block.name, block.router, name, tensor)
    elif weight is not None and weight.dim() == 2 and weight.shape[0] < block.num_routed:
        raise ValueError(
            f"{block.name}: the router's weight has shape {tuple(weight.shape)}; "
            f"expected {block.num_routed} experts along dimension 0"
        )


def reason_unsupported(block: MoeBlock) -> str | None:
    """Why the operators cannot run a block's experts, naming the layer; None if they can."""
    try:
        check_experts(block.name, block.experts)
        activation_of(block.experts.config)
    except ValueError as error:
        reason = str(error)
        return reason if reason.startswith(block.name) else f"{block.name}: {reason}"
    gate_up = cast(Tensor, block.experts.gate_up_proj)
    if gate_up.dtype not in DTYPES.values():
        return f"{block.name}: dtype {gate_up.dtype} is not supported; use float32, bfloat16 or float16"
    device = device_of(block.experts, gate_up)
    if device.type == "cuda" and not _C.cuda_archs:
        return (
            f"{block.name} is on {device}, but this build of moe_ext has no CUDA kernels; "
            "move the model to the CPU, or build with MOE_EXT_CUDA=1"
        )
    if device.type not in ("cpu", "cuda"):
        return f"{block.name}: device {device} is not supported; use the CPU"
    for name, parameter in block.experts.named_parameters():
        if (parameter.dtype, parameter.device) != (gate_up.dtype, gate_up.device):
            return f"{block.name}: {name} has another dtype or device than gate_up_proj"
        if not parameter.is_contiguous():
            return f"{block.name}: {name} is not contiguous; replace its data by data.contiguous()"
    return None
