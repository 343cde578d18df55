"""How many bytes a checkpoint's weights take if its experts keep fewer channels, from the headers of its files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from moe_ext.checkpoints.key_map import names_of, tied
from moe_ext.checkpoints.meta_model import Skeleton, skeleton_of
from moe_ext.checkpoints.stored_tensors import StoredTensor, stored_tensors
from moe_ext.models.blocks import MoeBlock, expert_dimension, expert_tensors, moe_blocks
from moe_ext.models.expert_width import channel_dimension, width_of
from moe_ext.models.layout import Layout, layout_of


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint's weights by the width of its experts, once a plan's experts are gone.

    Attributes:
        layout: of the model before.
        width: I, channels that its experts have.
        fixed: bytes of what has no channels.
        per_channel: bytes of a channel of all kept experts.
        block: channels that are stored together or share scales; 1 if each stands for itself.
        per_block: bytes of what is stored once a block, of all kept experts.
    """

    layout: Layout
    width: int
    fixed: int
    per_channel: int
    block: int = 1
    per_block: int = 0

    def at(self, width: int) -> int:
        """Bytes with so many channels an expert."""
        return self.fixed + self.per_channel * width + self.per_block * -(-width // self.block)

    def widest(self, most: int, multiple: int) -> int:
        """The largest multiple, below I, of channels with which the weights take no more than ``most`` bytes; 0 if
        there is none."""
        fitting = (self.width - 1) // multiple * multiple
        while fitting > 0 and self.at(fitting) > most:
            fitting -= multiple
        return max(fitting, 0)


@dataclass(frozen=True)
class _Written:
    """A tensor as it is written.

    Attributes:
        size: bytes.
        target: the model's tensor that it goes into.
        expert: the one that it is of, if it is of one alone.
        per: channels that it has one number for; 0 if it has none that channels are taken out of.
    """

    size: int
    target: str
    expert: int | None = None
    per: int = 1


def checkpoint_size(
    model: PreTrainedModel | str | Path, keep: Sequence[Sequence[int]] | None = None, *, trust_remote_code: bool = False
) -> CheckpointSize:
    """What :func:`moe_ext.prune_checkpoint` would write of a folder, or ``save_pretrained`` of a model.

    Args:
        model: a checkpoint folder, of which the headers and the config are read; or a loaded model.
        keep: the experts that every layer keeps; None: all.
        trust_remote_code: as for :func:`moe_ext.from_pretrained`.

    Raises:
        CheckpointError, ValueError, OSError: as for :func:`moe_ext.prune_checkpoint`; or layers whose experts differ in
            width.
    """
    if isinstance(model, PreTrainedModel):
        live, block, tensors = model, 1, _of_model(model)
    else:
        stored = stored_tensors(model)
        skeleton = skeleton_of(model, stored, trust_remote_code=trust_remote_code)
        live, tensors = skeleton.model, _of_folder(skeleton, stored)
        block = math.lcm(*(tensor.per for tensor in tensors if tensor.per))
    blocks = moe_blocks(live)
    width = width_of(blocks[0])
    for other in blocks:
        if width_of(other) != width:
            raise ValueError(
                f"model: {blocks[0].name} has experts of {width} channels, {other.name} of {width_of(other)}; expected "
                "one width"
            )
    counting = _counting(live, blocks, keep or [range(each.num_experts) for each in blocks])
    fixed = channels = scales = 0
    for tensor in tensors:
        if tensor.target not in counting:
            fixed += tensor.size
            continue
        before, after, kept, has_channels = counting[tensor.target]
        size = tensor.size // before * after
        if tensor.expert is not None:
            size = tensor.size if tensor.expert in kept else 0
        if not has_channels or not tensor.per:
            fixed += size
        elif tensor.per > 1:
            scales += size
        else:
            channels += size
    return CheckpointSize(layout_of(live, blocks), width, fixed, channels // width, block, scales // -(-width // block))


def _of_model(model: PreTrainedModel) -> list[_Written]:
    left_out = tied(model) | set(model._keys_to_ignore_on_save or ())
    return [_Written(tensor.nbytes, name) for name, tensor in model.state_dict().items() if name not in left_out]


def _of_folder(skeleton: Skeleton, stored: dict[str, StoredTensor]) -> list[_Written]:
    written = [_Written(stored[key].size, "") for key in skeleton.beside]
    dims = _channel_dims(skeleton)
    for name, source in skeleton.saved():
        weight = skeleton.quantised.get(name)
        if weight is None:
            size = math.prod(stored[name].shape) * skeleton.saved_dtype(name, stored[name]).itemsize
            written.append(_Written(size, source.target, source.expert))
            continue
        for key, piece in weight.pieces.items():
            dim = dims.get(source.target)
            follows = None if dim is None else piece.axis(dim - (source.expert is not None))
            written.append(_Written(stored[key].size, source.target, source.expert, follows[1] if follows else 0))
    return written


def _channel_dims(skeleton: Skeleton) -> dict[str, int]:
    """Which dimension of a parameter counts the channels of experts."""
    names = names_of(skeleton.model)
    found = {
        names[id(tensor)]: channel_dimension(block, name)
        for block in moe_blocks(skeleton.model)
        for name, tensor in expert_tensors(block).items()
    }
    return {name: dim for name, dim in found.items() if dim is not None}


def _counting(
    model: PreTrainedModel, blocks: list[MoeBlock], keep: Sequence[Sequence[int]]
) -> dict[str, tuple[int, int, Sequence[int], bool]]:
    """Of every tensor that counts experts: that dimension's size and what is left of it, which experts are kept, and
    whether these have channels."""
    names = names_of(model)
    found: dict[str, tuple[int, int, Sequence[int], bool]] = {}
    for block, kept in zip(blocks, keep, strict=True):
        for name, tensor in expert_tensors(block).items():
            has_channels = channel_dimension(block, name) is not None
            counting = expert_dimension(block, name)
            sizes = counting.size(block.num_experts), counting.size(len(kept))
            found[names[id(tensor)]] = *sizes, counting.places(kept, block.num_experts), has_channels
        for part in block.routing_tensors():
            sizes = part.dimension.size(block.num_experts), part.dimension.size(len(kept))
            found[names[id(part.tensor)]] = *sizes, kept, False
    return found
