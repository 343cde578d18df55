"""What waits between decoder layers of which one is in memory: every batch's hidden states before the next layer, in
the frames of its forward pass, in a temporary file, or in files that are mapped into memory and outlive the process.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.runtime.course import Course
from moe_ext.storage.files import allocate, flush_to_disk, locked_file
from moe_ext.storage.spilled_tensors import SpillingList

MEMORY = 128 << 20
"""Bytes of hidden states that are kept in memory; more go to a temporary file."""


class HiddenStates(Protocol):
    """What every batch's hidden states are before a decoder layer; of the layer after it once ``turn`` is called.

    ``close`` gives memory back; ``remove``, once they are needed no more, also files that another process could read.
    """

    def read(self, batch: int) -> Tensor: ...
    def write(self, batch: int, states: Tensor) -> None: ...
    def turn(self) -> None: ...
    def close(self) -> None: ...
    def remove(self) -> None: ...


class SpillingStates:
    """Hidden states of which a bounded part is in memory; written in place."""

    def __init__(self, memory: int) -> None:
        self._list = SpillingList(memory)

    def read(self, batch: int) -> Tensor:
        return self._list[batch]

    def write(self, batch: int, states: Tensor) -> None:
        if batch == len(self._list):
            self._list.append(states)
        else:
            self._list[batch] = states

    def turn(self) -> None:
        pass

    def close(self) -> None:
        self._list.close()

    def remove(self) -> None:
        self.close()


class ParkedStates:
    """Hidden states that wait in the frames of suspended forward passes. On the CPU those of the first batches stay
    where the model has them, up to a number of bytes. The others give their memory up until they are restored: what
    was in it is in a list on the CPU, of which as many bytes are in memory and the rest in a temporary file.
    """

    def __init__(self, memory: int) -> None:
        self._memory, self._in_place = memory, dict[int, int]()
        self._list: SpillingList | None = None
        self._slots: dict[tuple[int, int], int] = {}  # by batch, and place among its tensors
        self._parked: dict[int, list[tuple[Tensor, int]]] = {}

    def park(self, batch: int, tensors: Sequence[Tensor]) -> None:
        """Takes tensors of a batch, none of which is read before :meth:`restore`."""
        self._in_place.pop(batch, None)
        whole = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if _is_whole(tensor)}
        size = sum(tensor.nbytes for tensor in whole.values())
        on_cpu = all(tensor.device.type == "cpu" for tensor in whole.values())
        if on_cpu and sum(self._in_place.values()) + size <= self._memory:
            self._in_place[batch] = size
            return
        self._parked[batch] = []
        for place, tensor in enumerate(whole.values()):
            slot = self._written(batch, place, tensor)
            self._parked[batch].append((tensor, slot))
            tensor.untyped_storage().resize_(0)

    def restore(self, batch: int) -> None:
        """Gives a batch's tensors their content back."""
        for tensor, slot in self._parked.pop(batch, []):
            tensor.untyped_storage().resize_(tensor.nbytes)
            tensor.copy_(self._content(slot))

    def read(self, batch: int, tensor: Tensor) -> Tensor:
        """What a tensor of a batch holds; to be read only."""
        for parked, slot in self._parked.get(batch, []):
            if parked.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                return self._content(slot).view(tensor.shape)
        return tensor

    def close(self) -> None:
        for batch in list(self._parked):
            self._parked.pop(batch)
        if self._list is not None:
            self._list.close()

    def remove(self) -> None:
        self.close()

    def _content(self, slot: int) -> Tensor:
        assert self._list is not None
        return self._list[slot]

    def _written(self, batch: int, place: int, tensor: Tensor) -> int:
        """The slot of the list that has a tensor's content now."""
        if tensor.device.type == "cpu":
            tensor = tensor.clone()  # numpy, which writes the file, would hold its memory for good
        if self._list is None:
            self._list = SpillingList(0 if tensor.device.type == "cpu" else self._memory)
        slot = self._slots.get((batch, place))
        if slot is not None and (before := self._list[slot]).shape == tensor.shape and before.dtype == tensor.dtype:
            self._list[slot] = tensor
        else:
            slot = len(self._list)
            self._list.append(tensor)
            self._slots[batch, place] = slot
        return slot


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that its memory holds, and may give it up."""
    storage = tensor.untyped_storage()
    return tensor.is_contiguous() and storage.nbytes() == tensor.nbytes > 0 and storage.resizable()


_ALIGNMENT = mmap.PAGESIZE  # a batch begins on a page of its own


@dataclass(frozen=True)
class FolderOptions:
    """How :func:`moe_ext.calibrate` and :func:`moe_ext.search` go through a checkpoint folder.

    Attributes:
        dtype: "auto" (as ``from_pretrained`` would choose it), "float32", "bfloat16" or "float16".
        device: where a layer computes.
        scratch: an existing folder for the hidden states of all batches, twice (before and after a layer), in mapped
            files; without one they are in memory, once. Refused where a model's layers are given more than hidden
            states (:class:`moe_ext.runtime.course.Course`).
        resume: a file that every finished layer is added to; yours to remove once the result is saved (a search's is
            its result). If it is there already, from a run that was interrupted, that run goes on. With ``scratch`` at
            the layer that it had come to; without, the finished layers run again, but are not observed.
        read_ahead: whether the next layer is read while one computes.
        trust_remote_code: as for :func:`moe_ext.from_pretrained`.
    """

    dtype: str = "auto"
    device: str = "cpu"
    scratch: str | os.PathLike[str] | None = None
    resume: str | os.PathLike[str] | None = None
    read_ahead: bool = True
    trust_remote_code: bool = False

    @classmethod
    def given(cls, **options: Any) -> FolderOptions:
        """The options that are not None; those that are keep their default."""
        return cls(**{name: value for name, value in options.items() if value is not None})

    def opened(self, folder: str | os.PathLike[str]) -> LayersOnDisk:
        """The folder's model, a decoder layer at a time."""
        return LayersOnDisk(
            Path(folder),
            dtype=self.dtype,
            device=self.device,
            read_ahead=self.read_ahead,
            trust_remote_code=self.trust_remote_code,
        )

    @staticmethod
    def refuse(**options: Any) -> None:
        """TypeError if one is given, for a model that is in memory."""
        for name, value in options.items():
            if value is not None:
                raise TypeError(f"{name}: is for a checkpoint folder; this model is in memory")


