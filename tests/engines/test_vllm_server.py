"""vLLM's server with our plugin, over loopback, on one and on two ranks of tensor parallelism. ``make test-vllm``."""

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint, write_thresholds
from tests.support.paths import DEMO_MODEL
from tests.support.vllm_process import VLLM, environment

pytestmark = pytest.mark.skipif(not VLLM, reason="opt-in: make test-vllm")

TOKENS = 24
PROMPTS = ["The first thing that he saw was", "In the morning, the children went"]


@contextmanager
def server(checkpoint: Path, ranks: int, log: Path) -> Iterator[str]:
    """The address of a server, which is there until the block is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(ranks), "--enforce-eager"]
    command += ["--max-model-len", "128", "--served-model-name", "pruned"]
    library = str(next(Path(moe_ext.__file__).parent.glob("_C*.so")))
    settings = environment(
        {"MOE_EXT_VLLM_LIBRARY": library, "MOE_EXT_VLLM_COUNT": "0.2", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    )
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=settings) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    with urllib.request.urlopen(f"{address}/health", timeout=5):
                        break
                except OSError:
                    time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def completed(address: str, prompt: str) -> str:
    body: dict[str, Any] = {"model": "pruned", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps({**body, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["text"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_gives_the_text_of_a_patched_model(ranks: int, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    whole, _ = load_checkpoint(DEMO_MODEL)
    plan = moe_ext.plan(moe_ext.aimer(whole), keep=6)
    moe_ext.prune_checkpoint(DEMO_MODEL, plan, folder, dtype="float32", progress=False)
    write_thresholds(folder, torch.full((4, 1), 0.6), range(4))
    model, tokenizer = load_checkpoint(folder)
    moe_ext.patch(model)
    model.generation_config.eos_token_id = None
    with server(folder, ranks, tmp_path / "log") as address:
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with moe_ext.count_skips(model) as count:
                out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
            assert 0.1 < count.rate() < 0.9
            assert completed(address, prompt) == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    said = (tmp_path / "log").read_text()
    assert "Using moe_ext's experts kernel" in said
    assert said.count("moe_ext: slots skipped: ") >= ranks
