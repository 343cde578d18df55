"""A server with OpenAI's interface in a process of its own, over loopback."""

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def server(
    command: list[str], log: Path, *, environment: Mapping[str, str] | None = None, patience: float = 600
) -> Iterator[str]:
    """The address of a server, which is there until the block is left.

    Args:
        command: starts it, but for the options that say where it listens.
        log: takes all that it says.
        environment: its own; None: that of this process.
        patience: seconds in which it has to be ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            last = time.monotonic() + patience
            while not _is_ready(address):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < last, log.read_text()[-4000:]
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def completed(address: str, model: str, prompt: str, **fields: Any) -> str:
    """The most likely text after a prompt."""
    body = {"model": model, "prompt": prompt, "temperature": 0, **fields}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["text"])
