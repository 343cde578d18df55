"""The MoE layers of a live model, as everything else in the package sees them: the :class:`MoeBlock` list of
:func:`moe_blocks`, in layer order.

Any family is recognised by transformers' experts interface
(:func:`transformers.integrations.use_experts_implementation`). How its router chooses is found by numbers
(:mod:`moe_ext.models.router_formula`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.models.boundary import MEANS, PLACES, boundaries, is_experts, num_experts, num_routed, placed_experts
from moe_ext.models.counted import Counted, Dimension, counted_in, named_tensors, owners
from moe_ext.models.direct_experts import direct_experts, passed_on
from moe_ext.models.families import FAMILIES, Family
from moe_ext.models.only_pruned import is_only_pruned
from moe_ext.models.packed_experts import tensor_names
from moe_ext.models.quantised_experts import check_not_quantised
from moe_ext.models.shared_out import has_some_experts, how_shared, is_shared
from moe_ext.models.unsupported import why_unsupported
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


# Attribute of a weight on the meta device that is loaded before it is used (checkpoints/meta_model): its device then.
LOADED_LATER = "_moe_ext_loaded_later"

BY_STATISTICS = "prune this family by statistics (calibrate, score, plan)"
"""What to do where a model's layers stand against a search."""

_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


class PerExpert(NamedTuple):
    """A tensor that counts experts: the module it is in, its name there, itself, and its dimension of experts."""

    module: nn.Module
    name: str
    tensor: Tensor
    dimension: Dimension

    def of_expert(self, expert: int) -> Tensor:
        """A view of what of it is one expert's."""
        rows = self.dimension.per_expert
        return self.tensor.narrow(self.dimension.index, expert * rows, rows)

    def kept(self, keep: Sequence[int], experts: int) -> Tensor:
        """A copy of what of it belongs to the experts ``keep`` of ``experts``, and of what belongs to none."""
        places = torch.tensor(self.dimension.places(keep, experts), device=self.tensor.device)
        return self.tensor.index_select(self.dimension.index, places)


class CountingAttribute(NamedTuple):
    """An integer that depends on the number of experts."""

    module: nn.Module
    name: str
    value: int


@dataclass(frozen=True)
class MoeBlock:
    """One MoE layer of a live model.

    Attributes:
        name: the block's module name, such as ``model.layers.0.mlp``.
        module: the block, which holds the next two.
        router: the module that chooses experts.
        experts: the module that holds the experts' weights.
        family: the family's record.
        groups: expert groups; 1 if the family has none.
        groups_per_token: groups that a token's experts come from.
        top_k: K, experts per token.
        model: the model that the block is of.
    """

    name: str
    module: nn.Module
    router: nn.Module
    experts: nn.Module
    family: Family
    groups: int
    groups_per_token: int
    top_k: int
    model: PreTrainedModel = field(repr=False)

    @property
    def num_experts(self) -> int:
        return num_experts(self.experts)

    @property
    def has_novices(self) -> bool:
        """Whether the means of removed experts take their places (:mod:`moe_ext.models.novices`)."""
        return MEANS in self.experts._buffers

    @property
    def num_routed(self) -> int:
        """Experts that the router chooses from: with novices, more than there are."""
        return num_routed(self.experts)

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

    def routing_tensors(self) -> list[PerExpert]:
        """Tensors outside the experts that count them: the router's rows, correction biases, scales.

        Raises:
            ValueError: as :func:`moe_ext.models.counted.counted_in`, or a tensor has another shape than a model of this
                config.
        """
        return self._measured(inside=False)

    def expert_parts(self) -> list[PerExpert]:
        """The tensors of the experts.

        Raises:
            ValueError: as :func:`expert_tensors`; of experts that are only pruned as :meth:`routing_tensors`, or one is
                not plain or has another number of experts.
        """
        if not is_only_pruned(self.experts):
            return [
                PerExpert(self.experts, name, tensor, expert_dimension(self, name))
                for name, tensor in expert_tensors(self).items()
            ]
        parts = self._measured(inside=True)
        for part in parts:
            _check_counts(self.name, "experts'", part, self.num_experts)
        return parts

    def _measured(self, *, inside: bool) -> list[PerExpert]:
        """The tensors that count this layer's experts, inside the experts module or outside."""
        counted, experts = counted_of(self.model), experts_by_name(self.model)
        own = next(name for name, module in experts.items() if module is self.experts)
        tensors = named_tensors(self.model)
        found = []
        for name, dimension in counted.tensors.items():
            if name.startswith(f"{own}.") != inside or own not in (near := owners(name, experts)):
                continue
            if len(near) > 1:
                raise ValueError(f"{name} counts the experts of {near}; expected tensors of one layer's experts")
            path, _, key = name.rpartition(".")
            module = self.model.get_submodule(path)
            if name not in tensors:  # it is parametrised, or has an adapter
                raise ValueError(
                    f"{self.name}: {type(module).__name__} has no plain {key!r}, only "
                    f"{sorted(name for name, _ in (*module.named_parameters(), *module.named_buffers()))}"
                )
            found.append(PerExpert(module, key, tensors[name], dimension))
        return found


