"""Tables of a checkpoint that say a token's experts (:mod:`moe_ext.models.fixed_choices`), for a plan's experts alone.
Unlike everything else of a checkpoint they hold other numbers after pruning, and are read for that, as gates are."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moe_ext.checkpoints.key_map import names_of
from moe_ext.checkpoints.meta_model import Skeleton
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import MoeBlock
from moe_ext.models.fixed_choices import gate_rows, remapped, tables
from moe_ext.pruning.shard_writer import Part


def tables_left(
    skeleton: Skeleton, stored: Mapping[str, StoredTensor], blocks: list[MoeBlock], plan: PruningPlan
) -> dict[str, bytes]:
    """What the tables will hold, by their keys in the checkpoint.

    Raises:
        CheckpointError: a table or gate is not stored as the model holds it.
    """
    names, found = names_of(skeleton.model), {}
    keys = {source.target: key for key, source in skeleton.sources.items() if not source.converted}

    def key_of(tensor: Tensor) -> str:
        name = names[id(tensor)]
        if name not in keys:
            raise CheckpointError(f"{name!r} is stored in another form than the model holds it")
        return keys[name]

    for block, keep in zip(blocks, plan.keep, strict=False):  # prune says what does not fit
        if plan.num_experts != block.num_experts or plan.top_k < block.top_k or len(keep) == block.num_experts:
            continue
        for table in tables(block).values():
            new = remapped(_read(stored[key_of(table)]), keep, _read(stored[key_of(gate_rows(block))]))
            found[key_of(table)] = new.numpy().tobytes()
    return found


def with_tables(parts: list[Part], contents: Mapping[str, bytes]) -> list[Part]:
    """The parts of a new checkpoint, those of tables with what these will hold."""
    return [replace(part, content=contents[part.name]) if part.name in contents else part for part in parts]


def _read(place: StoredTensor) -> Tensor:
    with place.file.open("rb") as file:
        file.seek(place.offset)
        return torch.frombuffer(bytearray(file.read(place.size)), dtype=place.dtype).view(place.shape)
