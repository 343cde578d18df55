"""Applies a :class:`PruningPlan` to a checkpoint on disk: weights go from file to file in pieces, none through a model.

What is left of a tensor is a list of byte ranges of the old files, so that memory does not depend on the model's size.
The new folder grows under a hidden name beside its place, one whole shard after the other, and takes its place in one
rename when all is there. A run that was interrupted goes on with the shards that are there.
"""

import copy
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_ext.checkpoints.faults import few
from moe_ext.checkpoints.meta_model import Skeleton, skeleton_of
from moe_ext.checkpoints.other_files import copy_other_files
from moe_ext.checkpoints.quantised import MODELOPT
from moe_ext.checkpoints.stored_tensors import INDEX, CheckpointError, stored_tensors
from moe_ext.checkpoints.written_config import changed_content, read_content, write_content
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import refuse_novices, text_config
from moe_ext.models.counted import counts_differ
from moe_ext.pruning.further_layers import further_parts
from moe_ext.pruning.kept_parts import Slice, parts_of, slices_of
from moe_ext.pruning.prune import blocks_to_prune, prune_whole
from moe_ext.pruning.refit_files import RefitFiles
from moe_ext.pruning.refit_folder import down_projections, planned, refit_into
from moe_ext.pruning.renumbered_names import positions_of, renumbered
from moe_ext.pruning.shard_writer import Part, shards_of, write_shard
from moe_ext.pruning.tables_on_disk import tables_left, with_tables
from moe_ext.pruning.unfinished import PROGRESS, begin, check_space, fingerprint, locked
from moe_ext.runtime.batches import as_batches
from moe_ext.storage.digests import text_digest
from moe_ext.storage.files import flush_to_disk, folder_destination, put_in_place
from moe_ext.storage.formats import parse_json

