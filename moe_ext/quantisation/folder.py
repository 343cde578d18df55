"""Quantises the experts of a checkpoint on disk, from file to file: one weight in memory at a time.

As pruning a folder does (:mod:`moe_ext.pruning.prune_folder`), the new folder grows under a hidden name beside its
place, one whole shard after the other, and takes its place in one rename; a run that was interrupted goes on.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from moe_ext.checkpoints.faults import few
from moe_ext.checkpoints.key_map import Source
from moe_ext.checkpoints.meta_model import Skeleton, skeleton_of
from moe_ext.checkpoints.packed_form import (
    check_storable,
    compressed_config,
    mxfp4_blocks,
    mxfp4_config,
    stored_parts,
    stored_tensors_of,
)
from moe_ext.checkpoints.saved_packed import no_layout, own_mxfp4, unquantised
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor, stored_tensors
from moe_ext.checkpoints.weight_loader import read_stored
from moe_ext.checkpoints.written_config import read_content
from moe_ext.models.blocks import MoeBlock, expert_tensors, moe_blocks, refuse_novices
from moe_ext.models.dtypes import DTYPES
from moe_ext.models.packed_experts import WeightFormat, weight_names
from moe_ext.pruning.prune_folder import SHARD_SIZE, write_rest
from moe_ext.pruning.shard_writer import Part, shards_of, write_shard
from moe_ext.pruning.unfinished import PROGRESS, begin, check_space, fingerprint, locked
from moe_ext.quantisation.rounding import check_search, rounded
from moe_ext.storage.files import flush_to_disk, folder_destination, put_in_place


@dataclass(frozen=True)
class QuantisedCheckpoint:
    """What :func:`quantize_checkpoint` wrote."""

    folder: Path
    weight_bytes_before: int
    weight_bytes: int


def quantize_checkpoint(
    checkpoint: str | Path,
    weights: str,
    out: str | Path,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    search_scales: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> QuantisedCheckpoint:
    """Writes a checkpoint folder whose routed experts are quantised, in layouts that others load.

    int8 and int4 are stored as compressed-tensors' ``pack-quantized``, fp8 as ``float-quantized``, mxfp4 in gpt-oss'
    own form for gpt-oss and as ``mxfp4-pack-quantized`` for other families. Numbers are those of
    :func:`moe_ext.quantize` on the loaded model. Every other tensor and file is copied as it is. Until it is complete
    the result is ``.OUT.partial`` beside ``out``; interrupted in whatever way, the same call goes on with it.

    Args:
        checkpoint: a folder with safetensors weights, not quantised.
        weights, group_size, symmetric, search_scales: as for :func:`moe_ext.quantize`.
        out: must not exist yet, or be an empty folder.
        shard_size: bytes of weights a file.
        progress: whether to show a progress bar.
        trust_remote_code: as for :func:`moe_ext.from_pretrained`.

    Raises:
        FileExistsError: ``out`` holds something, from the beginning or since another process finished.
        BlockingIOError: another process is writing ``out``.
        CheckpointError: the weight files are not whole, not what their index says, or not what the model needs; or
            experts hold numbers that are not finite.
        ValueError: a format that there is not, a folder that is quantised already or holds the experts of a layer in
            one tensor, for which there is no such layout, or sizes that do not go with the groups.
        OSError: a file is missing, or the disk is too small: found before anything is written.
    """
    form = WeightFormat.of(weights, group_size, symmetric)
    check_search(form, search_scales)
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; expected a number of bytes")
    target = folder_destination(out)
    stored = stored_tensors(checkpoint)
    skeleton = skeleton_of(checkpoint, stored, trust_remote_code=trust_remote_code)
    if skeleton.format is not None:
        raise ValueError(f"{checkpoint} holds {skeleton.format} weights already; quantise one with float weights")
    blocks = moe_blocks(skeleton.model)
    refuse_novices(blocks, "quantise")
    parts, quantised = _parts(skeleton, stored, blocks, form, search_scales)
    ignored = unquantised({name: tensor.shape for name, tensor in stored.items() if name not in quantised})
    own = own_mxfp4(skeleton.model, form)
    content = read_content(checkpoint)
    content["quantization_config"] = mxfp4_config(ignored) if own else compressed_config(form, ignored)
    shards = shards_of(parts, shard_size)
    work = target.with_name(f".{target.name}.partial")
    with locked(work, target):
        asked = ("quantize", form.type, form.group_size, form.symmetric, search_scales, shard_size)
        finished = begin(work, fingerprint(checkpoint, stored, *asked), shards)
        check_space(work, sum(part.size for name, held in shards.items() if name not in finished for part in held))
        total, strange = sum(part.size for part in parts), list[str]()
        with tqdm(total=total, desc="quantise", unit="B", unit_scale=True, disable=not progress) as bar:
            for name, held in shards.items():
                if name in finished:
                    bar.update(sum(part.size for part in held))
                else:
                    strange += write_shard(work / name, held, bar)
        write_rest(Path(checkpoint), work, skeleton.model, content, shards)
        (work / PROGRESS).unlink()
        for path in (*work.rglob("*"), work):
            flush_to_disk(path)
        put_in_place(work, target)
    if strange:
        warnings.warn(f"{target}: copied as they are, with numbers that are not finite: {few(strange)}", stacklevel=2)
    return QuantisedCheckpoint(target, sum(tensor.size for tensor in stored.values()), total)


def _parts(
    skeleton: Skeleton,
    stored: dict[str, StoredTensor],
    blocks: list[MoeBlock],
    form: WeightFormat,
    search_scales: bool,
) -> tuple[list[Part], set[str]]:
    """Every tensor of the new folder in the order of the old one, and the old ones that are quantised."""
    names = {id(tensor): name for name, tensor in skeleton.model.named_parameters()}
    targets = {names[id(expert_tensors(block)[name])] for block in blocks for name in weight_names(block.experts)}
    parts, quantised = list[Part](), set[str]()
    for name, tensor in stored.items():
        source = skeleton.sources.get(name)
        if source is None or source.target not in targets:
            parts.append(Part(name, tensor, tensor.shape, tensor.dtype, ((0, tensor.size),)))
            continue
        quantised.add(name)
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{tensor.file}: {name!r} is {tensor.dtype}; expected float32, bfloat16 or float16")
        if own_mxfp4(skeleton.model, form):
            parts += _blocks_of_all(skeleton, source, tensor, form)
        else:
            parts += _of_one(skeleton, source, tensor, form, search_scales)
    return parts, quantised


def _of_one(
    skeleton: Skeleton, source: Source, tensor: StoredTensor, form: WeightFormat, search_scales: bool
) -> list[Part]:
    """The parts of one expert's projection (R, C)."""
    name = tensor.name
    if source.expert is None or source.part is None or len(tensor.shape) != 2 or not name.endswith(".weight"):
        raise no_layout(f"{tensor.file}: {name}", skeleton.model, form)
    rows, columns = tensor.shape
    check_storable(f"{tensor.file}: {name}", form, rows, columns)
    module = name.removesuffix("weight")

    def made() -> Iterator[tuple[str, int, Tensor]]:
        matrix = rounded(_read(tensor), form, tensor.dtype, search_scales)
        for key, part in stored_tensors_of(matrix, form, columns, tensor.dtype).items():
            yield module + key, 0, part

    wanted = stored_parts(form, rows, columns, tensor.dtype)
    return [Part(module + key, tensor, shape, dtype, (), made=made) for key, (dtype, shape) in wanted.items()]


