"""The boundary of a MoE layer, in any family: a module of transformers' experts interface, given hidden states, experts
and weights by the module beside it whose outputs these are, its router. Some modules are called so past the interface
(:mod:`moe_ext.models.direct_experts`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.models.direct_experts import counting_attribute, direct_experts
from moe_ext.models.only_pruned import is_only_pruned
from moe_ext.models.packed_experts import packed_format

# Buffers that moe_ext.models.novices puts into experts modules.
PLACES, MEANS = "moe_ext_places", "moe_ext_means"


@dataclass(frozen=True)
class Boundary:
    """One MoE layer.

    Attributes:
        name: name of the module that holds the next two.
        module: that module.
        router: name in it of the module that chooses experts.
        top_k: K.
        experts: name in it of the module with the experts' weights.
    """

    name: str
    module: nn.Module
    router: str
    top_k: int
    experts: str


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer in stacked tensors."""
    return goes_through_interface(module) or direct_experts(module) is not None or is_only_pruned(module)


def goes_through_interface(experts: nn.Module) -> bool:
    """Whether a module's class goes through transformers' experts interface."""
    return "is_concatenated" in vars(experts) and hasattr(type(experts).forward, "__wrapped__")


def num_experts(experts: nn.Module) -> int:
    """E."""
    return int(getattr(experts, counting_attribute(experts)))


def num_routed(experts: nn.Module) -> int:
    """Experts that a router chooses from: with means in the place of some, or some in other processes, more than there
    are. Not to be asked within the experts' forward."""
    places = experts._buffers.get(PLACES)
    if places is not None:
        return len(places)
    if getattr(experts, "_is_expert_parallel", False):  # between forwards the weight has the whole model's shape
        return int(cast(Tensor, experts.down_proj).shape[0])
    return num_experts(experts)


def is_transposed(experts: nn.Module) -> bool:
    """Whether an experts module's weights lie as (E, in, out); quantised ones never do."""
    if packed_format(experts) is not None:
        return False
    record = direct_experts(experts)
    return bool(getattr(experts, "is_transposed", False)) if record is None else record.is_transposed


def output_width(experts: nn.Module) -> int:
    """Numbers that an expert returns for a token: the hidden size, or that of the latent space in which some families'
    experts work."""
    down: Any = experts.down_proj
    return int(down.shape[2 if is_transposed(experts) else 1])


def eager_forward(experts: nn.Module) -> Any:
    """The forward that the modeling code wrote, under the interface's wrapper: a function of the module, (T, H) hidden
    states, (T, K) experts and (T, K) weights."""
    record = direct_experts(experts)
    if record is not None:
        return record.experts or type(experts).forward
    return type(experts).forward.__wrapped__  # type: ignore[attr-defined]


def placed_experts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """The experts modules of a model's text decoder, in order: the name of the module that holds one, that module, the
    experts' name in it, and they. Experts of other parts (of images, say) are not among them."""
    config = model.config.get_text_config(decoder=True)
    kind = type(config)
    for name, module in model.named_modules():
        for key, experts in module.named_children():
            if is_experts(experts) and isinstance(getattr(experts, "config", config), kind):
                yield name, module, key, experts


def boundaries(model: PreTrainedModel) -> list[Boundary]:
    """The MoE layers of a model's text decoder, in order.

    Raises:
        ValueError: a layer's router cannot be told from the modules beside its experts.
    """
    config = model.config.get_text_config(decoder=True)
    return [
        Boundary(name, module, *_router(name, module, experts, config), key)
        for name, module, key, experts in placed_experts(model)
    ]


def _router(name: str, module: nn.Module, experts: nn.Module, config: Any) -> tuple[str, int]:
    """The name of the router beside a layer's experts, and K."""
    beside = [(key, child) for key, child in module.named_children() if child is not experts]
    said = [(key, child) for key, child in beside if hasattr(child, "top_k") and hasattr(child, "num_experts")]
    found: list[tuple[str, int]] = [(key, cast(Any, child).top_k) for key, child in said]
    found = [(key, top_k) for key, top_k in found if type(top_k) is int]
    if not said:
        # A router has a tensor of a row an expert; what has none is not tried.
        might = [(key, child) for key, child in beside if _counts(child, num_routed(experts))]
        if is_only_pruned(experts):  # its router may leave the choice of K to the module that holds both
            tried = [(key, cast(int | None, getattr(module, "top_k", None))) for key, _ in might]
        else:
            tried = [(key, _routes(child, config.hidden_size)) for key, child in might]
        found = [(key, top_k) for key, top_k in tried if top_k is not None]
    if len(found) != 1:
        raise ValueError(
            f"{name}: {type(module).__name__} has {len(found)} modules beside its experts that choose experts, of "
            f"{[key for key, _ in beside]}; expected one, the router. Model type {config.model_type!r} is not supported"
        )
    return found[0]


def _counts(module: nn.Module, experts: int) -> bool:
    return any(experts in tensor.shape for tensor in (*module.parameters(), *module.buffers()))


def _routes(module: nn.Module, hidden_size: int) -> int | None:
    """K of a module that makes weights (T, K) and experts (T, K) of hidden states, tried on the meta device; None for
    one that does not."""
    tensors = {name: tensor.to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    weight = next((tensor for tensor in tensors.values() if tensor.is_floating_point()), None)
    if weight is None:
        return None
    x = torch.empty(2, hidden_size, dtype=weight.dtype, device="meta")
    plain = copy.copy(module)  # without what was put onto the module: a forward, hooks
    vars(plain).pop("forward", None)
    vars(plain).update({name: OrderedDict() for name in vars(plain) if name.endswith("_hooks")})
    try:
        with torch.no_grad():
            output = torch.func.functional_call(plain, tensors, (x,))
    except Exception:
        return None  # not a module of hidden states alone
    return next((experts.shape[1] for experts in _choices(output)), None)


def _choices(output: object) -> Iterator[Tensor]:
    """Tensors of a module's output that may be (T, K) experts: integers, beside weights of the same shape."""
    tensors = [one for one in output if isinstance(one, Tensor)] if isinstance(output, tuple) else []
    shapes = {tuple(tensor.shape) for tensor in tensors if tensor.is_floating_point()}
    for tensor in tensors:
        if tensor.dim() == 2 and tensor.dtype in (torch.int32, torch.int64) and tuple(tensor.shape) in shapes:
            yield tensor
