"""Write a file or a folder whole or not at all.

Everything the package leaves on disk passes through here: it is written under a temporary name beside its destination
and takes its place in one rename once the data has reached the disk. An exception, KeyboardInterrupt included, removes
the temporary and leaves the destination as it was; a killed process leaves a hidden ``.<name>.<hex>.tmp`` at worst.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it becomes ``path`` in one step.

    A symbolic link is followed, as ``open(path, "w")`` would. The mode is that of the file replaced, or for a new file
    what the umask says, whatever mode the writer gave the temporary.

    Args:
        path: the destination; its folder must exist.

    Yields:
        An empty file in the destination's folder.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    target = file_destination(path)
    temporary = _temporary_beside(target)
    try:
        temporary.touch(mode=0o666, exist_ok=False)
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        # Some writers replace the temporary by a file of their own: safetensors' save_file leaves mode 0600.
        temporary.chmod(mode & 0o7777)
        flush_to_disk(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(target.parent)


@contextmanager
def replace_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes ``path`` in one step.

    The files in it get the mode that the umask says, whatever mode their writers gave them.

    Args:
        path: the destination; must not exist, or be an empty folder. Its parent must exist.

    Yields:
        An empty folder beside the destination.

    Raises:
        FileExistsError: ``path`` is a file or a folder with something in it.
        FileNotFoundError: the parent of ``path`` does not exist.
    """
    target = folder_destination(path)
    temporary = _temporary_beside(target)
    try:
        temporary.mkdir()
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # what the umask says of files: safetensors' save_file leaves 0600
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                Path(folder, name).chmod(mode)
                flush_to_disk(Path(folder, name))
            flush_to_disk(Path(folder))
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_to_disk(target.parent)


def file_destination(path: str | os.PathLike[str]) -> Path:
    """Where :func:`replace_file` would write; raises what it would, so that long work can ask first."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"path: {target} is a folder; expected a file")
    return _in_existing_folder(target)


def folder_destination(path: str | os.PathLike[str]) -> Path:
    """Where :func:`replace_folder` would write; raises what it would, so that long work can ask first."""
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_dir() and next(target.iterdir(), None) is None):
        raise FileExistsError(f"path: {target} already exists; expected a new or an empty folder")
    return _in_existing_folder(target)


def _in_existing_folder(target: Path) -> Path:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {target.parent} does not exist")
    return target


def _temporary_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
