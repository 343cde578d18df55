"""What lies in a checkpoint folder, read from the headers alone: every tensor's file, type, shape and place in it.

Nothing in a folder is trusted: an index may name files elsewhere, a file may be cut short, two files may hold the same
tensor. All of that is found here, before anything is read or written, also for models that transformers loads.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_ext.storage.formats import FileFormatError, parse_json, shown
from moe_ext.storage.tensor_file import read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# safetensors' names of element types that torch has, too.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WINDOW = 16 << 20  # bytes compared at a time


class CheckpointError(FileFormatError):
    """A checkpoint folder's weight files are not whole, or not what its index says."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: its key.
        file: the safetensors file.
        dtype: its element type.
        shape: its shape.
        offset: its first byte in the file.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are stored alike: type, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for left in range(one.size, 0, -_WINDOW):
            if first.read(min(left, _WINDOW)) != second.read(min(left, _WINDOW)):
                return False
    return True


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name, in the order of the files: those that transformers loads.

    What a shard holds counts even if the index does not name it; what the index names and no shard holds is ignored,
    with a warning.

    Raises:
        FileNotFoundError: no folder, no safetensors weights in it, or a shard that its index names is not there.
        CheckpointError: a file is truncated or foreign; the index names a file outside the folder, or puts a tensor
            into another shard than the one that holds it; two shards hold the same tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {folder}")
    if (folder / SINGLE).is_file():
        return stored_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}: other formats are not read")
    weight_map = _read_index(folder / INDEX)
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / INDEX} names {shard}, which is not there")
        for tensor in _read_header(folder / shard):
            if tensor.name in found:
                raise CheckpointError(f"{tensor.name!r} lies in both {found[tensor.name].file.name} and {shard}")
            if weight_map.get(tensor.name, shard) != shard:
                raise CheckpointError(
                    f"{shard} holds {tensor.name!r}, which {INDEX} puts into {weight_map[tensor.name]}"
                )
            found[tensor.name] = tensor
    if ghosts := sorted(weight_map.keys() - found.keys()):
        warnings.warn(
            f"{folder / INDEX} names {len(ghosts)} tensors that no shard holds, such as {ghosts[0][:100]!r}: ignored",
            stacklevel=2,
        )
    return found


def stored_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name; CheckpointError as for :func:`stored_tensors`."""
    return {tensor.name: tensor for tensor in _read_header(path)}


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no 'weight_map' of tensors to files")
    for name, shard in weight_map.items():
        # A plain name: no folder before it, in either system's writing.
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or set(shard) & set("/\\:\0")
            or len(shard) > 255
        ):
            raise CheckpointError(
                f"{path}: puts {shown(name)} into {shown(shard)}; expected a *.safetensors file of the folder"
            )
    return weight_map


def _read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file in the order of their bytes, which fill the file."""
    size = path.stat().st_size
    try:
        header, begin = read_header(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    header.pop("__metadata__", None)
    tensors = sorted(
        (_parse_entry(path, name, entry, begin) for name, entry in header.items()), key=lambda item: item.offset
    )
    end = begin
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(f"{path}: {shown(tensor.name)} begins at byte {tensor.offset}; expected {end}")
        end += tensor.size
    if end != size:
        raise CheckpointError(f"{path}: truncated or overlong: has {size} bytes, its header describes {end}")
    return tensors


def _parse_entry(path: Path, name: str, entry: Any, begin: int) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    lists = [value for value in (shape, offsets) if isinstance(value, list)]
    if len(lists) != 2 or any(type(number) is not int or number < 0 for numbers in lists for number in numbers):
        raise CheckpointError(f"{path}: {shown(name)} has no valid shape and data_offsets in the header")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {shown(name)} has the unknown element type {shown(dtype)}")
    tensor = StoredTensor(name, path, DTYPES[dtype], tuple(lists[0]), begin + (lists[1] or [0])[0])
    if len(lists[1]) != 2 or lists[1][1] - lists[1][0] != tensor.size:
        raise CheckpointError(
            f"{path}: {shown(name)} has data_offsets {shown(lists[1])}; expected {shown(tensor.size)} bytes"
        )
    return tensor
