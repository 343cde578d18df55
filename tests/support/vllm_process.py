"""vLLM in an environment of its own, whose Python ``MOE_EXT_VLLM_PYTHON`` names: it wants another transformers."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

VLLM = os.environ.get("MOE_EXT_VLLM_PYTHON", "")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
STOCK = {"MOE_EXT_VLLM": "0"}
"""What makes it vLLM without our plugin."""


def environment(changes: dict[str, str]) -> dict[str, str]:
    # Nothing of this process's Python may be found there.
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**ours, **SETTINGS, **changes}


def generated(folder: Path, jobs: dict[str, Any], tokens: int, changes: dict[str, str]) -> dict[str, Any]:
    """What one process of vLLM says of all jobs: see ``vllm_generate.py``. ``log``: what it printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = ROOT / "tests" / "support" / "vllm_generate.py"
    result = subprocess.run(
        [VLLM, str(script), "jobs.json", "results.json", str(tokens)],
        cwd=folder,
        env=environment(changes),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    done: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {**done, "log": result.stdout + result.stderr}
