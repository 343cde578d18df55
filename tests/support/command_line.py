"""``moe-ext`` in a process of its own, or inside this one."""

import json
import os
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

from moe_ext.commands import output
from moe_ext.commands.main import main
from tests.support.forked import exit_status, fork


def moe(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own. It is forked: starting one anew takes seconds, for imports."""
    with TemporaryFile() as printed, TemporaryFile() as said:

        def run() -> None:
            for file, descriptor in ((printed, 1), (said, 2)):
                os.dup2(file.fileno(), descriptor)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115  they end with the process
            sys.argv = ["moe-ext", *map(str, arguments)]
            for console in (output.out, output.errors):
                console.width = 200
            os.chdir(cwd or os.curdir)
            try:
                main()
            except SystemExit as stopped:
                code = stopped.code
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else code is not None)

        status = exit_status(fork(run))
        texts = []
        for file in (printed, said):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(list(arguments), status, *texts)


def moe_anew(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command as a user runs it, for what has to begin with a process that has done nothing yet."""
    command = [sys.executable, "-m", "moe_ext", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


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
