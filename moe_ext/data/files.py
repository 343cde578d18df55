"""Rows of files on this machine, one after the other: memory does not grow with a file.

A text file is one row, and one of more than ``PIECE`` bytes several, cut at line ends. The other formats hold a row a
line (.jsonl), a row an entry (.json, which is read whole) or rows of a table (.parquet, .arrow).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from moe_ext.data.rows import Row, UnreadableRowError
from moe_ext.storage.formats import shortened

PIECE = 1 << 22
"""Bytes of a text file that are read at once."""

LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
IN_FOLDERS = (".txt", *LINES, *TABLES)
NO_ROWS = (
    *(".csv", ".tsv", ".feather", ".orc", ".avro", ".npy", ".npz", ".pt", ".pth", ".pkl", ".bin", ".safetensors"),
    *(".gguf", ".pdf", ".docx", ".xlsx", ".bz2", ".xz", ".zip", ".tar", ".tgz"),
)
NEEDS_DATA = "pip install 'moe_ext[data]'"


def kind_of(file: Path) -> str:
    """The suffix that says what a file holds, without that of a compression."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSED else suffix


def stem_of(file: Path) -> str:
    """A file's name without its suffixes for format and compression."""
    return Path(file.stem).stem if file.suffix.lower() in COMPRESSED else file.stem


def check_file(file: Path) -> None:
    """ValueError for a file in a format that is not read, or that takes a package that is not there."""
    kind = kind_of(file)
    if kind in NO_ROWS:
        raise ValueError(
            f"{file} is {kind[1:]}, which is not read; give text, .jsonl (.gz, .zst), .json, .parquet or .arrow"
        )
    if kind in TABLES:
        _arrow(file)
    if file.suffix.lower() == ".zst":
        _zstandard(file)


def rows_of(file: Path) -> Iterator[Row]:
    """The rows of a file.

    Raises:
        ValueError: another format, or a file that is damaged; says where.
        OSError: it cannot be read.
    """
    check_file(file)
    kind = kind_of(file)
    if kind == ".parquet":
        yield from _table(file, _parquet(file))
    elif kind == ".arrow":
        yield from _table(file, _arrow_batches(file))
    elif kind in LINES or kind == ".json":
        with closing(_opened(file)) as content:
            yield from _json_rows(file, content, array=kind == ".json")
    else:
        with closing(_opened(file)) as content:
            yield from _texts(file, content)


def _json_rows(file: Path, content: IO[bytes], *, array: bool) -> Iterator[Row]:
    if array and (entries := _entries(file, content)) is not None:
        for number, entry in enumerate(entries, 1):
            yield Row(entry if isinstance(entry, Mapping) else _no_object(entry), str(file), "entry", number)
        return
    number = 0
    lines = iter(content)
    while True:
        number += 1
        try:
            line = next(lines, None)
        except _DAMAGE as error:
            raise ValueError(f"{file}, line {number}: the compressed file is damaged ({error})") from None
        if line is None:
            return
        if line.strip():
            yield Row(_parsed(line), str(file), "line", number)


def _entries(file: Path, content: IO[bytes]) -> list[Any] | None:
    """Of a file that holds one JSON list; None for one with an object a line, as many are named .json."""
    try:
        whole = content.read()
        if not whole.lstrip().startswith(b"["):
            content.seek(0)
            return None
        entries = json.loads(whole)
    except (*_DAMAGE, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: truncated, or not JSON ({shortened(str(error), 200)})") from None
    return list(entries)


def _parsed(line: bytes) -> Mapping[str, Any] | UnreadableRowError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return UnreadableRowError(f"truncated, or not JSON ({shortened(str(error), 200)})")
    return value if isinstance(value, Mapping) else _no_object(value)


def _no_object(value: object) -> UnreadableRowError:
    return UnreadableRowError(f"holds {type(value).__name__}; expected a JSON object")


def _texts(file: Path, content: IO[bytes]) -> Iterator[Row]:
    """A text in pieces, each but the last ending with a line where it has one."""
    rest, number = b"", 0
    while True:
        try:
            more = content.read(PIECE)
        except _DAMAGE as error:
            raise ValueError(f"{file}: the compressed file is damaged ({error})") from None
        whole, last = rest + more, len(more) < PIECE
        cut = len(whole) if last else (whole.rfind(b"\n") + 1 or _whole_characters(whole))
        piece, rest = whole[:cut], whole[cut:]
        if piece or (last and number == 0):
            number += 1
            try:
                text = piece.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text: {error}") from None
            yield Row(text, str(file), "" if last and number == 1 else "piece", number)
        if last:
            return


def _whole_characters(text: bytes) -> int:
    """Bytes before the last character, which may not be whole."""
    end = len(text) - 1
    while end > max(0, len(text) - 4) and text[end] & 0xC0 == 0x80:
        end -= 1
    return end


_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)


def _opened(file: Path) -> Any:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")
    if file.suffix.lower() == ".zst":
        return _ZstandardLines(file)
    return file.open("rb")


class _ZstandardLines:
    """A .zst file; unlike zstandard's own reader it says when the last frame is not whole."""

    def __init__(self, file: Path) -> None:
        self._zstandard = _zstandard(file)
        self._file = file.open("rb")
        self._rest = b""
        self._frames = self._decompressed()

    def _decompressed(self) -> Iterator[bytes]:
        inside, left = None, b""
        while True:
            more = left or self._file.read(1 << 16)
            if not more:
                if inside is not None:
                    raise EOFError("it ends within a frame")
                return
            inside = inside or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                content = inside.decompress(more)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            left = b""
            if inside.eof:
                left, inside = inside.unused_data, None
            yield content

    def read(self, size: int = -1) -> bytes:
        parts, length = [self._rest], len(self._rest)
        while size < 0 or length < size:
            part = next(self._frames, None)
            if part is None:
                break
            parts.append(part)
            length += len(part)
        whole = b"".join(parts)
        end = len(whole) if size < 0 else size
        self._rest = whole[end:]
        return whole[:end]

    def __iter__(self) -> Iterator[bytes]:
        pending: list[bytes] = [self._rest]
        self._rest = b""
        for part in self._frames:
            first, *others = part.split(b"\n")
            pending.append(first)
            for line in others:
                yield b"".join(pending) + b"\n"
                pending = [line]
        if last := b"".join(pending):
            yield last

    def seek(self, position: int) -> None:
        self._file.seek(position)
        self._rest, self._frames = b"", self._decompressed()

    def close(self) -> None:
        self._file.close()


def _table(file: Path, batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    while True:
        try:
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        except (OSError, ValueError) as error:  # ArrowInvalid is one
            message = shortened(str(error), 200)
            raise ValueError(f"{file}: damaged after row {number}, or not what its name says ({message})") from None
        if rows is None:
            return
        for row in rows:
            number += 1
            yield Row(row, str(file), "row", number)


_ROWS = 256  # that are turned into Python objects at once


def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as content:
        yield from content.iter_batches(_ROWS)


def _arrow_batches(file: Path) -> Iterator[Any]:
    """Of a stream, as `datasets` writes it, or of a file with a footer."""
    arrow = _arrow(file)
    with arrow.memory_map(str(file)) as mapped:
        try:
            reader = arrow.ipc.open_file(mapped)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        except arrow.ArrowInvalid:
            mapped.seek(0)
            batches = iter(arrow.ipc.open_stream(mapped))
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                yield batch.slice(start, _ROWS)


def _arrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{file} takes pyarrow: {NEEDS_DATA}") from None
    return pyarrow


def _zstandard(file: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{file} takes zstandard: {NEEDS_DATA}") from None
    return zstandard
