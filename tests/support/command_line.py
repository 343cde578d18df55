"""``moe-ext`` as a subprocess, as a user runs it, or inside this process, which is faster."""

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from moe_ext.commands.main import main


def moe(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "moe_ext", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def inside(*arguments: str) -> int:
    """The exit code of a command run in this process: starting one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moe-ext", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def moe_json(*arguments: str | Path) -> Any:
    """What a command run in this process prints with --json."""
    printed = StringIO()
    with redirect_stdout(printed):
        assert inside(*map(str, arguments), "--json") == 0
    return json.loads(printed.getvalue())
