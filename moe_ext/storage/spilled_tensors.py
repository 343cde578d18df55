"""A list of tensors of which a bounded part is in memory: the rest lies in an unnamed temporary file.

What a search keeps for every calibration token may exceed memory. The file is no result and has no name: the system
removes it when the process ends, however it ends. It is in Python's temporary folder (``TMPDIR``).
"""

from __future__ import annotations

import os
import tempfile
from io import FileIO
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes


class _InFile(NamedTuple):
    """Where a tensor lies."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class SpillingList:
    """Tensors on the CPU, in the order in which they were appended.

    Args:
        memory: bytes of tensors that are kept in memory; those appended beyond that go to the file.
        folder: an existing one for the file; Python's temporary folder if absent.
    """

    def __init__(self, memory: int, folder: str | os.PathLike[str] | None = None) -> None:
        self._memory, self._folder = memory, folder
        # One block for all: many that live long between the short-lived ones of a model would fragment the heap.
        self._block: Tensor | None = None
        self._used = 0
        self._entries: list[Tensor | _InFile] = []
        self._file: FileIO | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, tensor: Tensor) -> None:
        """Keeps a copy of a tensor of any device and dtype."""
        size = tensor.numel() * tensor.element_size()
        if self._used + size <= self._memory:
            if self._block is None:
                self._block = torch.empty(self._memory, dtype=torch.uint8)  # pages exist once they are written
            place = self._block[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
            self._entries.append(place.copy_(tensor.detach()))
            self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="moe_ext-", dir=self._folder, buffering=0)  # noqa: SIM115  closed by close()
        offset = self._file.seek(0, 2)
        self._entries.append(_InFile(offset, tensor.shape, tensor.dtype))
        self._write(offset, tensor)

    def __getitem__(self, index: int) -> Tensor:
        """The tensor; one from the file is the caller's own, one in memory is not."""
        entry = self._entries[index]
        if isinstance(entry, Tensor):
            return entry
        assert self._file is not None
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._file.seek(entry.offset)
        place = memoryview(_bytes_of(tensor))
        while len(place):
            read = self._file.readinto(place)
            if not read:
                raise OSError("the temporary file of a search ends where a tensor was written")
            place = place[read:]
        return tensor

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        """Replaces a tensor by one of the same shape and dtype."""
        entry = self._entries[index]
        if entry.shape != tensor.shape or entry.dtype != tensor.dtype:
            raise ValueError(
                f"tensor: is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"expected {entry.dtype} of shape {tuple(entry.shape)} like the one it replaces"
            )
        if isinstance(entry, Tensor):
            entry.copy_(tensor)
        else:
            self._write(entry.offset, tensor)

    def _write(self, offset: int, tensor: Tensor) -> None:
        assert self._file is not None
        content = memoryview(_bytes_of(tensor.detach().cpu().contiguous()))
        self._file.seek(offset)
        try:
            while len(content):
                content = content[self._file.write(content) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"a temporary file of {self._folder or tempfile.gettempdir()} could not be written: {error.strerror}"
                + ("; TMPDIR may name another folder" if self._folder is None else ""),
            ) from error

    def close(self) -> None:
        """Gives the memory and the file's space back."""
        self._entries.clear()
        self._block = None
        if self._file is not None:
            self._file.close()


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor, as a buffer."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
