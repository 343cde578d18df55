"""What in a model depends on the number of experts, found by building it twice on the meta device, with as many experts
and with twice as many: config fields, a dimension of every tensor, attributes of modules. Nothing goes by its name.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe_ext.models.boundary import num_routed
from moe_ext.models.config_section import COUNTS_KEY, section_of, section_with_counts, set_section
from moe_ext.models.uneven_layers import built_by_class

# Names under which families' configs count experts. Others are found, too; these are changed together where they hold
# the same number.
NUM_EXPERTS_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

CountsPlace = Literal["per_layer_config", "moe_ext"]
"""Where a config says that layers have different numbers of experts: transformers' own place, or our section."""


@dataclass(frozen=True)
class Dimension:
    """The dimension of a tensor that counts experts: ``per_expert`` places for each, one after the other, then
    ``others`` that are no routed expert's (shared experts, a choice to skip).

    Attributes:
        index: which dimension it is.
    """

    index: int
    per_expert: int = 1
    others: int = 0

    def size(self, experts: int) -> int:
        return experts * self.per_expert + self.others

    def places(self, keep: Sequence[int], experts: int) -> list[int]:
        """Where the tensor holds what belongs to the experts ``keep`` of ``experts``, and what belongs to none."""
        of_experts = [expert * self.per_expert + place for expert in keep for place in range(self.per_expert)]
        return of_experts + [experts * self.per_expert + place for place in range(self.others)]


@dataclass(frozen=True)
class Counted:
    """What depends on a model's number of experts.

    Attributes:
        fields: the text config's fields that hold it, as the config stores them; in a config within it, after that
            one's name and a dot.
        tensors: of parameters and buffers, by name.
        attributes: integers by module and attribute: the value that the config gives, and what an expert more adds.
    """

    fields: tuple[str, ...]
    tensors: Mapping[str, Dimension]
    attributes: Mapping[tuple[str, str], tuple[int, Fraction]]


def counted_in(model: PreTrainedModel, experts: Mapping[str, int]) -> Counted:
    """What depends on the number of a model's experts.

    Args:
        experts: E of every experts module, by its name.

    Raises:
        ValueError: no field of the config is found that holds the number, or something depends on it in another way
            than experts that lie one after the other.
    """
    said = json.dumps(_of_shapes(model.config.to_dict()), sort_keys=True, default=str)
    key = (type(model), said, tuple(experts.items()))
    if key not in _measured:
        _measured[key] = _measure(model, experts)
        while len(_measured) > 16:
            _measured.popitem(last=False)
    _measured.move_to_end(key)
    return _measured[key]


_measured: OrderedDict[Any, Counted] = OrderedDict()

_NOT_OF_SHAPES = {"_name_or_path", "architectures", "dtype", "transformers_version"}


def _of_shapes(content: Any) -> Any:
    """What a config's content says of shapes and numbers."""
    if not isinstance(content, dict):
        return content
    return {name: _of_shapes(value) for name, value in content.items() if name not in _NOT_OF_SHAPES}


def _measure(model: PreTrainedModel, experts: Mapping[str, int]) -> Counted:
    config = model.config.get_text_config(decoder=True)
    most, before = max(experts.values()), _built(model, (), most=0)
    # Numbers in our section are not the classes' affair: they build every layer with the largest.
    by_classes = dict.fromkeys(experts, most) if _in_section(config) else experts
    for fields in _candidates(config, most):
        after = _built(model, fields, most)
        modules = dict(after.named_modules())
        if all(num_routed(modules[name]) == 2 * count for name, count in by_classes.items()):
            attributes = _attributes(before, after, by_classes)
            for (name, attribute), (value, each) in attributes.items():
                fewer = most - max(experts[owner] for owner in owners(name, experts)) if _in_section(config) else 0
                attributes[name, attribute] = int(value - each * fewer), each
            return Counted(fields, _tensors(before, after, by_classes), attributes)
    raise ValueError(
        f"{next(iter(experts))}: no field of the {config.model_type!r} config is found to hold its {most} experts; "
        "the pruned model could not be saved"
    )


def _candidates(config: Any, most: int) -> list[tuple[str, ...]]:
    """Fields that may count experts together: all of a known name, of the config or else of those within it, then any
    other that holds the number."""
    inside = [(f"{name}.", part) for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)]
    together, others = [], []
    for prefix, part in (("", config), *inside):
        holding = sorted(name for name, value in vars(part).items() if type(value) is int and value == most)
        known = {str(part.attribute_map.get(name, name)) for name in NUM_EXPERTS_FIELDS}
        if named := tuple(prefix + name for name in holding if name in known):
            together.append(named)
        others += [(prefix + name,) for name in holding if name not in known]
    return together + others


