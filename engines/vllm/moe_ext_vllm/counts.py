"""Slots that were skipped, per layer: with ``MOE_EXT_VLLM_COUNT=N`` a log line every N seconds in which tokens came,
and at exit.

vLLM has no door for metrics of a plugin's, and ends the processes of a server without their exit handlers. What it runs
before the first request, to measure memory and to compile, is counted with the rest.
"""

import atexit
import logging
import os
import threading
from typing import Any

VARIABLE = "MOE_EXT_VLLM_COUNT"

_counted: dict[str, Any] = {}
_said = ""


def wanted() -> float | None:
    """Seconds between lines; None: nothing is counted.

    Raises:
        ValueError: the variable is no number above 0.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{VARIABLE} is {text!r}; expected seconds between log lines, above 0")
    return seconds


def add(layer_name: str, runner: Any, seconds: float) -> None:
    """Counts a layer: ``runner.skip_counts``, (2,) int64, slots skipped and slots."""
    if not _counted:
        atexit.register(_log)
        threading.Thread(target=_log_every, args=(seconds,), daemon=True).start()
    _counted[layer_name] = runner


def _log_every(seconds: float) -> None:
    pause = threading.Event()
    while not pause.wait(seconds):
        _log()


def _log() -> None:
    global _said
    rows = {name: runner.skip_counts.tolist() for name, runner in list(_counted.items())}
    said = ", ".join(f"{name} {skipped} of {slots}" for name, (skipped, slots) in rows.items())
    if said != _said and any(slots for _, slots in rows.values()):
        _said = said
        logging.getLogger("vllm.moe_ext").warning("moe_ext: slots skipped: %s", said)
