"""Full disks, folders that cannot be written, two processes at once: an error, or the same result, and nothing else."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.jobs import JOBS, Job
from tests.faults.support import Server, Tree, differing, fresh, tree

pytestmark = pytest.mark.faults

WRITING = {name: job for name, job in JOBS.items() if job.results}
NOBODY = 65534


@pytest.fixture
def work(inputs: Path, folder: Path) -> Path:
    return fresh(inputs, folder / "work")


def undisturbed(server: Server, job: Job, inputs: Path, work: Path) -> Tree:
    """What the job leaves; the folder is fresh again."""
    (ended,) = server.run(work, job.arguments)
    assert ended.status == 0, ended.errors
    expected = tree(work)
    fresh(inputs, work)
    return expected


def left(job: Job, before: Tree, work: Path) -> set[str]:
    """What is new or another, but for what the same command would go on with."""
    changed = differing(tree(work), before)
    return {name for name in changed if name not in job.growing and not name.startswith("scratch/moe_ext-")}


@pytest.mark.parametrize("name", WRITING)
def test_a_file_that_cannot_grow_is_an_error_and_leaves_nothing(name: str, server: Server, work: Path) -> None:
    """As under ulimit -f, or when a quota is used up: the first bytes are written, later ones are not."""
    before = tree(work)
    (ended,) = server.run(work, WRITING[name].arguments, limit=256)
    assert ended.status == 1
    assert "error: " in ended.errors
    assert "too large" in ended.errors
    assert left(WRITING[name], before, work) == set()
    assert not list((work / "scratch").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize("name", WRITING)
def test_a_folder_that_cannot_be_written_is_found_before_work_begins(name: str, server: Server, work: Path) -> None:
    before = tree(work)
    for path in (work, *work.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # of root, and so not to be written by others
    if "--scratch" in WRITING[name].arguments:
        (work / "scratch").chmod(0o777)
    (ended,) = server.run(work, WRITING[name].arguments, user=NOBODY)
    assert ended.status == 1
    assert "cannot be written to" in ended.errors
    assert "perplexity" not in ended.errors
    assert "batch/s" not in ended.errors
    assert differing(tree(work), before) == []


@pytest.fixture
def small_disk(work: Path) -> Iterator[Path]:
    """``out`` as a file system of 24 KB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "none", work / "out"], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount")
    yield work / "out"
    subprocess.run(["umount", work / "out"], check=True)


@pytest.mark.parametrize("name", ["calibrate", "calibrate sequentially", "merge", "prune", "search", "skip", "report"])
def test_a_full_disk_is_an_error_and_leaves_nothing(name: str, server: Server, work: Path, small_disk: Path) -> None:
    before = tree(work)
    (small_disk / "other").write_bytes(bytes(20_000))
    (ended,) = server.run(work, JOBS[name].arguments)
    assert ended.status == 1
    assert "No space left on device" in ended.errors or "the result needs" in ended.errors
    (small_disk / "other").unlink()
    assert left(JOBS[name], before, work) == set()


@pytest.mark.parametrize("name", [name for name in WRITING if name != "report"])  # writes as plan does, in seconds
def test_of_two_processes_at_once_both_end_whole_or_one_says_why_not(
    name: str, server: Server, inputs: Path, work: Path
) -> None:
    job = WRITING[name]
    expected = undisturbed(server, job, inputs, work)
    for _ in range(3):
        ended = server.run(work, job.arguments, processes=2)
        assert 0 in {one.status for one in ended}, [one.errors for one in ended]
        for one in ended:
            if one.status != 0:
                assert one.status == 1
                assert any(
                    words in one.errors
                    for words in (
                        "already exists",
                        "another process is writing",
                        "another process is doing the same job",
                    )
                ), one.errors
        assert differing(tree(work), expected) == []
        fresh(inputs, work)


def test_an_output_that_is_a_link_is_written_where_it_leads(server: Server, work: Path) -> None:
    (work / "out" / "plan.json").symlink_to("../scratch/plan.json")
    for _ in range(2):
        (ended,) = server.run(work, JOBS["plan"].arguments)
        assert ended.status == 0, ended.errors
    assert (work / "out" / "plan.json").is_symlink()
    assert [path.name for path in (work / "scratch").iterdir()] == ["plan.json"]
