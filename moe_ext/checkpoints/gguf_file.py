"""A GGUF file, or the files of a split one, read from the headers alone by llama.cpp's own ``gguf`` package.

Nothing in a file is trusted: lengths, offsets and shapes are checked against its size before anything is done.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_ext.checkpoints.stored_tensors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place.

    Attributes:
        name: its name.
        file: the file that holds it.
        offset: its first byte there.
        shape: the slowest dimension first, as in torch; llama.cpp says it the other way round.
        kind: number of its type in ggml.
        block: numbers of the last dimension that are stored together.
        block_bytes: bytes of such a block.
    """

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    kind: int
    block: int
    block_bytes: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) // self.block * self.block_bytes


@dataclass(frozen=True)
class GgufField:
    """A field of the metadata: its value, the number of its type, and that of an array's elements."""

    value: Any
    kind: int
    element: int | None


@dataclass(frozen=True)
class GgufFile:
    """What one or several files hold.

    Attributes:
        files: in their order.
        fields: the metadata of the first, without what says how the tensors are shared out among files.
        tensors: by name, in the order of the files.
        big_endian: whether numbers are stored so.
    """

    files: tuple[Path, ...]
    fields: dict[str, GgufField]
    tensors: dict[str, GgufTensor]
    big_endian: bool

    @property
    def architecture(self) -> str:
        return str(self.value("general.architecture", str))

    def value(self, name: str, kind: type) -> Any:
        """A field's value.

        Raises:
            CheckpointError: there is none of this name and type.
        """
        field = self.fields.get(name)
        if field is None or not isinstance(field.value, kind) or isinstance(field.value, bool):
            held = "no such field" if field is None else repr(field.value)[:40]
            raise CheckpointError(f"{self.files[0]}: {name}: expected {kind.__name__}, got {held}")
        return field.value

    def own(self, name: str) -> str:
        """The full name of a field that the architecture has of its own."""
        return f"{self.architecture}.{name}"

    @property
    def layers(self) -> int:
        """Layers, those for multi-token prediction not counted: they follow the others."""
        count = self.value(self.own("block_count"), int)
        further = self.fields.get(self.own("nextn_predict_layers"))
        return int(count) - (int(further.value) if further is not None and isinstance(further.value, int) else 0)


def read_gguf(path: str | Path) -> GgufFile:
    """Reads the headers of a GGUF file; of a split one, those of all its files, of which any may be given.

    Raises:
        ImportError: the ``gguf`` package is not installed.
        FileNotFoundError: a file is not there.
        CheckpointError: a file is truncated or foreign, or the files do not belong together.
    """
    path = Path(path)
    fields, tensors, big_endian = _read(path)
    count = fields.get("split.count")
    files = [path]
    if count is not None and count.value not in (0, 1):
        files = _siblings(path, count.value)
        found: dict[str, GgufTensor] = {}
        for number, file in enumerate(files):
            part, held, order = _read(file)
            if any(part[name].value != value for name, value in (("split.no", number), ("split.count", count.value))
                   if name in part) or "split.no" not in part or order != big_endian:  # fmt: skip
                raise CheckpointError(f"{file}: does not say that it is file {number + 1} of {count.value}")
            if _alignment(part) != _alignment(fields):
                raise CheckpointError(f"{file}: does not name the alignment of the set, {_alignment(fields)}")
            if both := held.keys() & found.keys():
                raise CheckpointError(f"{file}: holds {min(both)!r}, which another file of the set holds, too")
            found |= held
            fields = part if number == 0 else fields
        total = fields.get("split.tensors.count")
        if total is None or total.value != len(found):
            raise CheckpointError(
                f"{files[0]}: names {None if total is None else total.value} tensors; the {len(files)} files hold "
                f"{len(found)}"
            )
        tensors = found
    fields = {name: field for name, field in fields.items() if not name.startswith("split.")}
    return GgufFile(tuple(files), fields, tensors, big_endian)


def _alignment(fields: dict[str, GgufField]) -> Any:
    held = fields.get("general.alignment")
    return 32 if held is None else held.value


def _siblings(path: Path, count: Any) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if match is None or type(count) is not int or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: is one of {str(count)[:20]} files; expected the name NAME-00001-of-{str(count)[:5]:0>5}.gguf"
        )
    files = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{path.name} belongs to {count} files, of which {file} is not there")
    return files


def _read(path: Path) -> tuple[dict[str, GgufField], dict[str, GgufTensor], bool]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        reader = _reader(path)
        fields = {
            name: GgufField(
                field.contents(), int(field.types[0]), int(field.types[-1]) if len(field.types) > 1 else None
            )
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        tensors = _tensors(path, reader)
        return fields, tensors, reader.endianess.name == "BIG"
    except ImportError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        message = str(error).strip("'\"")
        raise CheckpointError(f"{path}: no whole GGUF file: {message[:200] or type(error).__name__}") from None


def _reader(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("GGUF files are read with llama.cpp's package: pip install 'moe_ext[gguf]'") from error

    class Checked(GGUFReader):
        """Fails where a length leads beyond the file's end: the package takes what is there, and goes on."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            if len(found) != int(count):
                raise ValueError(f"truncated: ends before byte {offset + int(count) * found.itemsize:,}")
            return found

    return Checked(path)


def _tensors(path: Path, reader: "GGUFReader") -> dict[str, GgufTensor]:
    from gguf import GGML_QUANT_SIZES

    size, found, end = path.stat().st_size, {}, reader.data_offset
    for held in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        block, block_bytes = GGML_QUANT_SIZES[held.tensor_type]
        shape = tuple(int(number) for number in reversed(held.shape.tolist()))
        tensor = GgufTensor(
            held.name, path, int(held.data_offset), shape, int(held.tensor_type), int(block), int(block_bytes)
        )
        if not 1 <= len(shape) <= _MOST_DIMENSIONS or shape[-1] % tensor.block or math.prod(shape) == 0:
            raise CheckpointError(f"{path}: {held.name[:100]!r} has shape {shape}, in blocks of {tensor.block}")
        if tensor.offset < end or tensor.offset + tensor.size > size:
            raise CheckpointError(
                f"{path}: {held.name[:100]!r} lies in bytes {tensor.offset:,} to {tensor.offset + tensor.size:,}; "
                f"expected a place from {end:,} on, in {size:,} bytes"
            )
        end = tensor.offset + tensor.size
        found[held.name] = tensor
    if not found:
        raise CheckpointError(f"{path}: holds no tensors")
    return {held.name: found[held.name] for held in reader.tensors}
