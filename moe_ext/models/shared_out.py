"""Experts that transformers shares out among processes: tensor parallelism leaves a process a part of every expert,
expert parallelism whole experts, some of them.

Between forwards the weights are DTensors with the whole model's shapes. For the time of the experts' forward
transformers puts this process's own parts, plain tensors, in their places; what comes out is summed over the processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.models.boundary import MEANS


def is_shared(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor"


def has_some_experts(experts: nn.Module) -> bool:
    """Whether expert parallelism leaves this process some of a layer's experts."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def how_shared(experts: nn.Module) -> str | None:
    """The parallelism by which a layer's experts are shared out; None if this process has all of them whole."""
    if has_some_experts(experts):
        return "expert parallelism"
    return "tensor parallelism" if any(map(is_shared, experts.parameters())) else None


@contextmanager
def own_parts(experts: nn.Module) -> Iterator[None]:
    """This process's parts of an experts module's weights in their places, as in its forward."""
    shared = {name: tensor for name, tensor in experts._parameters.items() if tensor is not None and is_shared(tensor)}
    for name, tensor in shared.items():
        experts._parameters[name] = cast(Any, tensor.detach()).to_local()
    try:
        yield
    finally:
        experts._parameters.update(shared)


def check_shared_out(model: PreTrainedModel, named: Sequence[tuple[str, nn.Module]]) -> None:
    """Checks that the operators can run a model's experts where they are, if it is shared out among processes.

    Args:
        named: the experts modules by their layers' names.

    Raises:
        ValueError: layers that other processes have, FSDP, means in the place of experts, or weights of which the
            forward would not get this process's parts.
    """
    sizes = _sizes(model)
    if sizes.get("pp_size", 1) > 1:
        raise ValueError(
            "pipeline parallelism leaves this process some of the model's layers, which moe_ext does not support; "
            "use tensor or expert parallelism"
        )
    if sizes.get("fsdp_size", 1) > 1 or any("FSDPModule" in _class_names(module) for module in model.modules()):
        raise ValueError(
            "FSDP gathers the model's weights before every forward, which moe_ext does not support; use tensor or "
            "expert parallelism, or DistributedDataParallel"
        )
    for name, experts in named:
        if (how := how_shared(experts)) is None:
            continue
        if MEANS in experts._buffers:
            raise ValueError(f"{name}: means in the place of removed experts, which {how} would add in every process")
        whole = [key for key, tensor in experts.named_parameters(recurse=False) if not is_shared(tensor)]
        if whole or "forward" not in vars(experts):
            raise ValueError(
                f"{name}: {type(experts).__name__} has DTensors "
                + (f"beside a whole {whole[0]}" if whole else "in its forward")
                + "; expected experts that from_pretrained(..., distributed_config=...) shared out"
            )
        if sizes.get("ep_implementation") == "deepgemm_megamoe":
            raise ValueError(f"{name}: ep_implementation='deepgemm_megamoe' runs kernels of its own only")


def exchanges_tokens(model: PreTrainedModel, training: bool) -> bool:
    """Whether expert parallelism sends slots to the processes that have their experts, rather than masks them."""
    sizes = _sizes(model)
    implementation = sizes.get("ep_implementation", "auto")
    if implementation == "auto":
        return training or sizes.get("ep_size") != sizes.get("tp_size")
    return bool(implementation != "all_reduce")


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    """The sizes and choices of transformers' DistributedConfig; empty for a model that it did not share out."""
    config = getattr(model.config, "distributed_config", None)
    return {} if config is None or getattr(model, "_device_mesh", None) is None else vars(config)


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}
