"""The MoE layers of a live model, as everything else in the package sees them: the :class:`MoeBlock` list of
:func:`moe_blocks`, in layer order.

A family without a record in :mod:`moe_ext.models.families` is recognised by transformers' experts interface
(:func:`transformers.integrations.use_experts_implementation`): its record is then read off the model, and what cannot
be read off it is left to the family's own code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.models.families import FAMILIES, NUM_EXPERTS_FIELDS, Family
from moe_ext.models.quantised_experts import check_not_quantised
from moe_ext.storage.digests import tensor_bytes


def router_digest(block: MoeBlock) -> str:
    """Of a block's router: experts are too many to read for this. The same in every dtype that holds the weights.
    Empty if they are not in memory."""
    if any(tensor.is_meta for tensor in block.router.parameters()):
        return ""
    digest = hashlib.sha256(block.name.encode())
    for tensor in block.router.parameters():
        digest.update(tensor_bytes(tensor.float()))
    return digest.hexdigest()


# Buffers that moe_ext.models.novices puts into experts modules.
PLACES, MEANS = "moe_ext_places", "moe_ext_means"

# Attribute of a weight on the meta device that is loaded before it is used (checkpoints/meta_model): its device then.
LOADED_LATER = "_moe_ext_loaded_later"

_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class MoeBlock:
    """One MoE layer of a live model.

    Attributes:
        name: the block's module name, such as ``model.layers.0.mlp``.
        module: the block, which holds the next two.
        router: the module that chooses experts.
        experts: the module that holds the experts' weights.
        family: the family's record; ``renormalise`` is a bool in it.
        groups: expert groups; 1 if the family has none.
        groups_per_token: groups that a token's experts come from.
    """

    name: str
    module: nn.Module
    router: nn.Module
    experts: nn.Module
    family: Family
    groups: int = 1
    groups_per_token: int = 1

    @property
    def num_experts(self) -> int:
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    @property
    def has_novices(self) -> bool:
        """Whether the means of removed experts take their places (:mod:`moe_ext.models.novices`)."""
        return MEANS in self.experts._buffers

    @property
    def num_routed(self) -> int:
        """Experts that the router chooses from: with novices, more than there are."""
        return int(self.router.num_experts) if self.has_novices else self.num_experts  # type: ignore[arg-type]

    @property
    def top_k(self) -> int:
        return int(self.router.top_k)  # type: ignore[arg-type]

    @property
    def fewest_experts(self) -> int:
        """The least number of experts with which the router can still choose K."""
        per_group = max(self.family.fewest_per_group, -(-self.top_k // self.groups_per_token))
        return self.groups * per_group

    @property
    def layer(self) -> int:
        """Index of the decoder layer that the block is in.

        Raises:
            ValueError: the block's name does not say.
        """
        if (found := _DECODER_LAYER.search(self.name)) is None:
            raise ValueError(f"{self.name} is in no numbered decoder layer")
        return int(found[1])

    def routing_tensors(self) -> list[tuple[nn.Module, str, Tensor, int]]:
        """Per-expert parameters and buffers outside the experts: module, name in it, tensor, dimension of experts.

        They are the router's; of a family without a record also those that the block itself holds, such as a
        correction bias.

        Raises:
            ValueError: a tensor's shape does not say which dimension counts experts, or is not the record's.
        """
        router, dimensions = tensors_of(self.router), self.family.router_parameters
        if dimensions is None:
            own = {name: tensor for name, tensor in tensors_of(self.module).items() if "." not in name}
            return [*self._counting(self.router, router), *self._counting(self.module, own)]
        if set(router) != set(dimensions):
            raise ValueError(
                f"{self.name}: {type(self.router).__name__} has parameters {sorted(router)}; "
                f"expected plain {sorted(dimensions)}"
            )
        return [(self.router, name, router[name], dim) for name, dim in dimensions.items()]

    def _counting(
        self, module: nn.Module, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
        for name, tensor in tensors.items():
            counting = [dim for dim, size in enumerate(tensor.shape) if size == self.num_routed]
            # A vector of another size has nothing to do with experts; a matrix might, in a way that is not known.
            if len(counting) > 1 or (not counting and tensor.dim() > 1):
                raise ValueError(
                    f"{self.name}: cannot tell which dimension of {type(module).__name__}'s {name} "
                    f"{tuple(tensor.shape)} counts experts, and the family has no record in moe_ext"
                )
            if counting:
                yield module, name, tensor, counting[0]


def layer_numbers(blocks: Sequence[MoeBlock]) -> list[int]:
    """Decoder layers of the MoE layers, as configs name them; where names do not tell them apart, their own order."""
    found = [_DECODER_LAYER.search(block.name) for block in blocks]
    numbers = [int(match[1]) for match in found if match is not None]
    return numbers if len(set(numbers)) == len(blocks) else list(range(len(blocks)))


def text_config(model: PreTrainedModel) -> Any:
    """The config of a model's text decoder: the model's own, or the part of it that a multimodal model keeps for it."""
    return model.config.get_text_config(decoder=True)


def model_type_of(model: PreTrainedModel) -> str:
    """The model type of a model's text decoder, under which statistics and plans are filed."""
    return str(text_config(model).model_type)


