"""Runs commands in forked children. Started once with the shim preloaded: imports take seconds, a fork milliseconds.

Reads a request a line, as JSON, and answers with a list of one result a process.
"""

import contextlib
import ctypes
import gc
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
from typing import Any

import jinja2  # noqa: F401  what commands import when they need it
import matplotlib.backends.backend_svg
import matplotlib.figure
import torch
import transformers.models.mixtral.modeling_mixtral
import transformers.models.mixtral.modular_mixtral  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import moe_ext.commands.main


def run(shim: Any, request: dict[str, Any], results: int, errors: int) -> None:
    """A child: one command; its exit code, or 120 if what it printed could not be written, as Python itself does."""
    torch.set_num_threads(1)
    forking = multiprocessing.get_context("fork")
    setattr(multiprocessing, "get_context", lambda _: forking)  # noqa: B010  for compare's workers
    os.chdir(request["work"])
    os.dup2(errors, 2)
    os.dup2(os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 1)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
    sys.argv = ["moe-ext", *request["arguments"]]
    if request.get("limit") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))
    if request.get("user") is not None:
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    number, error = request.get("fault", (0, 0))
    shim.fault_arm(os.fsencode(request["work"]), number, error)
    status = 1
    try:
        moe_ext.commands.main.main()
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    try:
        sys.stdout.flush()
    except OSError:
        status = status or 120
    os.write(results, str(shim.fault_count()).encode())
    os._exit(status)


def warm_up() -> None:
    """What a first command would do for all later ones, as far as it starts no threads: a child has none of them."""
    sys.argv = ["moe-ext", "plan", "none", "--keep", "1", "--out", "none"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        moe_ext.commands.main.main()
    get_checkpoint_conversion_mapping("mixtral")
    figure = matplotlib.figure.Figure()
    figure.add_subplot().set_title("fonts")
    figure.savefig(io.StringIO(), format="svg")
    gc.collect()
    gc.freeze()  # children need not copy what is there already


def main() -> None:
    torch.set_num_threads(1)
    shim = ctypes.CDLL(sys.argv[1])
    warm_up()
    shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    shim.fault_count.restype = ctypes.c_long
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in requests:
        request = json.loads(line)
        children: list[Any] = []
        for _ in range(request.get("processes", 1)):
            pipes = os.pipe(), os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    run(shim, request, *(writing for _, writing in pipes))
                finally:
                    os._exit(1)
            for _, writing in pipes:
                os.close(writing)
            children.append((child, *[os.fdopen(reading, errors="replace") for reading, _ in pipes]))
        results = []
        for child, calls, errors in children:
            with calls, errors:
                said = {"errors": errors.read(), "calls": int(calls.read() or 0)}
            results.append({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), **said})
        print(json.dumps(results), file=answers, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest ends this process by closing its input
    main()
