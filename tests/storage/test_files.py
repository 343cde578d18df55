"""Files and folders appear whole or not at all."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moe_ext.storage.files
from moe_ext.storage.files import replace_file, replace_folder

INTERRUPTIONS = pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt, SystemExit])


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def write_interrupted(path: Path, interruption: type[BaseException]) -> None:
    with replace_file(path) as temporary:
        temporary.write_bytes(b"ha")
        raise interruption


def fill_interrupted(path: Path, interruption: type[BaseException]) -> None:
    with replace_folder(path) as temporary:
        (temporary / "file").write_bytes(b"ha")
        raise interruption


def kill_while_writing(function: str, path: Path, write: str) -> None:
    """Run ``with <function>(path) as temporary: <write>`` in a process that dies by SIGKILL inside the block."""
    # The module is run by its path: the child needs nothing of the package, and starts in no time.
    code = f"""
import runpy, sys
with runpy.run_path(sys.argv[1])["{function}"](sys.argv[2]) as temporary:
    {write}
    print("written", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, moe_ext.storage.files.__file__, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_a_new_file_holds_what_was_written(tmp_path: Path) -> None:
    with replace_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names_in(tmp_path) == ["file"]


def test_the_old_file_stays_visible_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replace_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_the_temporary_lies_in_the_folder_of_the_destination(tmp_path: Path) -> None:
    with replace_file(tmp_path / "file") as temporary:
        assert temporary.parent == tmp_path


def test_the_data_reaches_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    existed_at_flush = []
    monkeypatch.setattr(os, "fsync", lambda _: existed_at_flush.append(path.exists()))
    with replace_file(path) as temporary:
        temporary.write_bytes(b"new")
    assert existed_at_flush == [False, True]  # the file's data, then the folder's entry


@INTERRUPTIONS
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, interruption: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(interruption):
        write_interrupted(path, interruption)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


@INTERRUPTIONS
def test_an_interrupted_first_write_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption):
        write_interrupted(tmp_path / "file", interruption)
    assert names_in(tmp_path) == []


def test_an_interruption_during_the_flush_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt), replace_file(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    kill_while_writing("replace_file", path, write="temporary.write_bytes(b'ha')")
    assert path.read_bytes() == b"old"


def test_a_write_after_a_killed_one_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    kill_while_writing("replace_file", path, write="temporary.write_bytes(b'ha')")
    assert not path.exists()
    with replace_file(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_the_mode_of_a_new_file(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with replace_file(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_the_mode_of_a_replaced_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o640)
    with replace_file(path) as temporary:
        # As safetensors' save_file does: the writer puts a private file of its own in the temporary's place.
        temporary.unlink()
        temporary.touch(mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data" / "file")
    with replace_file(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "data" / "file").read_bytes() == b"new"


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"), replace_file(tmp_path):
        pytest.fail("the block ran")


@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_a_missing_parent_folder_is_named(tmp_path: Path, replace: type) -> None:
    with pytest.raises(FileNotFoundError, match="absent does not exist"), replace(tmp_path / "absent" / "new"):
        pytest.fail("the block ran")


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_folder_is_filled(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "folder"
    if exists:
        path.mkdir()
    with replace_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"new")
        assert not path.exists() or names_in(path) == []
    assert (path / "inner" / "file").read_bytes() == b"new"
    assert names_in(tmp_path) == ["folder"]


def test_a_folder_with_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"), replace_folder(tmp_path):
        pytest.fail("the block ran")


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"), replace_folder(tmp_path / "file"):
        pytest.fail("the block ran")


@INTERRUPTIONS
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption):
        fill_interrupted(tmp_path / "folder", interruption)
    assert names_in(tmp_path) == []


def test_a_folder_filled_by_someone_else_meanwhile_is_left_to_them(tmp_path: Path) -> None:
    path = tmp_path / "folder"

    def fill_while_someone_else_does() -> None:
        with replace_folder(path):
            path.mkdir()
            (path / "theirs").touch()

    with pytest.raises(FileExistsError, match="already exists; expected a new or an empty folder"):
        fill_while_someone_else_does()
    assert names_in(path) == ["theirs"]
    assert names_in(tmp_path) == ["folder"]


def test_a_killed_process_leaves_no_folder(tmp_path: Path) -> None:
    kill_while_writing("replace_folder", tmp_path / "folder", write="(temporary / 'file').write_bytes(b'ha')")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("function", ["replace_file", "replace_folder"])
def test_the_next_write_removes_what_a_killed_one_left(tmp_path: Path, function: str) -> None:
    write = "(temporary / 'file' if temporary.is_dir() else temporary).write_bytes(b'ha')"
    kill_while_writing(function, tmp_path / "new", write)
    assert len(names_in(tmp_path)) == 1
    assert names_in(tmp_path)[0].startswith(".new.")
    (tmp_path / ".new.tmp").touch()  # not a name of ours
    (tmp_path / ".newer.01234567.tmp").touch()  # of another destination
    with getattr(moe_ext.storage.files, function)(tmp_path / "new"):
        pass
    assert names_in(tmp_path) == [".new.tmp", ".newer.01234567.tmp", "new"]


@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path, replace: Any) -> None:
    with replace(tmp_path / "new") as first:
        with replace(tmp_path / "old") as other:
            assert other.exists()
        with contextlib.suppress(FileExistsError), replace(tmp_path / "new") as second:
            assert first.exists()
            assert second.exists()
            raise FileExistsError
    assert names_in(tmp_path) == ["new", "old"]


def test_a_temporary_that_was_removed_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    removed: list[Path] = []

    def late(descriptor: int, how: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with replace_file(tmp_path / "new") as temporary:
        temporary.write_bytes(b"new")
    assert len(removed) == 1
    assert (tmp_path / "new").read_bytes() == b"new"


@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_a_folder_that_cannot_be_written_is_said_before_the_block_runs(
    tmp_path: Path, replace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(PermissionError, match="cannot be written to"), replace(tmp_path / "new"):
        pytest.fail("the block ran")


def test_a_device_a_fifo_and_a_socket_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to("/dev/null")
        for path in (tmp_path / "fifo", tmp_path / "socket", tmp_path / "link", Path("/dev/null")):
            with pytest.raises(FileExistsError, match="expected a file, or nothing there"), replace_file(path):
                pytest.fail("the block ran")
    assert names_in(tmp_path) == ["fifo", "link", "socket"]


def test_an_error_after_the_file_is_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        if path.is_dir():
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(moe_ext.storage.files, "flush_to_disk", fails)
    for replace in (replace_file, replace_folder):
        path = tmp_path / replace.__name__
        monkeypatch.setattr(os, "walk", lambda *_, **__: [])
        with (
            moe_ext.storage.files.noting_written() as written,
            pytest.raises(OSError, match=f"{replace.__name__} is there and whole") as raised,
            replace(path),
        ):
            assert written == set()
        assert raised.value.errno == errno.EIO
        assert written == {path}
    assert names_in(tmp_path) == ["replace_file", "replace_folder"]


def test_files_in_a_new_folder_get_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "new") as folder:
        (folder / "deep").mkdir()
        for name in ("secret", "deep/secret"):
            (folder / name).write_text("weights")
            (folder / name).chmod(0o600)
    (tmp_path / "ordinary").write_text("")
    for name in ("secret", "deep/secret"):
        assert (tmp_path / "new" / name).stat().st_mode == (tmp_path / "ordinary").stat().st_mode
