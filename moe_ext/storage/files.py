"""Write a file or a folder whole or not at all.

Everything the package leaves on disk passes through here: it is written under a temporary name beside its destination
and takes its place in one rename once the data has reached the disk. An exception, KeyboardInterrupt included, removes
the temporary and leaves the destination as it was; a killed process leaves a hidden ``.<name>.<hex>.tmp`` at worst,
which the next write of the same name removes. A temporary is locked while its process lives: it is no leftover then.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_noting: list[set[Path]] = []


@contextmanager
def noting_written() -> Iterator[set[Path]]:
    """Yield a set that every file and folder joins which the block puts in its place, whole."""
    noted: set[Path] = set()
    _noting.append(noted)
    try:
        yield noted
    finally:
        _noting.pop()


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
        FileExistsError: ``path`` is a device, a FIFO or a socket.
        FileNotFoundError, PermissionError: the folder of ``path`` does not exist, or cannot be written to.
        OSError: the file cannot be written; or it is there and whole, which the message says then.
    """
    target = file_destination(path)
    with _temporary_beside(target, folder=False) as temporary:
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        # Some writers replace the temporary by a file of their own: safetensors' save_file leaves mode 0600.
        temporary.chmod(mode & 0o7777)
        flush_to_disk(temporary)
        temporary.replace(target)
        _in_place(target)


@contextmanager
def replace_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes ``path`` in one step.

    The files in it get the mode that the umask says, whatever mode their writers gave them.

    Args:
        path: the destination; must not exist, or be an empty folder. Its parent must exist.

    Yields:
        An empty folder beside the destination.

    Raises:
        FileExistsError: ``path`` is a file or a folder with something in it, from the beginning or by the end.
        FileNotFoundError, PermissionError: the parent of ``path`` does not exist, or cannot be written to.
        OSError: it cannot be written; or it is there and whole, which the message says then.
    """
    target = folder_destination(path)
    with _temporary_beside(target, folder=True) as temporary:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # what the umask says of files: safetensors' save_file leaves 0600
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                Path(folder, name).chmod(mode)
                flush_to_disk(Path(folder, name))
            flush_to_disk(Path(folder))
        put_in_place(temporary, target)


def put_in_place(finished: Path, target: Path) -> None:
    """Gives a folder that is whole and on the disk its name.

    Raises:
        FileExistsError: somebody has filled ``target`` meanwhile.
        OSError: it cannot be renamed; or ``target`` is there and whole, which the message says then.
    """
    try:
        finished.rename(target)
    except OSError:
        if target.exists():
            folder_destination(target)  # says what is there by now
        raise
    _in_place(target)


def _in_place(target: Path) -> None:
    """What comes after the rename: the folder's entry reaches the disk."""
    for noted in _noting:
        noted.add(target)
    try:
        flush_to_disk(target.parent)
    except OSError as error:
        raise OSError(
            error.errno, f"{target} is there and whole, but may not outlast a power failure: {error.strerror}"
        ) from error


def file_destination(path: str | os.PathLike[str]) -> Path:
    """Where :func:`replace_file` would write; raises what it would, so that long work can ask first."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"path: {target} is a folder; expected a file")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"path: {target} is a device, a FIFO or a socket; expected a file, or nothing there")
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
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"path: the folder {target.parent} cannot be written to")
    return target


@contextmanager
def _temporary_beside(target: Path, *, folder: bool) -> Iterator[Path]:
    """A new temporary that is locked until the block is left, and goes if it is left by an exception."""
    _remove_leftovers(target, folder=folder)
    temporary, descriptor = _made_and_locked(target, folder=folder)
    try:
        yield temporary
    except BaseException:
        _remove(temporary)
        raise
    finally:
        os.close(descriptor)


def _made_and_locked(target: Path, *, folder: bool) -> tuple[Path, int]:
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            if folder:
                temporary.mkdir()
            else:
                temporary.touch(mode=0o666, exist_ok=False)
            # Open for writing, where that is possible: over NFS only such a file can be locked.
            descriptor = os.open(temporary, os.O_RDONLY if folder else os.O_RDWR)
        except FileNotFoundError:
            if not target.parent.is_dir():
                raise
            continue  # taken for a leftover before it was locked
        except BaseException:
            _remove(temporary)
            raise
        with suppress(OSError):  # a file system without locks: nothing is taken for a leftover there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if is_at(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file or folder is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def locked_file(path: Path) -> int:
    """Makes a file, if need be, and locks it; the lock ends when the descriptor returned is closed, or the process.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            pass  # a file system without locks
        if is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # its owner has just removed it


@contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Waits until no other process or thread is in such a block of this folder: for a file whose new content depends on
    its old one. A file system without locks gives no such promise.

    Raises:
        OSError: there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(target: Path, *, folder: bool) -> None:
    """Removes temporaries of this destination whose processes are gone."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp", re.DOTALL)
    with suppress(PermissionError), os.scandir(target.parent) as entries:  # writing there says what is not allowed
        leftovers = [
            Path(entry.path)
            for entry in entries
            if pattern.fullmatch(entry.name)
            and (entry.is_dir(follow_symlinks=False) if folder else entry.is_file(follow_symlinks=False))
        ]
        for leftover in leftovers:
            with suppress(OSError):  # somebody else's, locked, or gone by now
                descriptor = os.open(leftover, (os.O_RDONLY if folder else os.O_RDWR) | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(leftover)
                finally:
                    os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes a temporary, as far as that is possible: what stays is a leftover, which the next write removes."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def allocate(file: IO[bytes], size: int) -> None:
    """Gives an empty file its size and the room on the disk: a mapped file without it ends its process by SIGBUS.

    Raises:
        OSError: the disk is too small.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        for start in range(0, size, 1 << 20):
            file.write(bytes(min(size - start, 1 << 20)))
        file.flush()


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
