"""A process of its own that makes items ahead of the one that uses them, in the same order."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader, IterableDataset

Item = TypeVar("Item")


class _Failed:
    """What the process ended with; a loader's own way would put a traceback into the message."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Items(IterableDataset[Any]):
    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._make()
        except Exception as error:
            yield _Failed(error)


def made_ahead(make: Callable[[], Iterator[Item]], depth: int) -> Iterator[Item]:
    """The items of ``make()``, made in another process, at most ``depth`` of them ahead.

    Raises:
        RuntimeError: that process is gone.
        Exception: what ``make`` raises there.
    """
    # fork, where there is one: the tokenizer need not be pickled, and nothing is loaded again.
    context = "fork" if sys.platform == "linux" else "spawn"
    loader: DataLoader[Any] = DataLoader(
        _Items(make),
        batch_size=None,
        num_workers=1,
        prefetch_factor=depth,
        collate_fn=_as_it_is,
        worker_init_fn=_begin,
        multiprocessing_context=context,
        generator=torch.Generator(),  # not the global one, whose numbers are the caller's
    )
    for item in loader:
        if isinstance(item, _Failed):
            raise item.error
        yield cast(Item, item)


def _as_it_is(item: Any) -> Any:
    return item


def _begin(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C ends
    # Threads that a forked process believes to have, but has not, would be waited for.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
