"""What differs between model families: where the MoE blocks are, how they route, which config fields count experts.

One small record per ``model_type`` of the text model. A family without a record is recognised by transformers' experts
interface (:func:`transformers.integrations.use_experts_implementation`): its record is then read off the model, and
what cannot be read off it is left to the family's own code. Everything else in the package works on the
:class:`MoeBlock` list that :func:`moe_blocks` returns, in layer order.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

# transformers' names (config.hidden_act) of the activations that the operators compute.
ACTIVATION_OF_HIDDEN_ACT = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Names under which the families' configs count experts; the generic path looks for them.
NUM_EXPERTS_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# Buffers that moe_ext.novices puts into experts modules.
PLACES, MEANS = "moe_ext_places", "moe_ext_means"

# Attribute of a weight on the meta device that moe_ext.skeleton loads before it is used: the device that it will be on.
LOADED_LATER = "_moe_ext_loaded_later"

_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Family:
    """How one model family names and computes the parts of its MoE layers.

    Attributes:
        block: class name of the MoE block. Shared experts live in it beside the routed ones and are never touched.
        num_experts_field: config field that holds the number of experts; None if no field of a known name does.
        router: attribute of the block that holds the router (returns logits, weights (T, K), experts (T, K)).
        router_parameters: per-expert parameters and buffers of the router, with the dimension that counts experts; a
            correction bias is one of them. None: every tensor of the router, told by its shape.
        experts: attribute of the block that holds the experts.
        score: what a softmax or sigmoid router computes from the logits; "own": something else.
        renormalise: whether the selected scores are scaled to sum to 1; a name is the config field that says so.
        selects_by_score: whether the K largest scores are selected, in that order. With a softmax score this is what
            the ``route`` operator computes; False for groups and correction biases.
        groups_field: config field of the number of expert groups, contiguous and of equal size. A token's experts come
            from ``config.topk_group`` of them.
        groups_when: config field and the value with which groups are used; None: always.
        fewest_per_group: experts that a group needs at least, whatever K is.
        every_layer: whether every decoder layer has experts.
    """

    block: str
    num_experts_field: str | None
    router: str = "gate"
    router_parameters: Mapping[str, int] | None = field(default_factory=lambda: {"weight": 0})
    experts: str = "experts"
    score: Literal["softmax", "sigmoid", "own"] = "softmax"
    renormalise: bool | str = True
    selects_by_score: bool = True
    groups_field: str | None = None
    groups_when: tuple[str, str] | None = None
    fewest_per_group: int = 1
    every_layer: bool = True

    @property
    def fused(self) -> bool:
        """Whether the ``route`` operator computes this family's routing."""
        return self.score == "softmax" and self.selects_by_score

    @property
    def gate(self) -> str:
        """What the routing weight g_e is, as written into statistics files."""
        if self.fused:
            return f"softmax over {'the selected' if self.renormalise else 'all'} logits"
        if self.score == "own":
            return "weights as the family's router gives them"
        return f"{self.score} scores{', renormalised' if self.renormalise else ''}, as the family's router gives them"


_CORRECTED = {"weight": 0, "e_score_correction_bias": 0}

