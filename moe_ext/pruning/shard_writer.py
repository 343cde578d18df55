"""Writes safetensors files whose tensors are byte ranges of other files, through windows of bounded size."""

import errno
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from moe_ext.checkpoints.finite import is_finite
from moe_ext.checkpoints.stored_tensors import DTYPES, StoredTensor
from moe_ext.storage.files import replace_file

_WINDOW = 64 << 20  # bytes mapped at a time
# What os.copy_file_range answers between or on file systems that do not offer it.
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows, or columns, of a matrix that is stored.

    Attributes:
        begin, end: bytes of the source tensor, from and to.
        columns: elements of a row.
        kept: ascending indices, int64.
        dim: what they are of: 0 rows, 1 columns.
    """

    begin: int
    end: int
    columns: int
    kept: Tensor
    dim: int


Made = Callable[[], Iterator[tuple[str, int, Tensor]]]


@dataclass(frozen=True)
class Part:
    """A tensor to write: slices of one that is stored.

    Attributes:
        ranges: bytes of the source tensor, from and to, that are written one after the other.
        selections: what is written instead, if there are any.
        content: what is written instead of all of these, if it is given.
        made: what computes the tensor instead, and perhaps others beside it: an iterator over names of parts, places in
            them in bytes, and what is written there. Called once for all parts of a file that have it.
    """

    name: str
    source: StoredTensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    ranges: tuple[tuple[int, int], ...]
    selections: tuple[Selection, ...] = ()
    content: bytes | None = None
    made: Made | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards_of(parts: list[Part], shard_size: int) -> dict[str, list[Part]]:
    """The parts by file, in order, as ``save_pretrained`` shares tensors out."""
    by_name = {part.name: part for part in parts}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda part: part.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    return {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}


def write_shard(path: Path, parts: list[Part], bar: Any) -> list[str]:
    """A safetensors file: length and text of the header, then the tensors in its order. Returns the names of those that
    hold a number which is not finite."""
    strange: list[str] = []
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
        places = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in (part.name for part in parts)}
        made = set()
        for part in parts:
            if part.made is None:
                file.seek(places[part.name])
                if not write_part(file, part):
                    strange.append(part.name)
            elif part.made not in made:
                made.add(part.made)
                for name, begin, tensor in part.made():
                    if name in places:  # else it is in another file, whose turn comes
                        file.seek(places[name] + begin)
                        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            bar.update(part.size)
    return strange


def write_part(file: IO[bytes], part: Part) -> bool:
    """Writes a part at the end of a file; returns whether all numbers are finite."""
    if part.content is not None:
        file.write(part.content)
        return True
    finite = True
    with part.source.file.open("rb") as source:
        for selection in part.selections:
            finite = _write_selection(file, source, part, selection) and finite
        for begin, end in () if part.selections else part.ranges:
            for start in range(begin, end, _WINDOW):
                stop = min(start + _WINDOW, end)
                at, length = part.source.offset + start, stop - start
                copied = part.dtype == part.source.dtype and _copied(source, file, at, length)
                with _mapped(source, at, length) as window:
                    finite = finite and is_finite(torch.frombuffer(window, dtype=part.source.dtype))
                    if copied:
                        continue
                    if part.dtype != part.source.dtype:
                        values = torch.frombuffer(bytearray(window), dtype=part.source.dtype).to(part.dtype)
                        file.write(values.view(torch.uint8).numpy().data)
                    else:
                        file.write(window)
    return finite


def _write_selection(file: IO[bytes], source: IO[bytes], part: Part, selection: Selection) -> bool:
    """Whether all numbers that were written are finite."""
    finite = True
    row = selection.columns * part.source.dtype.itemsize
    rows = max(1, _WINDOW // row)
    for first in range(0, (selection.end - selection.begin) // row, rows):
        start = selection.begin + first * row
        length = min(rows * row, selection.end - start)
        with _mapped(source, part.source.offset + start, length) as window:
            # As whole numbers of their size: torch selects among all types of those.
            matrix = torch.frombuffer(window, dtype=_SAME_SIZE[row // selection.columns]).view(-1, selection.columns)
            kept = selection.kept
            if selection.dim == 0:
                kept = kept[(kept >= first) & (kept < first + matrix.shape[0])] - first
            values = matrix.index_select(selection.dim, kept).view(part.source.dtype)
            del matrix  # a view of the window
        finite = finite and is_finite(values.view(-1))
        file.write(values.to(part.dtype).view(-1).view(torch.uint8).numpy().data)
    return finite


def _copied(source: IO[bytes], file: IO[bytes], offset: int, length: int) -> bool:
    """Whether the system copied those bytes to the end of the file by itself, without this process's memory; all or
    none of them, so that the caller can write what a system or file system without that leaves to it."""
    if not hasattr(os, "copy_file_range"):
        return False
    file.flush()
    begin = file.tell()
    try:
        while length > 0:
            count = os.copy_file_range(source.fileno(), file.fileno(), length, offset)
            if count == 0:
                break  # /proc and some network file systems: nothing copied, and no error
            offset, length = offset + count, length - count
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
    if length > 0:
        file.seek(begin)
        return False
    file.seek(0, os.SEEK_CUR)  # the file object learns where the descriptor stands
    return True


@contextmanager
def _mapped(file: IO[bytes], offset: int, length: int) -> Iterator[memoryview]:
    """A window of a file; unmapped on the way out, so that its pages count as this process's for no longer. Torch wants
    it writable; the file would not change."""
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    with (
        mmap.mmap(file.fileno(), offset + length - begin, offset=begin, access=mmap.ACCESS_COPY) as mapping,
        memoryview(mapping) as whole,
        whole[offset - begin :] as window,
    ):
        yield window