def experts_by_name(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The experts modules of a model's MoE layers, by their names."""
    return {f"{name}.{key}" if name else key: experts for name, _, key, experts in placed_experts(model)}


def counted_of(model: PreTrainedModel) -> Counted:
    """What depends on the number of a model's experts; ValueError as :func:`moe_ext.models.counted.counted_in`."""
    return counted_in(model, {name: num_routed(experts) for name, experts in experts_by_name(model).items()})


def counting_attributes(model: PreTrainedModel, counts: Sequence[int]) -> list[CountingAttribute]:
    """The integers of a model's modules that depend on the numbers of experts, with what they are to be.

    Args:
        counts: E of every MoE layer by then, in layer order.

    Raises:
        ValueError: one would be no integer.
    """
    counted, experts = counted_of(model), experts_by_name(model)
    had = {name: num_routed(module) for name, module in experts.items()}
    will = dict(zip(experts, counts, strict=True))
    found = []
    for (path, name), (built, each) in counted.attributes.items():
        near = owners(path, experts)
        value = built + each * (max(will[one] for one in near) - max(had[one] for one in near))
        if value.denominator != 1:
            raise ValueError(
                f"{path}: {name} is {built} with {max(had.values())} experts; with {max(counts)} it would be {value}"
            )
        module = model.get_submodule(path)
        if vars(module).get(name) == built:  # not one that somebody has set
            found.append(CountingAttribute(module, name, int(value)))
    return found


def layer_numbers(blocks: Sequence[MoeBlock]) -> list[int]:
    """Decoder layers of the MoE layers, as configs name them; where names do not tell them apart, their own order."""
    found = [_DECODER_LAYER.search(block.name) for block in blocks]
    numbers = [int(match[1]) for match in found if match is not None]
    return numbers if len(set(numbers)) == len(blocks) else list(range(len(blocks)))


def text_config(model: PreTrainedModel) -> Any:
    """The config of a model's text decoder: the model's own, or the part of it that a multimodal model keeps for it."""
    return model.config.get_text_config(decoder=True)


def base_of(model: Any) -> Any:
    """What of a model runs where its language model head is not needed: transformers' ``base_model``. Where that is the
    whole model, as some families' prefixes have it (Llama 4), the innermost model inside that has its experts."""
    base = model.base_model
    if base is not model or model.get_output_embeddings() is None:
        return base
    inside = [
        (len(name), part)
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel) and any(map(is_experts, part.modules()))
    ]
    return max(inside, key=lambda pair: pair[0], default=(0, base))[1]


def model_type_of(model: PreTrainedModel) -> str:
    """The model type of a model's text decoder, under which statistics and plans are filed."""
    return str(text_config(model).model_type)


def family_of(model: PreTrainedModel) -> Family:
    """The record of a model's family.

    Raises:
        TypeError: not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    config = text_config(model)
    family = FAMILIES.get(config.model_type)
    if family is None:
        # Most routers with groups rank a group by its two best.
        grouped = hasattr(config, "n_group")
        return Family("n_group" if grouped else None, fewest_per_group=2 if grouped else 1)
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
        TypeError, ValueError: as :func:`family_of`; ValueError too if there are none, or none that are more than
            pruned, if a layer's router cannot be told, or if a token has no expert or more than there are.
    """
    blocks = prunable_blocks(model)
    if any(is_only_pruned(block.experts) for block in blocks):
        raise ValueError(why_unsupported(model))
    return blocks


