"""The server that runs commands with faults, the inputs that commands are given, and what they leave."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import moe_ext
from moe_ext.checkpoints.load_save import save_checkpoint
from moe_ext.runtime.batches import read_domains, token_batches
from tests.support.gguf_files import PLAN, mixtral_fields, mixtral_tensors, write_gguf
from tests.support.paths import DEMO_MODEL

Tree = dict[str, bytes]


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: exit code, or minus the signal that killed it.
        calls: to the system that change files, if it was not killed.
        errors: what it wrote to stderr.
    """

    status: int
    calls: int
    errors: str


class Server:
    """Runs commands in children of one process; see tests/faults/server.py."""

    def __init__(self, shim: Path, folder: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", str(shim)],
            env={**environment, "LD_PRELOAD": str(shim)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, work: Path, arguments: str, *, out: Path | None = None, **request: Any) -> list[Ended]:
        """Runs a command in the folder ``work``, in one or several ``processes`` at once, with a ``fault`` (the number
        of a call, and an error or 0 to be killed), a ``limit`` of bytes a file or as another ``user``."""
        asked = {
            "work": str(work),
            "arguments": arguments.split(),
            "out": str(out or self._folder / "out"),
            **request,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return [Ended(**result) for result in json.loads(self.process.stdout.readline())]


@contextmanager
def server_with_shim(folder: Path) -> Iterator[Server]:
    shim = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    server = Server(shim, folder)
    try:
        yield server
    finally:
        assert server.process.stdin is not None
        server.process.stdin.close()
        server.process.wait()


def make_inputs(folder: Path) -> None:
    """A tiny Mixtral with the demo model's tokenizer, texts, and what commands make of them; a GGUF and its plan."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    model = MixtralForCausalLM(config).to(torch.bfloat16).eval()
    folder.mkdir()
    save_checkpoint(model, tokenizer, folder / "model")
    for name in ("text", "more"):
        (folder / name).mkdir()
        text = (DEMO_MODEL / "held_out" / "python.txt").read_text()
        (folder / name / "python.txt").write_text(text[:900] if name == "text" else text[900:1500])
    for name in ("text", "more"):
        batches = list(token_batches(read_domains([folder / name]), tokenizer, window=32, batch_size=4))
        stats = moe_ext.calibrate(model, batches, progress=False, shard=name, dataset="python")
        stats.save(folder / f"{name}.safetensors")
        if name == "text":
            moe_ext.plan(moe_ext.score(stats, "man"), keep=3).save(folder / "plan.json")
            moe_ext.search(model, batches, keep=3, progress=False).save(folder / "losses.safetensors")
    write_gguf(folder / "tiny.gguf", mixtral_tensors(Kind.Q4_0), mixtral_fields())
    PLAN.save(folder / "gguf.json")


def tree(folder: Path) -> Tree:
    """Every file below a folder by its path, and every folder; a comparison without what was timed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[f"{name}/"] = b""
        elif path.name == "compare.json" and path.stat().st_size:
            content = json.loads(path.read_text())
            for row in content["checkpoints"]:
                row["tokens_per_second"] = row["peak_bytes"] = None
            found[name] = json.dumps(content).encode()
        else:
            found[name] = path.read_bytes()
    return found


def differing(got: Tree, expected: Tree) -> list[str]:
    """The names of what is in one tree only, or another there."""
    return sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))


def fresh(inputs: Path, work: Path) -> Path:
    """A folder to work in, with its own copy of the inputs."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shutil.copytree(inputs, work / "in")
    for name in ("out", "scratch"):
        (work / name).mkdir()
    return work