def canonical_field(config: Any, name: str) -> str:
    """The name under which a config stores a field that may have several."""
    return str(config.attribute_map.get(name, name))


def family_of(model: PreTrainedModel) -> Family:
    """The record of a model's family, ``renormalise`` as this model's config has it.

    Raises:
        TypeError: not a transformers model.
        ValueError: its family has no record here, and none can be read off the model; or the config lacks a field.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    config = text_config(model)
    family = FAMILIES.get(config.model_type)
    if family is None:
        return _read_family(model)
    if isinstance(family.renormalise, str):
        family = replace(family, renormalise=bool(_field(config, family.renormalise)))
    return family


def refuse_novices(blocks: list[MoeBlock], job: str) -> None:
    """ValueError, naming the layer, if the model was pruned with means in the place of experts."""
    for block in blocks:
        if block.has_novices:
            raise ValueError(
                f"{block.name} has means in the place of removed experts; {job} the unpruned model instead"
            )


def moe_blocks(model: PreTrainedModel) -> list[MoeBlock]:
    """The MoE layers of a model in layer order.

    Raises:
        TypeError, ValueError: as :func:`family_of`; ValueError too if there are none, or not one in each decoder layer
            of a family that has them there, or if a token has no expert or more than there are.
    """
    family, config = family_of(model), text_config(model)
    groups = _groups(config, family)
    blocks = [
        MoeBlock(name, module, getattr(module, family.router), getattr(module, family.experts), family, *groups)
        for name, module in model.named_modules()
        # By name and with bases: wrappers such as FSDP make a subclass of the block's class.
        if family.block in (cls.__name__ for cls in type(module).__mro__)
    ]
    if not blocks or (family.every_layer and len(blocks) != config.num_hidden_layers):
        raise ValueError(
            f"{type(model).__name__} has {len(blocks)} MoE layers ({family.block}); "
            f"its config says {config.num_hidden_layers if family.every_layer else 'one or more'}"
        )
    for block in blocks:
        if not 1 <= block.top_k <= block.num_routed:
            raise ValueError(f"{block.name}: top_k is {block.top_k}; expected 1 to {block.num_routed} experts a token")
    return blocks


def _groups(config: Any, family: Family) -> tuple[int, int]:
    """Expert groups, and how many of them a token's experts come from."""
    if family.groups_field is None:
        return 1, 1
    if family.groups_when is not None and _field(config, family.groups_when[0]) != family.groups_when[1]:
        return 1, 1
    groups = int(_field(config, family.groups_field) or 1)
    return groups, int(getattr(config, "topk_group", None) or groups)


def device_of(module: nn.Module, weight: Tensor) -> torch.device:
    """Where a module's weight is, or will be once it is loaded: by :mod:`moe_ext.checkpoints.streamed_model`, or for
    the time of a forward pass by one of accelerate's hooks."""
    hook = getattr(module, "_hf_hook", None)
    places = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", [hook])]
    hooked = next((torch.device(place) for place in places if place is not None), weight.device)
    device: torch.device = getattr(weight, LOADED_LATER, hooked if weight.is_meta else weight.device)
    return device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs; accelerate's hooks move them where the first weights will be."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def refuse_offloaded(blocks: list[MoeBlock], job: str) -> None:
    """ValueError, naming the layer, if weights are in memory only while accelerate's hooks run it."""
    for block in blocks:
        for tensor in (*tensors_of(block.experts).values(), *tensors_of(block.router).values()):
            if tensor.is_meta and not hasattr(tensor, LOADED_LATER):
                raise ValueError(f"{block.name} is offloaded by accelerate's hooks; {job} a model that is in memory")


def refuse_shared_out(blocks: Sequence[MoeBlock], job: str) -> None:
    """ValueError, naming the layer, if its experts are shared out among processes: each has some of them only."""
    for block in blocks:
        if getattr(block.experts, "_is_expert_parallel", False):
            raise ValueError(
                f"{block.name}: expert parallelism leaves this process {block.num_experts} of the layer's experts; "
                f"{job} a model that is loaded without it"
            )


def is_experts(module: nn.Module) -> bool:
    """Whether a module's class goes through transformers' experts interface."""
    return "is_concatenated" in vars(module) and hasattr(type(module).forward, "__wrapped__")


def eager_forward(experts: nn.Module) -> Any:
    """The forward that the modeling code wrote, under the interface's wrapper: a function of the module, (T, H) hidden
    states, (T, K) experts and (T, K) weights."""
    return type(experts).forward.__wrapped__  # type: ignore[attr-defined]


