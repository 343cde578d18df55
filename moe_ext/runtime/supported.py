"""Which experts the operators can run, and why others not."""

from collections.abc import Mapping

from torch import Tensor, nn

from moe_ext.binary import _C
from moe_ext.models.blocks import MoeBlock, check_plain, device_of, expert_tensors, tensors_of
from moe_ext.models.boundary import is_transposed
from moe_ext.models.direct_experts import passed_on
from moe_ext.models.dtypes import DTYPES
from moe_ext.models.packed_experts import packed_format, tensor_names
from moe_ext.models.quantised_experts import check_not_quantised
from moe_ext.models.router_formula import known_router
from moe_ext.runtime.formulas import experts_layer, find_formula


def check_experts(name: str, experts: nn.Module) -> None:
    """Checks that an experts module holds plain weights, and nothing of an expert outside what the operators compute.

    Raises:
        ValueError: what is different, beginning with ``name``.
    """
    check_not_quantised(name, experts)
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(
            f"{name}: {type(experts).__name__} has a norm after each expert, which moe_ext does not support"
        )
    expected, tensors = tensor_names(experts), tensors_of(experts)
    if set(tensors) != expected:
        raise ValueError(
            f"{name}: {type(experts).__name__} has parameters {sorted(tensors)}; expected plain {sorted(expected)}"
        )
    for key, tensor in tensors.items():
        check_plain(name, experts, key, tensor)
    if packed_format(experts) is None:
        _check_shapes(name, experts, tensors)


def _check_shapes(name: str, experts: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless the weights fit each other as the module's class says they lie."""
    gated, transposed = getattr(experts, "has_gate", True), is_transposed(experts)
    first = tensors["gate_up_proj" if gated else "up_proj"]
    size = (first.shape[0] - passed_on(experts), *first.shape[1:]) if first.dim() else ()
    if transposed and len(size) == 3:
        size = (size[0], size[2], size[1])
    if len(size) == 3 and (not gated or size[1] % 2 == 0):
        count, rows, hidden = size
        width = rows // 2 if gated else rows
        down = (count, width, hidden) if transposed else (count, hidden, width)
        expected = {"down_proj": down, "down_proj_bias": (count, hidden)}
        expected[f"{'gate_up' if gated else 'up'}_proj_bias"] = (count, rows)
        if all(tuple(tensors[key].shape) == shape for key, shape in expected.items() if key in tensors):
            return
    shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items())
    kind = "transposed " if transposed else ""
    raise ValueError(f"{name}: {type(experts).__name__} has {kind}weights that do not fit each other: {shapes}")


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
        layer = experts_layer(block.experts, find_formula(block.experts))
    except ValueError as error:
        reason = str(error)
        return reason if reason.startswith(block.name) else f"{block.name}: {reason}"
    gate_up = layer.gate_up
    if layer.packed is None and gate_up.dtype not in DTYPES.values():
        return f"{block.name}: dtype {gate_up.dtype} is not supported; use float32, bfloat16 or float16"
    device = device_of(block.experts, next(iter(tensors_of(block.experts).values())))
    if device.type == "cuda" and not _C.cuda_archs:
        return (
            f"{block.name} is on {device}, but this build of moe_ext has no CUDA kernels; "
            "move the model to the CPU, or build with MOE_EXT_CUDA=1"
        )
    if device.type not in ("cpu", "cuda"):
        return f"{block.name}: device {device} is not supported; use the CPU"
    for name, parameter in block.experts.named_parameters():
        other = parameter.dtype != gate_up.dtype and layer.packed is None
        if other or parameter.device != gate_up.device:
            return f"{block.name}: {name} has another dtype or device than the first of the weights"
        if not parameter.is_contiguous():
            return f"{block.name}: {name} is not contiguous; replace its data by data.contiguous()"
    return None
