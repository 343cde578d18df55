"""Writes a safetensors file that depends on its content alone: the library orders metadata anew in every process. Reads
one strictly: the library takes the last of two tensors with one name.
"""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_ext.storage.files import replace_file
from moe_ext.storage.formats import Format, check_label, parse_json, shortened

_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and metadata; ``path`` is replaced whole or left as it was.

    Raises:
        ValueError: metadata that UTF-8 cannot hold.
        OSError: the file cannot be written.
    """
    for name, value in metadata.items():
        check_label(name, value)
    content = safetensors.torch.save(_apart(tensors), dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors after it stay aligned
    with replace_file(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, and copied where two lie in one memory, which safetensors refuses."""
    apart, taken = {}, set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        memory = whole.untyped_storage().data_ptr()
        apart[name] = whole.clone() if memory in taken else whole
        taken.add(memory)
    return apart


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and the bytes before the tensors.

    Raises:
        ValueError: the file is truncated or foreign, or names a tensor twice.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode) and not Path(path).is_dir():  # a folder has an error of its own
        raise ValueError("is no regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError("truncated, or not a safetensors file")
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise ValueError(f"truncated, or not a safetensors file (its header: {error})") from None
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file (its header is no JSON object)")
    return header, 8 + length


def read_tensors(path: str | os.PathLike[str], format: Format) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file of one of the package's formats, apart from the file.

    Raises:
        ValueError: the file is truncated or foreign, of another format or version, or names a tensor twice.
        OSError: it cannot be read.
    """
    header, _ = read_header(path)
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        metadata = {}
    found = format.check_metadata(metadata)
    try:
        with safe_open(path, framework="pt") as file:
            # Clones: the originals are views of the mapped file.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, found  # noqa: SIM118  no dict
    except OSError:
        raise
    except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # Beside its own error whatever torch says of an element type or a size that it does not have.
        raise ValueError(shortened(f"truncated, or not a safetensors file ({error})", 300)) from error
