"""Every job killed, and failed, at calls to the system that change files: its inputs are as they were, what is at a
final name is whole, and the same command run again ends with the same bytes and leaves nothing else.

20 faults a job at most, spread over its calls; MOE_EXT_FAULTS=all: every call with every fault.
"""

import errno
import os
import signal
from pathlib import Path

import pytest

from moe_ext.evaluation.results import VariantsFileError, read_variants
from moe_ext.reconstruction.result import SearchFileError, SearchResult
from tests.faults.jobs import JOBS, Job
from tests.faults.support import Ended, Server, Tree, differing, fresh, tree

pytestmark = pytest.mark.faults

FAULTS = {0: "killed", errno.EIO: "EIO", errno.ENOSPC: "ENOSPC"}


def chosen(calls: int, most: int) -> list[tuple[int, int]]:
    """The faults to try of a job of so many calls: the call's number, and an error or 0."""
    if os.environ.get("MOE_EXT_FAULTS") == "all":
        return [(call, fault) for call in range(1, calls + 1) for fault in FAULTS]
    count = min(most, len(FAULTS) * calls)
    faults = list(FAULTS)
    return [(1 + index * calls // count, faults[index % len(faults)]) for index in range(count)]


def part(content: Tree, name: str) -> Tree:
    """What lies at a name and below it."""
    return {path: data for path, data in content.items() if path == name or path.startswith(f"{name}/")}


@pytest.mark.parametrize("name", JOBS)
def test_a_fault_damages_nothing_and_the_job_ends_the_same_when_it_is_run_again(
    name: str, server: Server, inputs: Path, folder: Path
) -> None:
    job = JOBS[name]
    work = fresh(inputs, folder / "work")
    before = tree(work)
    expected, calls = reference(server, job, work)
    assert calls > 0
    for call, fault in chosen(calls, job.faults):
        what = f"{name}, {FAULTS[fault]} at call {call} of {calls}"
        fresh(inputs, work)
        ended = run(server, job, work, fault=(call, fault))
        if fault == 0:
            assert ended.status == -signal.SIGKILL, what
        check_after(job, work, before, expected, ended, what)
        there = all(part(tree(work), result) == part(expected, result) for result in job.results)
        again = run(server, job, work)
        if again.status and job.once and there:
            assert "already exists" in again.errors, f"{what}: {again.errors}"
        else:
            assert again.status == 0, f"{what}, run again: {again.errors}"
        assert differing(tree(work), expected) == [], f"{what}, run again"


def reference(server: Server, job: Job, work: Path) -> tuple[Tree, int]:
    """What the job leaves undisturbed, and the calls that it takes."""
    ended = run(server, job, work)
    assert ended.status == 0, ended.errors
    return tree(work), ended.calls


def run(server: Server, job: Job, work: Path, **request: object) -> Ended:
    printed = None if job.printed is None else work / job.printed
    return server.run(work, job.arguments, out=printed, **request)[0]


def check_after(job: Job, work: Path, before: Tree, expected: Tree, ended: Ended, what: str) -> None:
    now = tree(work)
    for path, data in before.items():
        if path.startswith("in/") and path not in job.results:
            assert now.get(path) == data, f"{what}: the input {path} is not as it was"
    for result in job.results:
        got = part(now, result)
        whole = got == part(expected, result)
        assert whole or got == part(before, result), f"{what}: {result} is there and not whole"
        if ended.status == 0:
            assert whole, f"{what}: exit code 0, and no whole {result}"
        elif ended.status > 0 and whole and result not in before:
            assert "is there and whole" in ended.errors, f"{what}: does not say that {result} is there: {ended.errors}"
    for result in job.growing:
        if (work / result).exists() and now[result] != expected[result]:
            with pytest.raises(SearchFileError, match="not finished"):
                SearchResult.load(work / result)
    if job.printed is not None and now[job.printed] != expected[job.printed]:
        assert ended.status != 0, f"{what}: exit code 0, and half of the result is printed"
        with pytest.raises(VariantsFileError):
            read_variants(work / job.printed)
    if ended.status > 0:
        assert "Traceback" not in ended.errors, f"{what}: {ended.errors}"
        assert "error: " in ended.errors or ended.status == 120, f"{what}: {ended.errors}"
