"""The hidden folder beside a compressed checkpoint's place: one file a finished stage, so that a run that was killed
goes on where it was.

The result comes last: it is in the folder until it takes its place in one rename. A run that is killed between that and
the removal of the folder left everything behind to end with, and is told by the result's inode.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_ext.compression.result import Compressed
from moe_ext.storage.files import flush_to_disk, put_in_place, replace_file, replace_folder
from moe_ext.version import __version__

KEPT = ("statistics.safetensors", "search.safetensors", "plan.json", "result-statistics.safetensors")
RESULT = "result.json"


def fingerprint(folder: Path, files: set[Path], asked: Mapping[str, Any]) -> str:
    """Tells jobs apart: the source's files as they are now, and what was asked for."""
    states = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    job = [__version__, str(folder.resolve()), states, dict(asked)]
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()


@dataclass(frozen=True)
class WorkFolder:
    """The folder of one result.

    Attributes:
        target: where the result goes.
    """

    target: Path

    @property
    def path(self) -> Path:
        return self.target.with_name(f".{self.target.name}.compress")

    @property
    def checkpoint(self) -> Path:
        """The result before it takes its place."""
        return self.path / "checkpoint"

    def file(self, name: str) -> Path:
        return self.path / name

    def begin(self, job: str) -> None:
        """Removes what another job left."""
        try:
            same = (self.path / "job").read_text() == job
        except (OSError, ValueError):
            same = False
        if same:
            return
        for path in self.path.iterdir():
            _remove(path)
        with replace_file(self.path / "job") as temporary:
            temporary.write_text(job)

    def put_in_place(self, found: Compressed) -> None:
        """Gives the result its name, after a note of what is left to do."""
        note = {"inode": self.checkpoint.stat().st_ino, "result": json.loads(found.to_json())}
        with replace_file(self.path / "finished.json") as temporary:
            temporary.write_text(json.dumps(note))
        flush_to_disk(self.path)
        put_in_place(self.checkpoint, self.target)

    def finished(self, job: str | None = None) -> Compressed | None:
        """What a run found that was killed when its result was in place; None if there was none, or of another job."""
        try:
            note = json.loads((self.path / "finished.json").read_text())
            there = self.target.stat().st_ino == note["inode"] and not self.checkpoint.exists()
            same = job is None or (self.path / "job").read_text() == job
            return Compressed.of_json(note["result"]) if there and same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def end(self, found: Compressed, keep_files: Path | None) -> None:
        """Removes the folder once what is to be kept of it is elsewhere."""
        if keep_files is not None and not _kept(keep_files, found):
            with replace_folder(keep_files) as temporary:
                for name in KEPT:
                    if self.file(name).is_file():
                        shutil.copyfile(self.file(name), temporary / name)
                (temporary / RESULT).write_text(found.to_json(), encoding="utf-8")
        with suppress(FileNotFoundError):  # another process has found the same and removes it, too
            for path in self.path.iterdir():
                if path.name not in ("job", "finished.json"):  # until all else is gone
                    _remove(path)
            shutil.rmtree(self.path)


def _kept(keep_files: Path, found: Compressed) -> bool:
    try:
        return (keep_files / RESULT).read_text(encoding="utf-8") == found.to_json()
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)
