"""Saving and loading checkpoints as whole folders."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ext import checkpoint, patch, unpatch
from moe_ext.patching import active_thresholds
from tests.conftest import DEMO_MODEL, MixtralFactory


def test_a_saved_checkpoint_loads_to_the_same_weights(tmp_path: Path) -> None:
    model, tokenizer = checkpoint.load(DEMO_MODEL)
    checkpoint.save(model, tokenizer, tmp_path / "copy")
    again, again_tokenizer = checkpoint.load(tmp_path / "copy")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.dtype == again.dtype == torch.bfloat16
    assert again_tokenizer("def f(x):")["input_ids"] == tokenizer("def f(x):")["input_ids"]
    assert checkpoint.size_on_disk(tmp_path / "copy") == checkpoint.size_on_disk(DEMO_MODEL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_loads_in_the_dtype_asked_for(dtype: str) -> None:
    model, _ = checkpoint.load(DEMO_MODEL, dtype=dtype)
    assert model.dtype == getattr(torch, dtype)
    assert not model.training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"checkpoint": DEMO_MODEL, "dtype": "int4"}, ValueError, "dtype is 'int4'; expected auto, float32"),
        ({"checkpoint": "./no/such"}, FileNotFoundError, r"there is no checkpoint folder \./no/such"),
        ({"checkpoint": "/no/such"}, FileNotFoundError, "there is no checkpoint folder /no/such"),
    ],
)
def test_what_cannot_be_loaded_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        checkpoint.load(**arguments)


def test_a_folder_with_something_in_it_is_not_written_to(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    _, tokenizer = checkpoint.load(DEMO_MODEL)
    with pytest.raises(FileExistsError, match="already exists"):
        checkpoint.save(tiny_mixtral(), tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_failed_save_leaves_nothing(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            assert list(folder.glob("*.safetensors"))  # the model was written before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tiny_mixtral(), Broken(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_save_never_looks_finished(tmp_path: Path) -> None:
    code = f"""
import sys, time
from moe_ext import checkpoint
model, tokenizer = checkpoint.load(r"{DEMO_MODEL}")
class Slow:
    def save_pretrained(self, folder):
        print("half way", flush=True)
        time.sleep(60)
checkpoint.save(model, Slow(), r"{tmp_path / "out"}")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()


def test_thresholds_written_into_a_config_are_found_by_patch(tmp_path: Path) -> None:
    model, tokenizer = checkpoint.load(DEMO_MODEL)
    checkpoint.save(model, tokenizer, tmp_path / "copy")
    before = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**before, "moe_ext": {"note": "kept"}}))
    thresholds = torch.linspace(0.1, 0.9, len(model.model.layers)).unsqueeze(1)
    checkpoint.write_thresholds(tmp_path / "copy", thresholds)
    after = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert {key: value for key, value in after.items() if key != "moe_ext"} == before
    assert after["moe_ext"]["note"] == "kept"
    loaded, _ = checkpoint.load(tmp_path / "copy")
    torch.testing.assert_close(active_thresholds(patch(loaded)), thresholds)
    assert active_thresholds(unpatch(loaded)) is None