def prunable_blocks(model: PreTrainedModel) -> list[MoeBlock]:
    """The MoE layers that whole experts can be removed from: those of :func:`moe_blocks`, or those of a model that is
    only pruned (:mod:`moe_ext.models.only_pruned`).

    Raises:
        TypeError, ValueError: as :func:`moe_blocks`, but for layers that are only pruned.
    """
    family, config = family_of(model), text_config(model)
    groups, of_token = _groups(config, family)
    blocks = [
        MoeBlock(
            each.name,
            each.module,
            getattr(each.module, each.router),
            getattr(each.module, each.experts),
            family,
            groups,
            of_token,
            each.top_k,
            model,
        )
        for each in boundaries(model)
    ]
    if not blocks:
        raise ValueError(why_unsupported(model))
    for block in blocks:
        record = direct_experts(block.experts)
        if record is not None and record.weighs_inputs and block.top_k > 1:
            raise ValueError(
                f"{block.name}: top_k is {block.top_k}; a {type(block.experts).__name__} is given a token times its "
                "weight, another input for every expert, which is supported for one expert a token"
            )
        if not 1 <= block.top_k <= block.num_routed:
            raise ValueError(f"{block.name}: top_k is {block.top_k}; expected 1 to {block.num_routed} experts a token")
    return blocks


def refuse_shared_weights(blocks: Sequence[MoeBlock]) -> None:
    """ValueError if two layers have the same experts: what is counted or removed in one holds for the other."""
    owner: dict[int, str] = {}
    for block in blocks:
        for tensor in block.experts.parameters():
            if owner.setdefault(id(tensor), block.name) != block.name:
                raise ValueError(
                    f"{owner[id(tensor)]} and {block.name} share their experts (tied weights): what is counted, "
                    "skipped or removed in one would hold for the other, which runs on other tokens. "
                    "moe_ext.patch(model) runs such a model on the operators; it is not calibrated, searched or pruned"
                )


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


def refuse_other_sums(blocks: Sequence[MoeBlock], job: str) -> None:
    """ValueError, naming the layer, if what its experts give is not the sum of their outputs for the hidden states,
    times the router's weights."""
    for block in blocks:
        record, kind = direct_experts(block.experts), type(block.experts).__name__
        if passed_on(block.experts):
            raise ValueError(
                f"{job}: {block.name}: the router of {kind} also chooses to pass a token on, which adds the token "
                f"itself to its experts' outputs: {BY_STATISTICS}"
            )
        if record is not None and record.weighs_inputs:
            raise ValueError(
                f"{job}: {block.name}: {kind} are given the hidden states times the router's weights, so that no "
                f"weighted sum of outputs says what other experts would give: {BY_STATISTICS}"
            )


def refuse_shared_out(blocks: Sequence[MoeBlock], job: str) -> None:
    """ValueError, naming the layer, if its experts are shared out among processes: each has a part of them only."""
    for block in blocks:
        if (how := how_shared(block.experts)) is not None:
            part = f"{block.num_experts}" if has_some_experts(block.experts) else "a part of each"
            raise ValueError(
                f"{block.name}: {how} leaves this process {part} of the layer's experts; {job} a model that is loaded "
                "without it, or the checkpoint's folder layer by layer"
            )


def _field(config: Any, name: str) -> Any:
    if not hasattr(config, name):
        raise ValueError(f"config of model type {config.model_type!r} has no field {name!r}")
    return getattr(config, name)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The family's own parameters and buffers of a module, by name."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor for name, tensor in named if name not in (PLACES, MEANS)}


