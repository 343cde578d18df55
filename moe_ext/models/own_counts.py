"""Layers with numbers of experts of their own in families whose configs or classes know one number for all: such a
model is built with the largest, then every layer is left with its own.

Built that way are configs whose ``moe_ext`` section has the numbers (``COUNTS_KEY``); those that have them in
transformers' ``per_layer_config`` are left to the family's classes (:mod:`moe_ext.models.uneven_layers`).
"""

import copy
import dis
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_ext.models.blocks import (
    MoeBlock,
    PerExpert,
    counted_of,
    counting_attributes,
    experts_by_name,
    moe_blocks,
    tensors_of,
    text_config,
)
from moe_ext.models.config_section import COUNTS_KEY, counts_in_section, section_of
from moe_ext.models.counted import Dimension
from moe_ext.models.replace import replace_tensor
from moe_ext.models.uneven_layers import built_by_class


def built(config: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` builds from a config, also where layers differ or have means in the place of experts.

    For such a config transformers' classes are changed while ``make`` runs: build one model at a time.

    Raises:
        ValueError: such a config of a family whose decoder layers cannot be told, or a wrong ``config.moe_ext``.
    """
    if not counts_in_section(section_of(config), config.get_text_config(decoder=True).num_hidden_layers):
        return built_by_class(config, make)
    with _counts_taken_when_built():
        return built_by_class(config, make)


@contextmanager
def _counts_taken_when_built() -> Iterator[None]:
    """Models that are built inside the ``with`` block take their sections' numbers before they are initialised, and
    before from_pretrained looks for their weights."""
    original = PreTrainedModel.post_init

    @wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        _take_counts(self)
        original(self)

    PreTrainedModel.post_init = post_init
    try:
        yield
    finally:
        PreTrainedModel.post_init = original


def _take_counts(model: PreTrainedModel) -> None:
    """Leaves the layers of a model that was just built the first of their experts, as many as the section says; of a
    model without a section, or a part that has no experts, nothing is changed."""
    section = section_of(model.config)
    if not isinstance(section, dict) or COUNTS_KEY not in section or not experts_by_name(model):
        return
    by_layer, blocks = counts_in_section(section, text_config(model).num_hidden_layers), moe_blocks(model)
    for block in blocks:
        if not block.top_k <= by_layer.get(block.layer, 0) <= block.num_experts:
            raise ValueError(
                f"config.moe_ext.{COUNTS_KEY} says {by_layer.get(block.layer, 0)} experts for layer {block.layer}; "
                f"expected {block.top_k} to {block.num_experts}"
            )
    counts = [by_layer[block.layer] for block in blocks]
    if counts == [block.num_experts for block in blocks]:  # a part of it was built, and has taken them
        return
    attributes, parts = counting_attributes(model, counts), [_parts(block) for block in blocks]
    for block, count, of_block in zip(blocks, counts, parts, strict=True):
        had = block.num_experts
        for part in of_block:
            replace_tensor(part.module, part.name, part.tensor, part.kept(range(count), had).detach())
    for module, name, value in attributes:
        setattr(module, name, value)
    configs_of_their_own(blocks, counts, counted_of(model).fields)


def _parts(block: MoeBlock) -> list[PerExpert]:
    """All tensors of a block that count its experts; they may be on the meta device."""
    own = [PerExpert(block.experts, name, tensor, Dimension(0)) for name, tensor in tensors_of(block.experts).items()
           if "." not in name]  # fmt: skip
    return block.routing_tensors() + own


def configs_of_their_own(blocks: Sequence[MoeBlock], counts: Sequence[int], fields: Sequence[str]) -> None:
    """Gives the modules of layers whose code reads a number of experts from their config one that has the layer's.

    Args:
        fields: of the config, as it stores them.
    """
    for block, count in zip(blocks, counts, strict=True):
        for module in readers(block, fields):
            module.config = copy.copy(module.config)
            for name in fields:
                setattr(module.config, name, count)


def readers(block: MoeBlock, fields: Sequence[str]) -> list[Any]:
    """The modules of a block whose forward reads one of those fields from the config."""
    aliases: Mapping[str, str] = text_config(block.model).attribute_map
    names = {*fields, *(alias for alias, field in aliases.items() if field in fields)}
    return [module for module in block.module.modules() if _reads(module, names)]


def _reads(module: nn.Module, names: set[str]) -> bool:
    forward = inspect.unwrap(type(module).forward)
    read = [(each.opname, each.argval) for each in dis.get_instructions(forward)]
    return any(one == ("LOAD_ATTR", "config") and two[1] in names for one, two in pairwise(read))