FAMILIES = {
    "mixtral": Family("MixtralSparseMoeBlock", "num_local_experts"),
    "qwen2_moe": Family("Qwen2MoeSparseMoeBlock", "num_experts", renormalise="norm_topk_prob", every_layer=False),
    "qwen3_moe": Family("Qwen3MoeSparseMoeBlock", "num_experts", renormalise="norm_topk_prob", every_layer=False),
    "qwen3_vl_moe_text": Family("Qwen3VLMoeTextSparseMoeBlock", "num_experts", every_layer=False),
    "olmoe": Family("OlmoeSparseMoeBlock", "num_experts", renormalise="norm_topk_prob"),
    "deepseek_v2": Family(
        "DeepseekV2Moe",
        "n_routed_experts",
        renormalise=False,
        selects_by_score=False,
        groups_field="n_group",
        groups_when=("topk_method", "group_limited_greedy"),
        every_layer=False,
    ),
    "deepseek_v3": Family(
        "DeepseekV3MoE",
        "n_routed_experts",
        router_parameters=_CORRECTED,
        score="sigmoid",
        renormalise="norm_topk_prob",
        selects_by_score=False,
        groups_field="n_group",
        fewest_per_group=2,  # a group is ranked by its two best
        every_layer=False,
    ),
    "glm4_moe": Family(
        "Glm4MoeMoE",
        "n_routed_experts",
        router_parameters=_CORRECTED,
        score="sigmoid",
        renormalise="norm_topk_prob",
        selects_by_score=False,
        groups_field="n_group",
        fewest_per_group=2,  # a group is ranked by its two best
        every_layer=False,
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeSparseMoeBlock",
        "moe_num_experts",
        router_parameters={"weight": 0, "moe_statics.e_score_correction_bias": 1},
        selects_by_score=False,
        every_layer=False,
    ),
    "phimoe": Family(
        "PhimoeSparseMoeBlock",
        "num_local_experts",
        router="router",
        score="own",  # sparsemixer
        renormalise=False,
        selects_by_score=False,
    ),
    "granitemoe": Family("GraniteMoeMoE", "num_local_experts", router="router"),
    "minimax": Family("MiniMaxSparseMoeBlock", "num_local_experts"),
    "jamba": Family(
        "JambaSparseMoeBlock",
        "num_experts",
        router="router",
        renormalise=False,
        fewest_per_group=2,  # stock Jamba builds a plain MLP for one expert
        every_layer=False,
    ),
    "gpt_oss": Family("GptOssMLP", "num_local_experts", router="router", router_parameters={"weight": 0, "bias": 0}),
}


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
        """Whether the means of removed experts take their places (:mod:`moe_ext.novices`)."""
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
        router, dimensions = _tensors(self.router), self.family.router_parameters
        if dimensions is None:
            own = {name: tensor for name, tensor in _tensors(self.module).items() if "." not in name}
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
            of a family that has them there.
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
    """Where a module's weight is, or will be once it is loaded: by :mod:`moe_ext.layers_on_disk`, or for the time of a
    forward pass by one of accelerate's hooks."""
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
        for tensor in (*_tensors(block.experts).values(), *_tensors(block.router).values()):
            if tensor.is_meta and not hasattr(tensor, LOADED_LATER):
                raise ValueError(f"{block.name} is offloaded by accelerate's hooks; {job} a model that is in memory")


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


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The family's own parameters and buffers of a module, by name."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor for name, tensor in named if name not in (PLACES, MEANS)}


def expert_tensors(block: MoeBlock) -> dict[str, Tensor]:
    """The parameters and buffers of a block's experts by name, each with experts along its first dimension.

    Raises:
        ValueError: one is not plain, on the meta device, has another number of experts, or, where the family has a
            record, is none of the weights and biases that the experts interface knows.
    """
    experts, tensors = block.experts, _tensors(block.experts)
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
        _check_plain(block.name, experts, name, tensor)
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
        _check_plain(block.name, module, name, tensor)
        if tensor.dim() <= dim or tensor.shape[dim] != block.num_routed:
            raise ValueError(
                f"{block.name}: the router's {name} has shape {tuple(tensor.shape)}; "
                f"expected {block.num_routed} experts along dimension {dim}"
            )


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
    tensors = _tensors(experts)
    if set(tensors) != {"gate_up_proj", "down_proj"}:
        raise ValueError(
            f"{name}: {type(experts).__name__} has parameters {sorted(tensors)}; "
            "expected plain ['down_proj', 'gate_up_proj']"
        )
    for key, tensor in tensors.items():
        _check_plain(name, experts, key, tensor)


def _check_plain(name: str, owner: nn.Module, key: str, tensor: Tensor) -> None:
    # A parametrized weight shows up under other names, a quantised one or an adapter as further or other types.
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise ValueError(f"{name}: {type(owner).__name__}'s {key} is a {type(tensor).__name__}; expected plain tensors")
    if device_of(owner, tensor).type == "meta":
        raise ValueError(f"{name}: {key} is on the meta device; load the model's weights into memory")


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
