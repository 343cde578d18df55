"""Forked processes: they need not import anything anew."""

import os
import socket
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch


def fork(work: Callable[[], object]) -> int:
    """Starts a process that runs ``work`` and ends without any clean-up, with 1 if it raised; its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the parent's threads are not there
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def exit_status(child: int) -> int:
    """Waits for its end; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results_of_group(count: int, work: Callable[[], object], folder: Path) -> list[Any]:
    """What ``work`` returns in each of ``count`` processes that find each other as torchrun's do; tensors and plain
    containers only, which go through files in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run(rank: int) -> None:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        try:
            torch.save(work(), folder / f"{rank}.pt")
        except BaseException:
            traceback.print_exc()
            raise

    children = [fork(partial(run, rank)) for rank in range(count)]
    assert [exit_status(child) for child in children] == [0] * count
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]
