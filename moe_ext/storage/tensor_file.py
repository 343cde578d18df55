"""Writes a safetensors file that depends on its content alone: the library orders metadata anew in every process."""

import json
import os
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from moe_ext.storage.files import replace_file


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and metadata; ``path`` is replaced whole or left as it was.

    Raises:
        OSError: the file cannot be written.
    """
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors after it stay aligned
    with replace_file(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
