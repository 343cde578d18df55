"""Several processes: every one takes whole batches of the text; their sums are added up.

Whole batches, because the last bits of a model's activations depend on which sequences stand together in a batch.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Batch = TypeVar("Batch")
Found = TypeVar("Found")


def started_by_torchrun() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def process_group(device: str, timeout: float) -> Iterator[str]:
    """Joins torchrun's processes (nccl on GPUs, else gloo) for the ``with`` block; yields this process's device.

    Args:
        device: "cpu" or "cuda"; with several GPUs every process takes the one of its local rank.
        timeout: seconds that a process waits for the others before it fails.

    Raises:
        TimeoutError: they did not find each other in time.
    """
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    _join(backend, timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _join(backend: str, timeout: float) -> None:
    """Joins the group. In a thread, because torch waits for the first answer of a store that listens but does not
    speak, such as that of a stopped process, for as long as it takes."""
    failed: list[BaseException] = []

    def join() -> None:
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=join, name="moe_ext-join", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError(f"the processes did not find each other within {timeout:g} seconds")
    if failed:
        raise failed[0]


def rank() -> int:
    """This process's number in its group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def place_among() -> str:
    """Which of how many processes this is, for names of files that are its own."""
    return f"{dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "0 of 1"


def share_of(batches: Iterable[Batch]) -> Iterator[Batch]:
    """This process's share: with N processes, batches r, r + N, r + 2N, ... of rank r."""
    return islice(batches, dist.get_rank(), None, dist.get_world_size())


def from_first(find: Callable[[], Found]) -> Found:
    """What ``find`` returns in the first process, in all of them.

    Raises:
        RuntimeError: the first process is gone, or does not answer in time.
    """
    found: list[Any] = [find() if rank() == 0 else None]
    dist.broadcast_object_list(found, src=0, device=_device())
    return cast(Found, found[0])


def check_same(mine: str, message: str) -> None:
    """ValueError with the message, in every process, if they do not all have the same; RuntimeError if one is gone."""
    everywhere: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    if len(set(everywhere)) > 1:
        raise ValueError(message)


def total_of(addend: Tensor) -> Tensor:
    """The sum over the processes, on the CPU and with the same bits in each: they may decide by it.

    Raises:
        RuntimeError: a process is gone, or does not answer in time.
    """
    total = addend.to(_device(), copy=True)
    dist.reduce(total, 0)
    dist.broadcast(total, 0)
    return total.cpu()


def _device() -> torch.device:
    """Where the group's backend takes tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