def _read_family(model: PreTrainedModel) -> Family:
    """A record for a family without one, from the modules and config of a model."""
    config = text_config(model)
    found: dict[tuple[str, str, str], Family] = {}
    for name, block in model.named_modules():
        for experts_name, experts in block.named_children():
            if not is_experts(experts):
                continue
            routers = [
                key for key, child in block.named_children()
                if child is not experts and hasattr(child, "top_k") and hasattr(child, "num_experts")
            ]  # fmt: skip
            if len(routers) != 1:
                raise ValueError(
                    f"{name}: {type(block).__name__} has {len(routers)} modules with top_k and num_experts; expected "
                    f"one, the router. Model type {config.model_type!r} has no record in moe_ext"
                )
            stored = {canonical_field(config, field) for field in NUM_EXPERTS_FIELDS}
            fields = sorted(field for field in stored if vars(config).get(field) == experts.num_experts)
            grouped = hasattr(config, "n_group")
            kind = (type(block).__name__, routers[0], experts_name)
            found[kind] = Family(
                type(block).__name__,
                fields[0] if fields else None,
                router=routers[0],
                router_parameters=None,
                experts=experts_name,
                score="own",
                renormalise=False,
                selects_by_score=False,
                groups_field="n_group" if grouped else None,
                fewest_per_group=2 if grouped else 1,  # most such routers rank a group by its two best
                every_layer=False,
            )
    if len(found) > 1:
        raise ValueError(f"model type {config.model_type!r} has several kinds of MoE blocks: {sorted(found)}")
    if not found:
        raise ValueError(
            f"model type {config.model_type!r} is not supported: no module of it goes through transformers' experts "
            f"interface; supported: {', '.join(FAMILIES)}, and families that do"
        )
    return next(iter(found.values()))


def _field(config: Any, name: str) -> Any:
    if not hasattr(config, name):
        raise ValueError(f"config of model type {config.model_type!r} has no field {name!r}")
    return getattr(config, name)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The family's own parameters and buffers of a module, by name."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor for name, tensor in named if name not in (PLACES, MEANS)}


def expert_tensors(block: MoeBlock) -> dict[str, Tensor]:
    """The parameters and buffers of a block's experts by name, each with experts along its first dimension.

    Raises:
        ValueError: transformers holds them quantised, or one is not plain, on the meta device, has another number of
            experts, or, where the family has a record, is none of the weights and biases that the interface knows.
    """
    check_not_quantised(block.name, block.experts)
    experts, tensors = block.experts, tensors_of(block.experts)
    if block.family.router_parameters is not None:
        expected = {"gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj"}
        if getattr(experts, "has_bias", False):
            expected |= {f"{name}_bias" for name in expected}
        if set(tensors) != expected:
            raise ValueError(
                f"{block.name}: {type(experts).__name__} has parameters {sorted(tensors)}; "
                f"expected plain {sorted(expected)}"
            )
    for name, tensor in tensors.items():
        check_plain(block.name, experts, name, tensor)
        if tensor.dim() == 0 or tensor.shape[0] != block.num_experts:
            found = tensor.shape[0] if tensor.dim() else "no dimension of"
            raise ValueError(f"{block.name}: {name} has {found} experts; expected {block.num_experts}")
    return tensors


def check_layout(block: MoeBlock) -> None:
    """Checks that a block's router and experts are plain tensors, with experts along known dimensions.

    Raises:
        ValueError: what is different, with the layer's name.
    """
    expert_tensors(block)
    for module, name, tensor, dim in block.routing_tensors():
        check_plain(block.name, module, name, tensor)
        if tensor.dim() <= dim or tensor.shape[dim] != block.num_routed:
            raise ValueError(
                f"{block.name}: the router's {name} has shape {tuple(tensor.shape)}; "
                f"expected {block.num_routed} experts along dimension {dim}"
            )


def check_plain(name: str, owner: nn.Module, key: str, tensor: Tensor) -> None:
    # A parametrized weight shows up under other names, a quantised one or an adapter as further or other types.
    if type(tensor).__name__ == "DTensor":
        raise ValueError(
            f"{name}: {type(owner).__name__}'s {key} is a DTensor, shared out among processes; expected plain tensors. "
            "Under tensor parallelism the operators run without patch, in a model from from_pretrained(..., "
            "tp_plan='auto', experts_implementation='moe_ext')"
        )
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise ValueError(f"{name}: {type(owner).__name__}'s {key} is a {type(tensor).__name__}; expected plain tensors")
    if device_of(owner, tensor).type == "meta":
        raise ValueError(f"{name}: {key} is on the meta device; load the model's weights into memory")


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def decoder_layers(model: PreTrainedModel, blocks: Sequence[MoeBlock]) -> tuple[str, list[nn.Module], list[int]]:
    """The name of the list of decoder layers, the layers, and which of them every MoE layer is in.

    Raises:
        ValueError: there is no such list.
    """
    modules = dict(model.named_modules())
    parts = blocks[0].name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:depth])
        if isinstance(modules[owner], nn.ModuleList):
            of_block = [int(block.name.removeprefix(owner + ".").split(".")[0]) for block in blocks]
            return owner, list(modules[owner].children()), of_block
    raise ValueError(f"{blocks[0].name} is in no list of decoder layers")
