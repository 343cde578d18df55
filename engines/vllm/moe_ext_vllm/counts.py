"""Slots that were skipped, per layer: counted where ``MOE_EXT_VLLM_COUNT=1``, said in one log line at exit.

vLLM has no door for metrics of a plugin's. What vLLM runs before the first request, to measure memory and to compile,
is counted with the rest.
"""

import atexit
import logging
import os
from typing import Any

_counted: dict[str, Any] = {}


def wanted() -> bool:
    return os.environ.get("MOE_EXT_VLLM_COUNT") == "1"


def add(layer_name: str, runner: Any) -> None:
    """Counts a layer: ``runner.skip_counts``, (2,) int64, slots skipped and slots."""
    if not _counted:
        atexit.register(_log)
    _counted[layer_name] = runner


def _log() -> None:
    rows = {name: runner.skip_counts.tolist() for name, runner in _counted.items()}
    said = ", ".join(f"{name} {skipped} of {slots}" for name, (skipped, slots) in rows.items())
    logging.getLogger("vllm.moe_ext").warning("moe_ext: slots skipped: %s", said)
