"""``transformers serve`` through engines/transformers/serve.py: a pruned checkpoint that skips, over loopback."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint
from moe_ext.models.blocks import moe_blocks
from tests.support.families import keep_of, plan_for
from tests.support.paths import DEMO_MODEL, ROOT

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
PROMPT = "def add(a, b):"


@contextmanager
def server(checkpoint: Path, options: tuple[str, ...], log: Path) -> Iterator[str]:
    """The address of a server, which is there until the block is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "engines" / "transformers" / "serve.py"), str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32", *options]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    with urllib.request.urlopen(f"{address}/health", timeout=5):
                        break
                except OSError:
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def completed(address: str, checkpoint: Path) -> str:
    body: dict[str, Any] = {"model": str(checkpoint), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["text"])


# Small: by default the cache takes most of the machine's memory.
PAGED = ("--continuous-batching", "--cb-block-size", "16", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "64")


@pytest.mark.parametrize("options", [(), PAGED], ids=["one by one", "continuous batching"])
def test_a_server_gives_the_text_of_a_patched_model(options: tuple[str, ...], tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral", fewer=1)))  # layers differ: stock does not load it
    blocks = len(moe_blocks(model))
    moe_ext.patch(model, skip=torch.full((blocks, 1), 0.6))
    save_checkpoint(model, tokenizer, tmp_path / "pruned")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with moe_ext.count_skips(model) as count:
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert 0.1 < count.rate() < 0.9
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    with server(tmp_path / "pruned", options, tmp_path / "log") as address:
        assert completed(address, tmp_path / "pruned") == expected
