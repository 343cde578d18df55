"""A model's own forward pass of a batch, suspended wherever it enters a decoder layer.

What is between the layers stays in the model's own code and frames: masks and positions, states that are built from
several layers' outputs, what a layer hands to later ones beside hidden states. The layers themselves do not run in it:
whoever resumes the pass gives what they return.

A pass has a thread of its own, for its frames alone: it runs only while the one that resumed it waits. So one runs at
a time, in the order in which they are resumed.
"""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from moe_ext.runtime.base_forward import replaced_forwards

_set_omp_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None) if sys.platform == "linux" else None

_HERE = threading.local()  # .passing: the pass whose thread this is

THREAD_NAME = "moe_ext-forward"


@dataclass(frozen=True)
class Entry:
    """Where a pass is suspended: the index of a decoder layer, and what its forward is given."""

    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class SuspendedForward:
    """A forward pass that stands at the entry of a decoder layer, or has ended; :meth:`begin` brings it to the first.

    Attributes:
        entry: where it stands; None before it began and once it has ended.

    Args:
        run: the pass. It runs with this thread's modes of torch (gradients, autocast, device) and contextvars.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self.entry: Entry | None = None
        self._run, self._surroundings, self._context = run, _surroundings(), copy_context()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._reached: SimpleQueue[Entry | BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._threads_work, name=THREAD_NAME, daemon=True)

    def begin(self) -> None:
        """Runs up to the first decoder layer, within :func:`suspending`.

        Raises:
            BaseException: what the model's code raised.
            RuntimeError: the system has no thread left.
        """
        self._thread.start()
        self._wait()

    def go_on(self, output: Any) -> None:
        """Runs up to the next decoder layer or the end, within :func:`suspending`.

        Args:
            output: what the layer returns at whose entry the pass stands.

        Raises:
            BaseException: what the model's code raised.
        """
        assert self.entry is not None
        self.entry = None
        self._answers.put((output,))
        del output
        self._wait()

    def cancel(self) -> None:
        """Ends the pass where it stands."""
        self.entry = None
        if self._thread.ident is not None:
            self._answers.put(None)
            self._thread.join()

    def _wait(self) -> None:
        reached = self._reached.get()
        if isinstance(reached, Entry):
            self.entry = reached
            return
        self._thread.join()
        if reached is not None:
            raise reached

    def _enter(self, entry: Entry) -> Any:
        """In the pass's thread: stands there until the output comes."""
        self._reached.put(entry)
        del entry
        answer = self._answers.get()
        if answer is None:
            raise _Cancelled
        return answer[0]

    def _threads_work(self) -> None:
        _HERE.passing = self
        _compute_in_one_thread()
        try:
            with self._surroundings():
                self._context.run(self._run)
        except _Cancelled:
            self._reached.put(None)
        except BaseException as error:  # is raised where the pass was resumed
            self._reached.put(error)
        else:
            self._reached.put(None)


class _Cancelled(BaseException):
    """Takes down the frames of a pass that is not wanted any more."""


@contextmanager
def suspending(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, passes that are resumed stop where they enter one of the layers."""

    def around(index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                passing: SuspendedForward | None = getattr(_HERE, "passing", None)
                if passing is None:
                    return original(*args, **kwargs)
                entry = Entry(index, args, kwargs)
                del args, kwargs  # no second reference while it stands there
                return passing._enter(entry)

            return forward

        return replacement

    with replaced_forwards() as replace:
        for index, layer in enumerate(layers):
            replace(layer, around(index))
        yield


def _compute_in_one_thread() -> None:
    """What runs between the layers computes in its pass's thread: OpenMP would give every pass a pool of threads."""
    if _set_omp_threads is not None:
        _set_omp_threads(1)  # torch.set_num_threads would also change how MKL chooses, in all threads


def _surroundings() -> Callable[[], ExitStack]:
    """What makes another thread run as this one does: its modes of torch."""
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    device = stream = None
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        device, stream = torch.cuda.current_device(), torch.cuda.current_stream()

    def enter() -> ExitStack:
        stack = ExitStack()
        if inference:
            stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.set_grad_enabled(gradients))
        for kind, dtype in casts.items():
            stack.enter_context(torch.autocast(kind, dtype))
        if device is not None and stream is not None:
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return enter
