"""Where a family's config keeps the width of its experts, found by building the model: fields have many names, and some
are read by dense layers and shared experts, too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_ext.models.blocks import MoeBlock, expert_tensors, moe_blocks, text_config
from moe_ext.models.boundary import is_transposed
from moe_ext.models.own_counts import built
from moe_ext.models.packed_experts import float_shape, packed_format, packed_shape, weight_names

# Config fields that may hold the experts' width, the more special first.
WIDTH_FIELDS = (
    "moe_intermediate_size",
    "expert_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "ffn_hidden_size",
    "ffn_dim",
    "intermediate_size",
)
# Fields that count shared experts, which some families make one network of, as wide as so many routed experts.
SHARED_FIELDS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def width_of(block: MoeBlock) -> int:
    """I, the channels of a block's experts, whose weights need not be in memory."""
    if packed_format(block.experts) is not None:
        return packed_shape(block.experts, "down_proj")[1]
    down: Any = block.experts.down_proj
    return int(down.shape[1 if is_transposed(block.experts) else 2])


def config_for_width(model: PreTrainedModel, blocks: list[MoeBlock], width: int) -> tuple[dict[str, Any], Any]:
    """What makes a model's config one of experts of another width, and of nothing else.

    Returns:
        The fields of the text decoder's config with their new values; and a model on the meta device that was built so.

    Raises:
        ValueError: no field is known that holds the width, or what holds it is read by other layers, too.
    """
    before = width_of(blocks[0])
    config = text_config(model)
    candidates = [name for name in WIDTH_FIELDS if vars(config).get(name) == before]
    wanted = _shapes(model, blocks, before, width)
    for name in candidates:
        for fields in _choices(config, name, before, width):
            changed = copy.deepcopy(model.config)
            for field, value in fields.items():
                setattr(changed.get_text_config(decoder=True), field, value)
            with torch.device("meta"):
                other = built(changed, partial(type(model)._from_config, changed, dtype=model.dtype))
            if {key: tuple(tensor.shape) for key, tensor in other.state_dict().items()} == wanted:
                return fields, other
    raise ValueError(
        f"{blocks[0].name}: {_reason(candidates)}; a model with {width} of {before} channels an expert could not be "
        f"saved as a {config.model_type!r} checkpoint. Remove whole experts of this family instead"
    )


def _reason(candidates: list[str]) -> str:
    if not candidates:
        return "no field of the config is known to hold the experts' width"
    return f"other layers read {' and '.join(candidates)}, too, which holds the experts' width"


def _choices(config: Any, name: str, before: int, width: int) -> Iterator[dict[str, Any]]:
    """Changes of a config's fields to try: the width alone, and with as many more shared experts as these get
    narrower, so that together they stay as wide."""
    yield {name: width}
    for shared in SHARED_FIELDS:
        count = vars(config).get(shared)
        if type(count) is int and count > 0 and count * before % width == 0:
            yield {name: width, shared: count * before // width}


def _shapes(model: PreTrainedModel, blocks: list[MoeBlock], before: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors with its experts of another width, by name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = {id(module): name for name, module in model.named_modules()}
    for block in blocks:
        path = names[id(block.experts)]
        for name, tensor in expert_tensors(block).items():
            held = tuple(tensor.shape)
            if packed_format(block.experts) is not None and not name.endswith("_bias"):
                del shapes[f"{path}.{name}"]  # of the model with float weights
                if name not in weight_names(block.experts):
                    continue
                held = float_shape(block.experts, name)
            dim = channel_dimension(block, name)
            if dim is not None:
                shape = list(held)
                shape[dim] = shape[dim] // before * width
                held = tuple(shape)
            shapes[f"{path}.{name}"] = held
    return shapes


def channel_dimension(block: MoeBlock, name: str) -> int | None:
    """Which dimension of an experts' tensor counts channels; None for the biases of outputs, which have none."""
    if name.endswith("_bias"):
        return None if name == "down_proj_bias" else 1
    # Of quantised weights as well: their dimensions are those of the float ones that they stand for.
    held_so = packed_format(block.experts) is not None and getattr(block.experts, "is_transposed", False)
    transposed = held_so or is_transposed(block.experts)
    return (1 if transposed else 2) if name == "down_proj" else (2 if transposed else 1)


def take_width(blocks: list[MoeBlock], other: PreTrainedModel, before: int, width: int) -> None:
    """Gives the modules of blocks the width as attributes, where those of a model of that width have it."""
    for block, like in zip(blocks, moe_blocks(other), strict=True):
        for module, example in ((block.module, like.module), (block.experts, like.experts)):
            for name, value in vars(example).items():
                if type(value) is int and value == width and vars(module).get(name) == before:
                    setattr(module, name, width)