def _set_field(config: Any, name: str, value: int) -> None:
    *path, name = name.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, name, value)


def with_counts(
    config: Any, fields: Sequence[str], counts: Mapping[int, int], place: CountsPlace = "per_layer_config"
) -> None:
    """Writes numbers of experts into a text config: one if all layers' are equal, else the largest, and per layer those
    that differ. What else the config says of single layers stays.

    Args:
        counts: by decoder layer.
        place: where they go if they differ.
    """
    overrides = {int(layer): dict(own) for layer, own in (config.to_dict().get("per_layer_config") or {}).items()}
    had, largest = bool(overrides), max(counts.values())
    for layer, own in overrides.items():
        overrides[layer] = {name: value for name, value in own.items() if name not in fields}
    differ = any(count != largest for count in counts.values())
    if differ and place == "per_layer_config":
        for layer, count in counts.items():
            overrides.setdefault(layer, {}).update(dict.fromkeys(fields, count))
    for name in fields:
        _set_field(config, name, largest)
    if had or overrides:
        config.per_layer_config = overrides
    in_section = counts if differ and place == "moe_ext" else {}
    if in_section or _in_section(config):
        set_section(config, section_with_counts(in_section, section_of(config)))


def counts_differ(config: Any) -> bool:
    """Whether a text config says that its layers have different numbers of experts: it may differ in other things."""
    known = {str(config.attribute_map.get(name, name)) for name in NUM_EXPERTS_FIELDS} | set(NUM_EXPERTS_FIELDS)
    layers = (config.to_dict().get("per_layer_config") or {}).values()
    return any(known & own.keys() for own in layers) or _in_section(config)


def _in_section(config: Any) -> bool:
    section = section_of(config)
    return isinstance(section, dict) and COUNTS_KEY in section


def _built(model: PreTrainedModel, fields: Sequence[str], most: int) -> PreTrainedModel:
    """The model on the meta device as its family's classes build it, its config's numbers of experts doubled."""
    changed = copy.deepcopy(model.config)
    config = changed.get_text_config(decoder=True)
    if _in_section(config):
        set_section(changed, section_with_counts({}, section_of(config)))
    if fields:
        overrides = {int(layer): dict(own) for layer, own in (config.to_dict().get("per_layer_config") or {}).items()}
        for own in overrides.values():
            own.update({name: 2 * own[name] for name in fields if name in own})
        for name in fields:
            _set_field(config, name, 2 * most)
        if overrides:
            config.per_layer_config = overrides
    with torch.device("meta"):
        other: PreTrainedModel = built_by_class(changed, partial(type(model)._from_config, changed, dtype=model.dtype))
    return other


def _tensors(before: PreTrainedModel, after: PreTrainedModel, experts: Mapping[str, int]) -> dict[str, Dimension]:
    found, doubled = {}, named_tensors(after)
    for name, tensor in named_tensors(before).items():
        other = doubled.get(name)
        if other is None or other.dim() != tensor.dim():
            raise ValueError(f"{name} is another tensor with another number of experts: the family is not supported")
        sizes = zip(tensor.shape, other.shape, strict=True)
        differ = [(index, old, new) for index, (old, new) in enumerate(sizes) if old != new]
        if not differ:
            continue
        count = max(experts[owner] for owner in owners(name, experts))
        (index, old, new), *more = differ
        per_expert = (new - old) // count
        if more or per_expert < 1 or old + per_expert * count != new or old < per_expert * count:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} with {count} experts and {tuple(other.shape)} with "
                f"{2 * count}: how it counts experts is not known"
            )
        found[name] = Dimension(index, per_expert, old - per_expert * count)
    return found


def owners(name: str, experts: Iterable[str]) -> list[str]:
    """The experts modules whose names have most parts in common with that of a tensor or module: those of its block,
    its decoder layer or, of what is in none, the whole model."""

    def common(other: str) -> int:
        pairs = zip(name.split("."), other.split("."), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    depths = {other: common(other) for other in experts}
    return [other for other, depth in depths.items() if depth == max(depths.values())]


def _attributes(
    before: PreTrainedModel, after: PreTrainedModel, experts: Mapping[str, int]
) -> dict[tuple[str, str], tuple[int, Fraction]]:
    found, modules = {}, dict(after.named_modules())
    for name, module in before.named_modules():
        other = vars(modules[name])
        for attribute, value in vars(module).items():
            if type(value) is int and type(other.get(attribute)) is int and other[attribute] != value:
                count = max(experts[owner] for owner in owners(name, experts))
                found[name, attribute] = value, Fraction(other[attribute] - value, count)
    return found


def named_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under each of theirs."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