def expert_tensors(block: MoeBlock) -> dict[str, Tensor]:
    """The weights and biases of a block's experts by name, each with experts along its first dimension; of quantised
    ones the packed weights, scales and zeros. What modules inside the experts module hold is shared by all experts,
    such as a norm.

    Raises:
        ValueError: transformers holds them quantised, or one is not plain, on the meta device, has another number of
            experts, or is none of those that the experts interface knows.
    """
    check_not_quantised(block.name, block.experts)
    experts = block.experts
    named = (*experts.named_parameters(recurse=False), *experts.named_buffers(recurse=False))
    tensors = {name: tensor for name, tensor in named if name not in (PLACES, MEANS)}
    expected = tensor_names(experts)
    if set(tensors) != expected:
        raise ValueError(
            f"{block.name}: {type(experts).__name__} has parameters {sorted(tensors_of(experts))}; "
            f"expected plain {sorted(expected)}"
        )
    for name, tensor in tensors.items():
        check_plain(block.name, experts, name, tensor)
        size = expert_dimension(block, name).size(block.num_experts)
        if tensor.dim() == 0 or tensor.shape[0] != size:
            found = tensor.shape[0] if tensor.dim() else "no dimension of"
            raise ValueError(f"{block.name}: {name} has {found} experts; expected {size}")
    return tensors


def expert_dimension(block: MoeBlock, name: str) -> Dimension:
    """The dimension of one of :func:`expert_tensors` that counts experts. Some have rows, never read, for choices that
    return a token as it is."""
    return Dimension(0, others=0 if name == "down_proj" else passed_on(block.experts))


def check_layout(block: MoeBlock) -> None:
    """Checks that a block's router and experts are plain tensors, with experts along known dimensions.

    Raises:
        ValueError: what is different, with the layer's name.
    """
    block.expert_parts()
    for part in block.routing_tensors():
        _check_counts(block.name, "router's", part, block.num_routed)


def _check_counts(name: str, of: str, part: PerExpert, experts: int) -> None:
    """ValueError, beginning with ``name``, unless a tensor is plain and has so many experts."""
    check_plain(name, part.module, part.name, part.tensor)
    shape, index = tuple(part.tensor.shape), part.dimension.index
    if len(shape) <= index or shape[index] != part.dimension.size(experts):
        raise ValueError(
            f"{name}: the {of} {part.name} has shape {shape}; expected {experts} experts along dimension {index}"
        )


def check_plain(name: str, owner: nn.Module, key: str, tensor: Tensor) -> None:
    # A parametrized weight shows up under other names, a quantised one or an adapter as further or other types.
    if is_shared(tensor):
        raise ValueError(
            f"{name}: {type(owner).__name__}'s {key} is a DTensor, shared out among processes; expected plain tensors. "
            "patch, skip thresholds and count_skips take such a model, other jobs the checkpoint's folder"
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


def refuse_several_in_a_layer(blocks: Sequence[MoeBlock], of_block: Sequence[int], job: str) -> None:
    """ValueError if a decoder layer has several MoE blocks, such as one for text and one for images: each is given some
    of a batch's tokens, and which of them are padding is not known.

    Args:
        of_block: from :func:`decoder_layers`.
    """
    for first, second in zip(range(len(blocks)), range(1, len(blocks)), strict=False):
        if of_block[first] == of_block[second]:
            raise ValueError(
                f"{job}: {blocks[first].name} and {blocks[second].name} are in one decoder layer; expected one a "
                f"layer: {BY_STATISTICS}"
            )


def decoder_layers(model: PreTrainedModel, blocks: Sequence[MoeBlock]) -> tuple[str, list[nn.Module], list[int]]:
    """The name of the list of decoder layers, the layers, and which of them every MoE layer is in.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    modules = dict(model.named_modules())
    parts = blocks[0].name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:depth])
        if isinstance(modules[owner], nn.ModuleList):
            for block in blocks:
                if not block.name.startswith(f"{owner}."):
                    raise ValueError(
                        f"{blocks[0].name} and {block.name} are in two lists of decoder layers; expected one"
                    )
            of_block = [int(block.name.removeprefix(owner + ".").split(".")[0]) for block in blocks]
            return owner, list(modules[owner].children()), of_block
    raise ValueError(f"{blocks[0].name} is in no list of decoder layers")
