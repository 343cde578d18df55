"""Calibration in several processes: every one takes whole batches of the text, and their sums are added up.

Whole batches, because the last bits of a model's activations depend on which sequences stand together in a batch.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist

from moe_ext.statistics import ExpertStatistics

Batch = TypeVar("Batch")


def started_by_torchrun() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def process_group(device: str, timeout: float) -> Iterator[str]:
    """Joins torchrun's processes (nccl on GPUs, else gloo) for the ``with`` block; yields this process's device.

    Args:
        device: "cpu" or "cuda"; with several GPUs every process takes the one of its local rank.
        timeout: seconds that a process waits for the others before it fails.
    """
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number in its group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def share_of(batches: Iterable[Batch]) -> Iterator[Batch]:
    """This process's share: with N processes, batches r, r + N, r + 2N, ... of rank r."""
    return islice(batches, dist.get_rank(), None, dist.get_world_size())


def add_up(stats: ExpertStatistics) -> None:
    """Replaces every process's sums by those of all, in place.

    Raises:
        RuntimeError: a process is gone, or does not answer in time.
        ValueError: the processes calibrated different models.
    """
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, stats.model_digest)
    if len(set(digests)) > 1:
        raise ValueError("the processes calibrated different models: the weights of their routers differ")
    for tensor in stats.tensors().values():
        total = tensor.to(device)
        dist.all_reduce(total)
        tensor.copy_(total)
