"""Where a config says that layers have different numbers of experts: tried on a family's config and its classes, on the
meta device, before a model is touched.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import get_args

import torch
from transformers import PreTrainedModel

from moe_ext.models.blocks import MoeBlock, counted_of, experts_by_name, moe_blocks
from moe_ext.models.boundary import num_routed
from moe_ext.models.counted import CountsPlace, with_counts
from moe_ext.models.own_counts import built, readers


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
                f"{block.name}: would have {count} experts beside others of the same decoder layer with "
                f"{found[block.layer]}; a config has one number for a layer: plan as many for both"
            )
    return found


def place_of_counts(model: PreTrainedModel, blocks: Sequence[MoeBlock], counts: Sequence[int]) -> CountsPlace:
    """Where the config of a model with those numbers of experts says so, for it to be saved, loaded and run:
    transformers' own place, or our section where the family's config or code has one number for all.

    Args:
        counts: E of every MoE layer, in layer order, not all equal.

    Raises:
        ValueError: neither goes; what stands against it.
    """
    by_layer, reason = counts_by_layer(blocks, counts), None
    for place in get_args(CountsPlace):
        reason = _reason_against(model, counts, by_layer, place)
        if reason is None:
            return place
    kind = model.config.get_text_config(decoder=True).model_type
    raise ValueError(
        f"plan: keeps different numbers of experts in different layers, which {kind!r} models cannot have: "
        f"{reason}; plan one number for all layers (scope='layer')"
    )


def _reason_against(
    model: PreTrainedModel, counts: Sequence[int], by_layer: Mapping[int, int], place: CountsPlace
) -> str | None:
    fields, kind = counted_of(model).fields, type(model.config)
    changed = copy.deepcopy(model.config)
    try:
        with_counts(changed.get_text_config(decoder=True), fields, by_layer, place)
        read = kind.from_dict(json.loads(json.dumps(changed.to_dict())))
        with torch.device("meta"):
            other = built(read, partial(type(model)._from_config, read, dtype=model.dtype))
    except Exception as error:  # whatever the family's own code raises
        return str(error).strip().splitlines()[-1].split(". ")[0].strip()
    got = [num_routed(experts) for experts in experts_by_name(other).values()]
    if got != list(counts):
        return f"a model of such a config has {got} experts"
    for block in moe_blocks(other):
        # Which implementation experts have is said in the config that they share.
        for module in readers(block, fields):
            if place == "per_layer_config" or module is block.experts:
                return f"the code of {type(module).__name__} reads the one number of the config"
    return None