def _blocks_of_all(skeleton: Skeleton, source: Source, tensor: StoredTensor, form: WeightFormat) -> list[Part]:
    """The parts of gpt-oss' (E, C, R), whose experts are quantised one after the other."""
    name = tensor.name
    if source.converted or len(tensor.shape) != 3:
        raise no_layout(f"{tensor.file}: {name}", skeleton.model, form)
    experts, columns, rows = tensor.shape
    check_storable(f"{tensor.file}: {name}", form, rows, columns)
    size = tensor.size // experts

    def made() -> Iterator[tuple[str, int, Tensor]]:
        for expert in range(experts):
            one = replace(tensor, shape=(columns, rows), offset=tensor.offset + expert * size)
            numbers, scales = mxfp4_blocks(rounded(_read(one).T, form, tensor.dtype))
            yield f"{name}_blocks", expert * numbers.numel(), numbers
            yield f"{name}_scales", expert * scales.numel(), scales

    groups = columns // form.group_size
    return [
        Part(f"{name}_blocks", tensor, (experts, rows, groups, 16), torch.uint8, (), made=made),
        Part(f"{name}_scales", tensor, (experts, rows, groups), torch.uint8, (), made=made),
    ]


def _read(tensor: StoredTensor) -> Tensor:
    values = read_stored(tensor)
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{tensor.file}: {tensor.name!r} holds numbers that are not finite")
    return values
