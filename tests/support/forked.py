"""Forked processes: they need not import anything anew."""

import os
from collections.abc import Callable

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
