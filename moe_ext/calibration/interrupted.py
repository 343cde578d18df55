"""Where a calibration of a model in memory is: a file that is written every few minutes and when Ctrl-C stops the run,
so that the same call goes on after the last batch and ends with the same statistics.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError, safe_open

from moe_ext.calibration.observer import Observer
from moe_ext.storage.digests import TextDigest
from moe_ext.storage.files import file_destination
from moe_ext.storage.tensor_file import write_tensors


class BatchProgress:
    """The sums after so many batches, in a file.

    Args:
        path: the file; None: nothing is written or read.
        job: what the sums depend on beside the text.
        minutes: between two times that it is written.

    Raises:
        ValueError: the file is of another run.
    """

    def __init__(self, path: str | os.PathLike[str] | None, job: str, minutes: float) -> None:
        self._path = None if path is None else file_destination(path)
        self._job, self._seconds = job, minutes * 60
        self._text = TextDigest()
        self._expected, self.done = "", 0
        if self._path is not None and self._path.exists():
            self.done, self._expected = self._read(self._path)
        self._written = time.monotonic()

    @property
    def is_kept(self) -> bool:
        """Whether there is a file."""
        return self._path is not None

    def is_done(self, index: int, batch: Mapping[str, Any], observers: Sequence[Observer]) -> bool:
        """Whether a batch's sums are in the file; they are given to the observers with the last that are.

        Raises:
            ValueError: the batches so far are not those that the file is of.
        """
        if self._path is None:
            return False
        self._text.add(batch)
        if index + 1 == self.done:
            self._check(self._text.hexdigest() == self._expected)
            with safe_open(self._path, framework="pt") as file:
                for layer, observer in enumerate(observers):
                    names = [name for name in file.keys() if name.startswith(f"{layer}.")]  # noqa: SIM118
                    observer.restore({name.partition(".")[2]: file.get_tensor(name) for name in names})
        return index < self.done

    def finished(self, count: int) -> None:
        """Checks that there were at least as many batches as the file holds."""
        self._check(count >= self.done)

    def after(self, index: int, observers: Sequence[Observer], stop: bool) -> None:
        """Writes the file if it is time.

        Raises:
            KeyboardInterrupt: if ``stop``; says what goes on from where.
        """
        if self._path is None or (not stop and time.monotonic() - self._written < self._seconds):
            return
        sums = {
            f"{layer}.{name}": tensor
            for layer, observer in enumerate(observers)
            for name, tensor in observer.sums().items()
        }
        write_tensors(
            self._path,
            {name: tensor.cpu().contiguous() for name, tensor in sums.items()},
            {"job": self._job, "batches": str(index + 1), "text": self._text.hexdigest()},
        )
        self._written = time.monotonic()
        if stop:
            raise KeyboardInterrupt(
                f"interrupted after {index + 1} batches, which are in {self._path}: the same call goes on from there"
            )

    def _read(self, path: Path) -> tuple[int, str]:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"resume: {path} is no file of an interrupted calibration ({error})") from None
        self._check(metadata.get("job") == self._job)
        return int(metadata["batches"]), metadata["text"]

    def _check(self, same: bool) -> None:
        if not same:
            raise ValueError(
                f"resume: {self._path} is of another run (model, text or options differ); name a new file, or delete it"
            )


@contextmanager
def stopping_between_batches(active: bool) -> Iterator[list[bool]]:
    """Makes Ctrl-C wait for the end of a batch: its sums would be in some layers and not in others. What is yielded is
    empty until then. A second Ctrl-C stops at once."""
    asked: list[bool] = []
    if not active or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