def states_of(course: Course, memory: int) -> SpillingStates | ParkedStates:
    """Hidden states of which so many bytes are in memory: alone, or in forward passes where they are not all."""
    return SpillingStates(memory) if course.obstacle is None else ParkedStates(memory)


def _sizes(course: Course, batches: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """Bytes that every batch takes between layers."""
    size = course.token_bytes if course.obstacle is None else course.waiting_bytes
    return [-(-batch["input_ids"].numel() * size // _ALIGNMENT) * _ALIGNMENT for batch in batches]


class MappedStates:
    """Hidden states in two mapped files in turn: those before a layer stay until those after it are all there.

    Args:
        folder: where the files are.
        name: what their names begin with.
        sizes: bytes of every batch.
        reached: decoder layer that the states may be before, or before an earlier one: the last whose file is there.
        hold: whether the states before a layer stay, once those after it are there, until :meth:`forget_earlier`.

    Raises:
        BlockingIOError: another process has hidden states of that name in the folder.
    """

    def __init__(self, folder: Path, name: str, sizes: Sequence[int], reached: int, *, hold: bool) -> None:
        self._folder, self._name, self._hold = folder, name, hold
        try:
            self._unlock = weakref.finalize(self, os.close, locked_file(self._lock_file))
        except BlockingIOError:
            message = f"scratch: another process is doing the same job in {folder}"
            raise BlockingIOError(errno.EWOULDBLOCK, message) from None
        self._sizes = list(sizes)
        self._layer = self._latest(reached)  # only now: before, another process may remove what is there
        self._offsets = [sum(self._sizes[:batch]) for batch in range(len(self._sizes))]
        self._shapes: dict[int, tuple[torch.Size, torch.dtype]] = {}
        self._before = self._opened(self._layer) if self._layer else None
        self._after: mmap.mmap | None = None

    @property
    def layer(self) -> int:
        """The decoder layer that the states are before; 0, the first, if there are none yet."""
        return self._layer

    def _latest(self, reached: int) -> int:
        for earlier in range(reached, 0, -1):
            file = self._file(earlier)
            if file.is_file() and file.stat().st_size == sum(self._sizes):
                return earlier
        return 0

    def read(self, batch: int) -> Tensor:
        assert self._before is not None
        start, (shape, dtype) = self._offsets[batch], self._shapes[batch]
        states = torch.empty(shape, dtype=dtype)  # a copy: products round differently where memory is not aligned alike
        content = memoryview(self._before)[start : start + shape.numel() * dtype.itemsize]
        _bytes_of(states)[:] = content
        content.release()
        self._before.madvise(mmap.MADV_DONTNEED, start, self._sizes[batch])  # the file keeps it
        return states

    def write(self, batch: int, states: Tensor) -> None:
        if self._after is None:
            with self._file(self._layer + 1, ".part").open("wb") as file:
                try:
                    allocate(file, sum(self._sizes))
                except OSError as error:
                    raise OSError(
                        error.errno,
                        f"scratch: {self._folder} has no room for {sum(self._sizes) / 1e9:.2f} GB of hidden states: "
                        f"{error.strerror}",
                    ) from error
            self._after = self._opened(self._layer + 1, ".part")
        size = states.numel() * states.element_size()
        if size > self._sizes[batch]:
            raise ValueError(f"batch {batch}: hidden states take {size} bytes; expected {self._sizes[batch]} at most")
        start = self._offsets[batch]
        self._after[start : start + size] = _bytes_of(states.detach().cpu().contiguous())
        self._after.madvise(mmap.MADV_DONTNEED, start, self._sizes[batch])  # the file keeps it
        self._shapes[batch] = (states.shape, states.dtype)

    def shape_as(self, batches: Sequence[Mapping[str, Tensor]], course: Course) -> None:
        """For states that an earlier process wrote: (B, S, ...) of every batch."""
        self._shapes = {
            batch: (torch.Size([*inputs["input_ids"].shape, *course.token_shape]), course.dtype)
            for batch, inputs in enumerate(batches)
        }

    def turn(self) -> None:
        """What was written is what is read from now on; the layer's own input goes."""
        if self._after is None:
            return
        self._after.flush()
        done = self._file(self._layer + 1)
        self._file(self._layer + 1, ".part").replace(done)
        flush_to_disk(self._folder)
        if self._before is not None:
            self._before.close()
        self._before, self._after = self._after, None
        self._layer += 1
        if not self._hold:
            self.forget_earlier()

    def forget_earlier(self) -> None:
        """Removes the files of layers before the one that is next, once it is known that they are done."""
        for file in self._folder.glob(f"{self._name}-*.states*"):
            if file not in (self._file(self._layer), self._lock_file):
                file.unlink()

    def remove(self) -> None:
        remove_states(self._folder, self._name)
        self.close()

    def close(self) -> None:
        for mapping in (self._before, self._after):
            if mapping is not None:
                mapping.close()
        self._before = self._after = None
        if self._unlock.alive and self._layer == 0:
            remove_states(self._folder, self._name)  # nothing that a later run could go on with
        self._unlock()

    @property
    def _lock_file(self) -> Path:
        return self._folder / f"{self._name}-0.states.lock"

    def _file(self, layer: int, suffix: str = "") -> Path:
        return self._folder / f"{self._name}-{layer}.states{suffix}"

    def _opened(self, layer: int, suffix: str = "") -> mmap.mmap:
        with self._file(layer, suffix).open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)


def remove_states(folder: Path, name: str) -> None:
    """Removes the files of :class:`MappedStates` of that name."""
    for file in folder.glob(f"{name}-*.states*"):
        file.unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def waiting_states(
    course: Course,
    batches: Sequence[Mapping[str, Tensor]],
    scratch: str | os.PathLike[str] | None,
    job: str,
    reached: int,
    *,
    hold: bool,
    show: bool,
) -> tuple[HiddenStates | ParkedStates, int]:
    """Where the hidden states of a run wait, and the decoder layer that it begins with.

    Args:
        course: of the model's forward pass over the batches.
        scratch: folder for them; None: they are in memory.
        job: digest of the run: states of another one are not taken.
        reached: decoder layer at which the run may go on, if the states before it, or before an earlier one, are there.
        hold: as for :class:`MappedStates`.
        show: whether to say how much room they take.

    Raises:
        ValueError: a scratch folder for hidden states that do not tell all that a layer is given.
        MemoryError: they do not fit into memory.
        OSError: they do not fit onto the disk, or the folder is not there.
    """
    sizes = _sizes(course, batches)
    name = f"moe_ext-{job[:16]}"
    if scratch is not None and sum(sizes) == 0:
        remove_states(Path(scratch), name)  # of a run that was interrupted once it needed them no more
    size = f"hidden states of {len(batches)} batches: {sum(sizes) / 1e9:.2f} GB"
    if scratch is None or sum(sizes) == 0:
        _check_memory(sum(sizes))
        if show:
            tqdm.write(f"{size} in memory", file=sys.stderr)
        return states_of(course, sum(sizes)), 0
    course.refuse_obstacles("scratch", "leave it out, and give fewer tokens if they do not fit into memory")
    folder = Path(scratch)
    if not folder.is_dir():
        raise FileNotFoundError(f"scratch: the folder {folder} does not exist")
    _check_disk(folder, name, 2 * sum(sizes))
    if show:
        tqdm.write(f"{size} in {folder}, twice", file=sys.stderr)
    mapped = MappedStates(folder, name, sizes, reached, hold=hold)
    mapped.shape_as(batches, course)
    return mapped, mapped.layer


def room_for_all(
    course: Course,
    batches: Sequence[Mapping[str, Tensor]],
    scratch: str | os.PathLike[str] | None,
    *,
    show: bool,
) -> int:
    """Bytes of memory for a run that keeps every batch's hidden states before all layers: enough, or with a scratch
    folder what does no harm, the rest in an unnamed file there.

    Args:
        course: of the model's forward pass over the batches.
        show: whether to say how much room they take.

    Raises:
        MemoryError, OSError: as :func:`waiting_states`.
    """
    needed = (len(course.calls) + 1) * sum(_sizes(course, batches))
    size = f"hidden states of {len(batches)} batches, of all layers: {needed / 1e9:.2f} GB"
    if scratch is None:
        _check_memory(needed)
        where, memory = "in memory", needed
    else:
        if not Path(scratch).is_dir():
            raise FileNotFoundError(f"scratch: the folder {scratch} does not exist")
        _check_disk(Path(scratch), "moe_ext", needed)
        where, memory = f"in {scratch}", min(MEMORY, needed)
    if show:
        tqdm.write(f"{size} {where}", file=sys.stderr)
    return memory


def _check_memory(needed: int) -> None:
    available = psutil.virtual_memory().available
    if needed > available:
        raise MemoryError(
            f"the hidden states of all batches take {needed / 1e9:.2f} GB, {available / 1e9:.2f} GB of memory are "
            "free: give a scratch folder, or less text"
        )


def _check_disk(folder: Path, name: str, needed: int) -> None:
    own = 0
    for file in folder.glob(f"{name}-*.states*"):
        with suppress(FileNotFoundError):  # another process with the same job has just ended
            own += file.stat().st_blocks * 512
    free = shutil.disk_usage(folder).free + own
    if needed > free:
        raise OSError(
            f"scratch: the hidden states of all batches take {needed / 1e9:.2f} GB; {folder} has {free / 1e9:.2f} GB"
        )
