"""Folders that are not trusted: none of their code runs, and none that their configs name is fetched."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext.bench.measure import Shape
from moe_ext.checkpoints.load_save import load_checkpoint, read_tokenizer
from moe_ext.checkpoints.read_config import read_config
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.evaluation.compare import Setting, measure
from moe_ext.pruning.prune_folder import prune_checkpoint
from tests.support.families import build, keep_of, plan_for

PLAN = plan_for(model := build("mixtral"), keep_of(model, "mixtral"))


def declared(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **fields}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def with_code(folder: Path) -> Path:
    """A folder whose config, model and tokenizer are code of its own, which leaves a file behind when it runs."""
    ran = f"open({str(folder / 'ran')!r}, 'w').close()\n"
    (folder / "own.py").write_text(ran + "from transformers import MixtralConfig\nclass Own(MixtralConfig): pass\n")
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    declared(folder, auto_map=names, model_type="own")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "tokenizer_class": "Own"}))
    return folder


JOBS: dict[str, Callable[[Path], object]] = {
    "from_pretrained": moe_ext.from_pretrained,
    "load_checkpoint": load_checkpoint,
    "layer by layer": LayersOnDisk,
    "prune": lambda folder: prune_checkpoint(folder, PLAN, folder.with_name("got")),
    "compare": lambda folder: measure(str(folder), {}, Setting()),
    "bench": Shape.of_model,
}


@pytest.mark.parametrize("job", JOBS)
def test_code_of_a_checkpoint_does_not_run_and_nobody_is_asked(
    job: str, with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with pytest.raises(ValueError, match=r"brings code of its own, which is not run; .*--trust-remote-code"):
        JOBS[job](with_code)
    assert not (with_code / "ran").exists()


def test_code_of_a_tokenizer_does_not_run(with_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with pytest.raises((ValueError, OSError)):
        read_tokenizer(with_code)
    assert not (with_code / "ran").exists()


def test_code_that_is_trusted_runs(with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert type(read_config(with_code, trust_remote_code=True)).__name__ == "Own"
    assert (with_code / "ran").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:function"},
        {"attn_implementation": {"": "sdpa", "text_config": "paged|someone/kernel"}},
        {"experts_implementation": "someone/kernel"},
        {"vision_config": {"attn_implementation": "someone/kernel"}},
    ],
)
@pytest.mark.parametrize("job", ["from_pretrained", "layer by layer", "prune"])
def test_a_kernel_that_a_config_names_is_not_fetched(job: str, fields: dict[str, Any], folder: Path) -> None:
    declared(folder, **fields)
    with pytest.raises(ValueError, match=r"names the kernel '.*someone/kernel.*', whose code would be fetched and run"):
        JOBS[job](folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        moe_ext.from_pretrained(folder)


def test_an_adapter_is_not_left_out_in_silence(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    for job in ("layer by layer", "prune"):
        with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config\.json\)"):
            JOBS[job](folder)
