"""Whether a family's layers can have different numbers of experts: tried on its config and its classes, on the meta
device, before a model is touched.
"""

from __future__ import annotations

import copy
import dis
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from moe_ext.models.blocks import MoeBlock, counted_of, experts_by_name
from moe_ext.models.boundary import num_routed
from moe_ext.models.counted import with_counts
from moe_ext.models.uneven_layers import built


def counts_by_layer(blocks: Sequence[MoeBlock], counts: Sequence[int]) -> dict[int, int]:
    """Numbers of experts by decoder layer, as a config has them.

    Raises:
        ValueError: numbers differ and a block is in no numbered layer, or two blocks are in one.
    """
    if len(set(counts)) == 1:
        return dict.fromkeys(range(len(blocks)), counts[0])
    found: dict[int, int] = {}
    for block, count in zip(blocks, counts, strict=True):
        if found.setdefault(block.layer, count) != count:
            raise ValueError(
                f"{block.name}: would have {count} experts beside others of the same layer with {found[block.layer]}; "
                f"the config has one number for both"
            )
    return found


def check_uneven(model: PreTrainedModel, blocks: Sequence[MoeBlock], counts: Sequence[int]) -> None:
    """Checks that a model with those numbers of experts can be saved, loaded and run.

    Args:
        counts: E of every MoE layer, in layer order, not all equal.

    Raises:
        ValueError: what stands against it.
    """
    by_layer = counts_by_layer(blocks, counts)
    fields = counted_of(model).fields
    kind = type(model.config)
    changed = copy.deepcopy(model.config)
    try:
        with_counts(changed.get_text_config(decoder=True), fields, by_layer)
        read = kind.from_dict(json.loads(json.dumps(changed.to_dict())))
        with torch.device("meta"):
            other = built(read, partial(type(model)._from_config, read, dtype=model.dtype))
        got = [num_routed(experts) for experts in experts_by_name(other).values()]
    except Exception as error:  # whatever the family's own code raises
        raise _refused(model, str(error).strip().splitlines()[-1].split(". ")[0]) from error
    if got != list(counts):
        raise _refused(model, f"a model of such a config has {got} experts")
    if (reader := _reader(other, fields)) is not None:
        raise _refused(model, f"the code of {reader} reads the one number of the config")


def _refused(model: PreTrainedModel, reason: str) -> ValueError:
    kind = model.config.get_text_config(decoder=True).model_type
    return ValueError(
        f"plan: keeps different numbers of experts in different layers, which {kind!r} models cannot have: "
        f"{reason.strip()}; plan one number for all layers (scope='layer')"
    )


def _reader(model: PreTrainedModel, fields: Sequence[str]) -> str | None:
    """A class inside the decoder layers whose forward reads one of those fields from the config, which refuses it."""
    aliases: Mapping[str, str] = model.config.get_text_config(decoder=True).attribute_map
    names = {*fields, *(alias for alias, field in aliases.items() if field in fields)}
    for name in {name.rpartition(".")[0] for name in experts_by_name(model)}:
        for module in model.get_submodule(name).modules():
            forward = inspect.unwrap(type(module).forward)
            read = [(each.opname, each.argval) for each in dis.get_instructions(forward)]
            if any(one == ("LOAD_ATTR", "config") and two[1] in names for one, two in pairwise(read)):
                return type(module).__name__
    return None