SHARD_SIZE = 5_000_000_000
"""Bytes of weights a file, at most, unless one tensor alone is larger."""


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What :func:`prune_checkpoint` wrote."""

    folder: Path
    parameters_before: int
    parameters: int
    weight_bytes: int


def prune_checkpoint(
    checkpoint: str | Path,
    plan: PruningPlan,
    out: str | Path,
    *,
    refit: Sequence[Mapping[str, Tensor]] | None = None,
    shard_size: int = SHARD_SIZE,
    dtype: str = "auto",
    device: str = "cpu",
    progress: bool = True,
    trust_remote_code: bool = False,
) -> PrunedCheckpoint:
    """Writes a checkpoint folder without the experts that a plan does not keep, whatever the model's size.

    The tensors are those of :func:`moe_ext.prune` and ``save_pretrained`` on the loaded model, byte by byte and under
    the same names; and those of layers for multi-token prediction (:mod:`moe_ext.pruning.further_layers`). The config
    is the source's, with only those fields changed that pruning changes; everything beside weights, config and model
    card is copied. Weights are read through a memory map of 64 MB at most.

    Until it is complete the result is ``.OUT.partial`` beside ``out``. Interrupted in whatever way, the same call goes
    on with it; another call for ``out`` begins anew.

    Args:
        checkpoint: a folder with safetensors weights, in the Hub's layout of the family (an expert a tensor) or
            transformers' (a layer's experts a tensor).
        plan: made for this model.
        out: must not exist yet, or be an empty folder.
        refit: calibration text, as for :func:`moe_ext.prune`; the model then runs over it with one decoder layer in
            memory, and of a run that was interrupted the layers that it had come to are not fitted again.
        shard_size: bytes of weights a file.
        dtype: "auto": as ``from_pretrained(dtype="auto")`` would hold it, usually the bytes as they are; or another
            type to convert to. Quantised weights stay as they are: what is stored beside them goes and stays with
            them, so that a plan of channels must keep whole blocks of those that share a scale or a word.
        device: where a layer computes for the refit.
        progress: whether to show a progress bar.
        trust_remote_code: as for :func:`moe_ext.from_pretrained`.

    Tensors that hold numbers which are not finite are copied with a warning that names them.

    Raises:
        FileExistsError: ``out`` holds something, from the beginning or since another process finished.
        BlockingIOError: another process is writing ``out``.
        CheckpointError: the weight files are not whole, not what their index says, or not what the model needs.
        ValueError: the plan does not fit, the model was pruned already, shard_size is not positive, or a tensor of the
            experts is not as the family's record says; a refit of quantised weights, or none that is possible (see
            :func:`moe_ext.pruning.refit_layers.refitted_layers`).
        OSError: a file is missing, or the disk is too small: found before anything is written.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; expected a number of bytes")
    target = folder_destination(out)
    stored = stored_tensors(checkpoint)
    skeleton = skeleton_of(checkpoint, stored, dtype=dtype, trust_remote_code=trust_remote_code)
    if counts_differ(text_config(skeleton.model)):
        raise ValueError(f"{checkpoint}: its layers differ already; prune the model that it was made of")
    blocks = blocks_to_prune(skeleton.model, plan, refit=refit is not None)
    refuse_novices(blocks, "prune")
    if skeleton.format is not None and refit is not None:
        raise ValueError(
            f"refit: {checkpoint} holds {skeleton.format} weights, which are not fitted; prune without, or "
            "refit a checkpoint in bfloat16"
        )
    before, config = skeleton.model.num_parameters(), copy.deepcopy(skeleton.model.config)
    slices, tables = slices_of(skeleton, blocks, plan), tables_left(skeleton, stored, blocks, plan)
    written, further = _changed_quantisation(Path(checkpoint), skeleton, slices, stored, plan.keep[-1])
    downs = [] if refit is None else down_projections(skeleton, blocks)
    drafting = further_parts(skeleton, stored, blocks, plan, slices)
    # Checks the plan, writes the config, and gives the shapes to arrive at.
    prune_whole(skeleton.model, plan, further_layers=bool(drafting))
    fitted = planned(skeleton, downs)
    parts = with_tables(parts_of(skeleton, stored, slices, fitted), tables) + drafting
    if len(names := {part.name for part in parts}) != len(parts):
        raise CheckpointError(f"{checkpoint}: {len(parts)} tensors would have only {len(names)} names")
    shards = shards_of(parts, shard_size)
    work = target.with_name(f".{target.name}.partial")
    with locked(work, target):
        refit = None if refit is None else list(as_batches(refit))
        text = None if refit is None else text_digest(refit)
        finished = begin(work, fingerprint(checkpoint, stored, plan.to_json(), shard_size, dtype, text), shards)
        left = sum(part.size for name, parts in shards.items() if name not in finished for part in parts)
        check_space(work, left + sum(tensor.size for tensor in fitted.values()))
        if refit is not None:
            found = refit_into(
                RefitFiles(work),
                checkpoint,
                plan,
                refit,
                dtype=dtype,
                device=device,
                progress=progress,
                trust_remote_code=trust_remote_code,
            )
            by_name = dict(zip(downs, found, strict=True))
            shards = shards_of(with_tables(parts_of(skeleton, stored, slices, by_name), tables) + drafting, shard_size)
        total, strange = sum(part.size for part in parts), list[str]()
        with tqdm(total=total, desc="prune", unit="B", unit_scale=True, disable=not progress) as bar:
            for name, content in shards.items():
                if name in finished:
                    bar.update(sum(part.size for part in content))
                else:
                    strange += write_shard(work / name, content, bar)
        held = None if dtype == "auto" else skeleton.dtype
        written = changed_content(
            written, config, skeleton.model.config, dtype=held, architecture=type(skeleton.model).__name__
        )
        write_rest(Path(checkpoint), work, skeleton.model, written, shards)
        for name, changed in further.items():
            (work / name).write_text(changed, encoding="utf-8")
        (work / PROGRESS).unlink()
        if refit is not None:
            RefitFiles(work).remove()
        for path in (*work.rglob("*"), work):
            flush_to_disk(path)
        put_in_place(work, target)
    if strange:
        warnings.warn(f"{target}: copied as they are, with numbers that are not finite: {few(strange)}", stacklevel=2)
    return PrunedCheckpoint(target, before, skeleton.model.num_parameters(), total)


def _changed_quantisation(
    checkpoint: Path, skeleton: Skeleton, slices: Mapping[str, Slice], stored: Iterable[str], last: Sequence[int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The source's config with the experts renumbered that it names in what it says of quantisation, and the text of
    further files that name experts so."""
    content = read_content(checkpoint)
    if skeleton.format is None or all(kept.keep == tuple(range(kept.experts)) for kept in slices.values()):
        return content, {}
    positions = positions_of(skeleton.sources, slices, stored, last)
    for key in ("quantization_config", "compression_config"):
        if key in content:
            content[key] = renumbered(content[key], positions)
    if not (checkpoint / MODELOPT).is_file():
        return content, {}
    declared = renumbered(parse_json((checkpoint / MODELOPT).read_bytes()), positions)
    return content, {MODELOPT: json.dumps(declared, indent=4, ensure_ascii=False) + "\n"}


def write_rest(
    checkpoint: Path,
    work: Path,
    model: PreTrainedModel,
    content: dict[str, Any],
    shards: dict[str, list[Part]],
) -> None:
    """Index, config, and what else the source holds."""
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": model.num_parameters(),
                "total_size": sum(part.size for parts in shards.values() for part in parts),
            },
            "weight_map": {part.name: shard for shard, parts in shards.items() for part in parts},
        }
        (work / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_content(work, content)
    copy_other_files(checkpoint, work)
