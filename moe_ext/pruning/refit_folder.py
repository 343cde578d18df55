"""The refit of a checkpoint folder: one decoder layer in memory, what is found of each in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from moe_ext.checkpoints.key_map import names_of
from moe_ext.checkpoints.meta_model import Skeleton
from moe_ext.checkpoints.stored_tensors import StoredTensor
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import MoeBlock, expert_tensors
from moe_ext.pruning.refit_files import RefitFiles
from moe_ext.pruning.refit_layers import refitted_layers


def down_projections(skeleton: Skeleton, blocks: list[MoeBlock]) -> list[str]:
    """The names of the MoE layers' down projections."""
    names = names_of(skeleton.model)
    return [names[id(expert_tensors(block)["down_proj"])] for block in blocks]


def planned(skeleton: Skeleton, names: list[str]) -> dict[str, StoredTensor]:
    """Parameters of a pruned model as they will lie in files that are not there yet."""
    tensors = skeleton.model.state_dict()
    return {name: StoredTensor(name, Path(), skeleton.dtype_of(name), tuple(tensors[name].shape), 0) for name in names}


def refit_into(
    files: RefitFiles,
    checkpoint: str | Path,
    plan: PruningPlan,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    dtype: str,
    device: str,
    progress: bool,
    trust_remote_code: bool,
) -> list[StoredTensor]:
    """Where the refitted down projections of the MoE layers lie, once they are all there.

    Raises:
        ValueError, MemoryError: as for :func:`refitted_layers`.
    """
    count = len(plan.keep)
    if not all(files.holds(layer) for layer in range(count)):
        with (
            LayersOnDisk(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code) as layers,
            closing(
                refitted_layers(
                    layers.model, layers.blocks, plan, batches, need=layers.need, known=files.known, progress=progress
                )
            ) as fitted,
        ):
            for layer, down in fitted:
                files.write(layer, down)
    return [files.stored(layer) for layer in range(count)]
