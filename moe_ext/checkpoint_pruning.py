"""Applies a :class:`PruningPlan` to a checkpoint on disk: weights go from file to file in pieces, none through a model.

What is left of a tensor is a list of byte ranges of the old files, so that memory does not depend on the model's size.
The new folder grows under a hidden name beside its place, one whole shard after the other, and takes its place in one
rename when all is there. A run that was interrupted goes on with the shards that are there.
"""

import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm
from transformers.core_model_loading import dot_natural_key

from moe_ext.architectures import expert_tensors, moe_blocks, refuse_novices, text_config
from moe_ext.checkpoint_files import DTYPES, INDEX, SINGLE, CheckpointError, StoredTensor, stored_tensors
from moe_ext.files import flush_to_disk, folder_destination, replace_file
from moe_ext.plan import PruningPlan
from moe_ext.pruning import prune
from moe_ext.skeleton import Skeleton, Source, names_of, skeleton_of, tied
from moe_ext.version import __version__

SHARD_SIZE = 5_000_000_000
"""Bytes of weights a file, at most, unless one tensor alone is larger."""

# What goes along as it is: a model card would describe the unpruned model.
_COPIED = (
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "*.tiktoken",
    "tokenizer*",
    "vocab*",
)
_WINDOW = 64 << 20  # bytes mapped at a time
_PROGRESS = "moe_ext_progress.json"
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What :func:`prune_checkpoint` wrote."""

    folder: Path
    parameters_before: int
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class _Part:
    """A tensor to write: slices of one that is stored."""

    name: str
    source: StoredTensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    ranges: tuple[tuple[int, int], ...]  # bytes of the source tensor, from and to

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def prune_checkpoint(
    checkpoint: str | Path,
    plan: PruningPlan,
    out: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    dtype: str = "auto",
    progress: bool = True,
) -> PrunedCheckpoint:
    """Writes a checkpoint folder without the experts that a plan does not keep, whatever the model's size.

    The tensors are those of :func:`moe_ext.prune` and ``save_pretrained`` on the loaded model, byte by byte and under
    the same names; the config, too. Tokenizer and generation files are copied. Weights are read through a memory map of
    64 MB at most.

    Until it is complete the result is ``.OUT.partial`` beside ``out``. Interrupted in whatever way, the same call goes
    on with it; another call for ``out`` begins anew.

    Args:
        checkpoint: a folder with safetensors weights, in the Hub's layout of the family (an expert a tensor) or
            transformers' (a layer's experts a tensor).
        plan: made for this model.
        out: must not exist yet, or be an empty folder.
        shard_size: bytes of weights a file.
        dtype: "auto": as ``from_pretrained(dtype="auto")`` would hold it, usually the bytes as they are; or another
            type to convert to. Float8 weights with scales (``weight_scale_inv``, DeepSeek-V3's own format) stay as they
            are: their scales go and stay with them.
        progress: whether to show a progress bar.

    Raises:
        FileExistsError: ``out`` holds something.
        BlockingIOError: another process is writing ``out``.
        CheckpointError: the weight files are not whole, or not what their index says.
        ValueError: the plan does not fit, the model was pruned already, shard_size is not positive, or a tensor of the
            experts is not as the family's record says.
        OSError: a file is missing, or the disk is too small: found before anything is written.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; expected a number of bytes")
    target = folder_destination(out)
    stored = stored_tensors(checkpoint)
    skeleton = skeleton_of(checkpoint, stored, dtype=dtype)
    if text_config(skeleton.model).is_heterogeneous:
        raise ValueError(f"{checkpoint}: its layers differ already; prune the model that it was made of")
    refuse_novices(moe_blocks(skeleton.model), "prune")
    if skeleton.block is not None:
        _check_names_in_quantisation(skeleton.model.config.quantization_config)
    before = skeleton.model.num_parameters()
    slices = _slices(skeleton, plan)
    prune(skeleton.model, plan)  # checks the plan, writes the config, and gives the shapes to arrive at
    parts = _parts(skeleton, stored, slices)
    if len(names := {part.name for part in parts}) != len(parts):
        raise CheckpointError(f"{checkpoint}: {len(parts)} tensors would have only {len(names)} names")
    shards = _shards(parts, shard_size)
    work = target.with_name(f".{target.name}.partial")
    with _locked(work):
        finished = _begin(work, _fingerprint(checkpoint, stored, plan, shard_size, dtype), shards)
        _check_space(work, sum(part.size for name, parts in shards.items() if name not in finished for part in parts))
        total = sum(part.size for part in parts)
        with tqdm(total=total, desc="prune", unit="B", unit_scale=True, disable=not progress) as bar:
            for name, content in shards.items():
                if name in finished:
                    bar.update(sum(part.size for part in content))
                else:
                    _write_shard(work / name, content, bar)
        _write_rest(Path(checkpoint), work, skeleton, shards)
        (work / _PROGRESS).unlink()
        for file in work.iterdir():
            flush_to_disk(file)
        flush_to_disk(work)
        work.rename(target)
    flush_to_disk(target.parent)
    return PrunedCheckpoint(target, before, skeleton.model.num_parameters(), total)


def _check_names_in_quantisation(quantisation: dict[str, Any]) -> None:
    """ValueError if the config says of one expert that it is not quantised: experts are renumbered."""
    for name in quantisation.get("modules_to_not_convert") or ():
        if re.search(r"experts\.\d", name):
            raise ValueError(f"quantization_config names {name!r}, and the experts would be renumbered")


def _slices(skeleton: Skeleton, plan: PruningPlan) -> dict[str, tuple[int, tuple[int, ...], int]]:
    """For every tensor that counts experts its dimension of experts, those that are kept, and how many there are."""
    blocks, names = moe_blocks(skeleton.model), names_of(skeleton.model)
    found = {}
    for block, keep in zip(blocks, plan.keep, strict=False):  # prune says what does not fit
        for tensor in expert_tensors(block).values():
            found[names[id(tensor)]] = (0, keep, block.num_experts)
        for _, _, tensor, dim in block.routing_tensors():
            found[names[id(tensor)]] = (dim, keep, block.num_experts)
    return found


def _parts(
    skeleton: Skeleton, stored: dict[str, StoredTensor], slices: dict[str, tuple[int, tuple[int, ...], int]]
) -> list[_Part]:
    """Every tensor of the new checkpoint, in the order of the model."""
    parts = []
    left_out = tied(skeleton.model) | set(skeleton.model._keys_to_ignore_on_save or ())
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
    for name, source in sorted(skeleton.sources.items(), key=lambda item: dot_natural_key(item[0])):
        if source.target in left_out:
            continue
        tensor = stored[name]
        dtype = tensor.dtype if skeleton.block is not None else skeleton.dtype_of(source.target)
        whole = (name, tensor.shape, ((0, tensor.size),))
        part = _sliced(name, source, tensor, *slices[source.target]) if source.target in slices else whole
        if part is None:
            continue
        renamed, shape, ranges = part
        if not source.converted and shape != shapes[source.target]:
            raise CheckpointError(
                f"{tensor.file}: {name!r} has shape {tensor.shape}, of which {shape} would be left; the pruned model's "
                f"{source.target} has {shapes[source.target]}"
            )
        parts.append(_Part(renamed, tensor, shape, dtype, ranges))
    return parts


def _sliced(
    name: str, source: Source, tensor: StoredTensor, dim: int, keep: tuple[int, ...], experts: int
) -> tuple[str, tuple[int, ...], tuple[tuple[int, int], ...]] | None:
    """Name, shape and bytes of what is left of a tensor that counts experts; None if nothing is."""
    if source.expert is not None:
        if source.expert >= experts:
            raise CheckpointError(f"{tensor.file}: {name!r} is of expert {source.expert} of {experts}")
        if source.expert not in keep:
            return None
        first, last = source.expert_at
        return f"{name[:first]}{keep.index(source.expert)}{name[last:]}", tensor.shape, ((0, tensor.size),)
    if len(tensor.shape) <= dim or tensor.shape[dim] != experts:
        raise CheckpointError(f"{tensor.file}: {name!r} has shape {tensor.shape}; expected {experts} in place {dim}")
    inner = math.prod(tensor.shape[dim + 1 :]) * tensor.dtype.itemsize
    ranges: list[tuple[int, int]] = []
    for outer in range(math.prod(tensor.shape[:dim])):
        for expert in keep:
            begin = (outer * experts + expert) * inner
            if ranges and ranges[-1][1] == begin:
                ranges[-1] = (ranges[-1][0], begin + inner)
            else:
                ranges.append((begin, begin + inner))
    return name, (*tensor.shape[:dim], len(keep), *tensor.shape[dim + 1 :]), tuple(ranges)


def _shards(parts: list[_Part], shard_size: int) -> dict[str, list[_Part]]:
    """The parts by file, in order."""
    groups: list[list[_Part]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + part.size > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{index:05d}-of-{count:05d}.safetensors": group for index, group in enumerate(groups, 1)}


def _fingerprint(
    checkpoint: str | Path, stored: dict[str, StoredTensor], plan: PruningPlan, shard_size: int, dtype: str
) -> str:
    """Tells jobs apart: the source's files as they are now, the plan and the form of the result."""
    files = {tensor.file for tensor in stored.values()} | {Path(checkpoint) / "config.json"}
    states = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    job = [__version__, str(Path(checkpoint).resolve()), states, plan.to_json(), shard_size, dtype]
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """The unfinished folder, made if need be, and nobody else in it."""
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise FileExistsError(f"{work} is in the way: it is no folder of an unfinished run")
    work.mkdir(exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(errno.EWOULDBLOCK, f"another process is writing {work}") from None
        yield
    finally:
        os.close(descriptor)


def _begin(work: Path, fingerprint: str, shards: dict[str, list[_Part]]) -> set[str]:
    """Shards that are there already; whatever else is there, of this job or another, goes."""
    try:
        same = json.loads((work / _PROGRESS).read_text())["job"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    # A shard takes its name once it is whole and on the disk.
    finished = {name for name in shards if same and (work / name).is_file() and not (work / name).is_symlink()}
    for path in work.iterdir():
        if path.name in finished or (same and path.name == _PROGRESS):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not same:
        with replace_file(work / _PROGRESS) as temporary:
            temporary.write_text(json.dumps({"job": fingerprint}))
    return finished


def _check_space(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"the result needs {needed / 1e9:.2f} GB, {work.parent} has {free / 1e9:.2f} GB")


def _write_shard(path: Path, parts: list[_Part], bar: Any) -> None:
    """A safetensors file: length and text of the header, then the tensors in its order."""
    # Larger elements first, as safetensors does: then every tensor is aligned to its elements.
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        offsets = [end, end := end + part.size]
        header[part.name] = {"dtype": _NAME_OF[part.dtype], "shape": part.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replace_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            _write_part(file, part)
            bar.update(part.size)


def _write_part(file: IO[bytes], part: _Part) -> None:
    with part.source.file.open("rb") as source:
        for begin, end in part.ranges:
            for start in range(begin, end, _WINDOW):
                stop = min(start + _WINDOW, end)
                with _mapped(source, part.source.offset + start, stop - start) as window:
                    if part.dtype != part.source.dtype:
                        values = torch.frombuffer(bytearray(window), dtype=part.source.dtype).to(part.dtype)
                        file.write(values.view(torch.uint8).numpy().data)
                    else:
                        file.write(window)


@contextmanager
def _mapped(file: IO[bytes], offset: int, length: int) -> Iterator[memoryview]:
    """A window of a file; unmapped on the way out, so that its pages count as this process's for no longer."""
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    with (
        mmap.mmap(file.fileno(), offset + length - begin, offset=begin, access=mmap.ACCESS_READ) as mapping,
        memoryview(mapping) as whole,
        whole[offset - begin :] as window,
    ):
        yield window


def _write_rest(checkpoint: Path, work: Path, skeleton: Skeleton, shards: dict[str, list[_Part]]) -> None:
    """Index, config, tokenizer and generation files."""
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": skeleton.model.num_parameters(),
                "total_size": sum(part.size for parts in shards.values() for part in parts),
            },
            "weight_map": {part.name: shard for shard, parts in shards.items() for part in parts},
        }
        (work / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model = skeleton.model
    model.config.dtype = str(skeleton.dtype).removeprefix("torch.")  # these two as save_pretrained
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(work)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(work)
    for pattern in _COPIED:
        for file in checkpoint.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, work / file.name)
