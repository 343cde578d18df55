"""The hidden folder in which a pruned checkpoint grows: one job at a time, an interrupted one goes on, another begins
anew.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_ext.checkpoints.stored_tensors import StoredTensor
from moe_ext.pruning.refit_files import FOLDER
from moe_ext.pruning.shard_writer import Part
from moe_ext.storage.files import folder_destination, is_at, replace_file
from moe_ext.version import __version__

PROGRESS = "moe_ext_progress.json"


def fingerprint(checkpoint: str | Path, stored: dict[str, StoredTensor], *asked: str | int | bool | None) -> str:
    """Tells jobs apart: the source's files as they are now, and what is asked for."""
    files = {tensor.file for tensor in stored.values()} | {Path(checkpoint) / "config.json"}
    states = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    job = [__version__, str(Path(checkpoint).resolve()), states, *asked]
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()


@contextmanager
def locked(work: Path, target: Path) -> Iterator[None]:
    """The unfinished folder, made if need be, and nobody else in it. If the block fails it stays for the next run,
    unless it holds no shard and no refitted layer, or somebody else's result has come to ``target``.

    Raises:
        FileExistsError: ``work`` is no folder, or there is a result at ``target``.
        BlockingIOError: another process is in it.
    """
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise FileExistsError(f"{work} is in the way: it is no folder of an unfinished run")
    descriptor = _made_and_locked(work, target)
    try:
        folder_destination(target)  # another process may have finished before this one had the lock
        yield
    except BaseException:
        if is_at(descriptor, work) and (_taken(target) or not any(work.rglob("*.safetensors"))):
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _made_and_locked(work: Path, target: Path) -> int:
    while True:
        work.mkdir(exist_ok=True)
        try:
            descriptor = os.open(work, os.O_RDONLY)
        except FileNotFoundError:
            continue  # the process that was in it has just given it its name
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(descriptor, work):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise BlockingIOError(errno.EWOULDBLOCK, f"another process is writing {target}, in {work}") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _taken(target: Path) -> bool:
    try:
        folder_destination(target)
    except FileExistsError:
        return True
    return False


def begin(work: Path, fingerprint: str, shards: dict[str, list[Part]]) -> set[str]:
    """Shards that are there already; whatever else is there, of this job or another, goes."""
    try:
        same = json.loads((work / PROGRESS).read_text())["job"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    # A shard takes its name once it is whole and on the disk.
    finished = {name for name in shards if same and (work / name).is_file() and not (work / name).is_symlink()}
    for path in work.iterdir():
        if path.name in finished or (same and path.name in (PROGRESS, FOLDER)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not same:
        with replace_file(work / PROGRESS) as temporary:
            temporary.write_text(json.dumps({"job": fingerprint}))
    return finished


def check_space(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"the result needs {needed / 1e9:.2f} GB, {work.parent} has {free / 1e9:.2f} GB")
