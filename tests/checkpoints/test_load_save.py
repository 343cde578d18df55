"""Saving and loading checkpoints as whole folders."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

import moe_ext
from moe_ext import patch, unpatch
from moe_ext.checkpoints import load_save
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint, size_on_disk, write_thresholds
from moe_ext.checkpoints.read_config import read_config
from moe_ext.models import uneven_layers
from moe_ext.runtime.patching import active_thresholds
from tests.support.families import keep_of, plan_for
from tests.support.mixtral import MixtralFactory
from tests.support.paths import DEMO_MODEL


def test_a_saved_checkpoint_loads_to_the_same_weights(tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    save_checkpoint(model, tokenizer, tmp_path / "copy")
    again, again_tokenizer = load_checkpoint(tmp_path / "copy")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.dtype == again.dtype == torch.bfloat16
    assert again_tokenizer("def f(x):")["input_ids"] == tokenizer("def f(x):")["input_ids"]
    assert size_on_disk(tmp_path / "copy") == size_on_disk(DEMO_MODEL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_loads_in_the_dtype_asked_for(dtype: str) -> None:
    model, _ = load_checkpoint(DEMO_MODEL, dtype=dtype)
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
        load_checkpoint(**arguments)


def test_a_folder_with_something_in_it_is_not_written_to(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    _, tokenizer = load_checkpoint(DEMO_MODEL)
    with pytest.raises(FileExistsError, match="already exists"):
        save_checkpoint(tiny_mixtral(), tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_failed_save_leaves_nothing(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            assert list(folder.glob("*.safetensors"))  # the model was written before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tiny_mixtral(), Broken(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_save_never_looks_finished(tmp_path: Path) -> None:
    code = f"""
import sys, time
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint
model, tokenizer = load_checkpoint(r"{DEMO_MODEL}")
model.config.name_or_path = ""  # as if built in memory: the tokenizer is saved, too
class Slow:
    def save_pretrained(self, folder):
        print("half way", flush=True)
        time.sleep(60)
save_checkpoint(model, Slow(), r"{tmp_path / "out"}")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()


def test_thresholds_written_into_a_config_are_found_by_patch(tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    save_checkpoint(model, tokenizer, tmp_path / "copy")
    before = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**before, "moe_ext": {"note": "kept"}}))
    thresholds = torch.linspace(0.1, 0.9, len(model.model.layers)).unsqueeze(1)
    write_thresholds(tmp_path / "copy", thresholds, range(len(thresholds)))
    after = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert {key: value for key, value in after.items() if key != "moe_ext"} == before
    assert after["moe_ext"]["note"] == "kept"
    loaded, _ = load_checkpoint(tmp_path / "copy")
    torch.testing.assert_close(active_thresholds(patch(loaded)), thresholds)
    assert active_thresholds(unpatch(loaded)) is None


def test_thresholds_written_by_two_at_once_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoConfig.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path)
    thresholds = torch.full((1, 1), 0.5)
    other = threading.Thread(target=write_thresholds, args=(tmp_path, thresholds, [0]))
    read = read_config

    def read_while_another_writes(*args: Any, **options: Any) -> Any:
        if threading.current_thread() is not other:
            other.start()
            other.join(timeout=0.2)  # it waits for us
        return read(*args, **options)

    monkeypatch.setattr(load_save, "read_config", read_while_another_writes)
    write_thresholds(tmp_path, thresholds, [0])
    other.join()
    assert "moe_ext" in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("config", ["[]", "{", '{"model_type": "mixtral", "moe_ext": 3}', '{"a": 1, "a": 2}'])
def test_thresholds_are_not_written_into_something_else(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json: "):
        write_thresholds(tmp_path, torch.zeros(1, 1), [0])
    assert (tmp_path / "config.json").read_text() == config


# ---- from_pretrained


@pytest.fixture(params=[0, 1], ids=["even", "uneven"])
def pruned(request: pytest.FixtureRequest, tiny_mixtral: MixtralFactory, tmp_path: Path) -> Path:
    """A checkpoint whose layers have the same number of experts, or not."""
    model = tiny_mixtral()
    moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral", fewer=request.param))).save_pretrained(tmp_path)
    return tmp_path


def test_options_that_stock_from_pretrained_takes_are_passed_on(pruned: Path) -> None:
    assert moe_ext.from_pretrained(pruned, rms_norm_eps=1e-3).config.rms_norm_eps == 1e-3
    assert moe_ext.from_pretrained(pruned, dtype=torch.bfloat16).dtype == torch.bfloat16
    _, info = moe_ext.from_pretrained(pruned, output_loading_info=True)
    assert not info["missing_keys"]
    assert isinstance(moe_ext.from_pretrained(pruned, config=str(pruned)), MixtralForCausalLM)


def test_a_config_that_is_passed_is_used_and_left_as_it_was(pruned: Path) -> None:
    config = AutoConfig.from_pretrained(pruned, rms_norm_eps=1e-3)
    before = dict(vars(config))
    assert moe_ext.from_pretrained(pruned, config=config).config.rms_norm_eps == 1e-3
    assert vars(config) == before


def test_loading_leaves_no_trace_in_transformers_classes(pruned: Path) -> None:
    layer, allowed = MixtralDecoderLayer.__init__, "allow_global_per_layer_attribute_access"
    loaded = moe_ext.from_pretrained(pruned)
    assert MixtralDecoderLayer.__init__ is layer
    assert allowed not in vars(MixtralConfig)
    assert allowed not in vars(loaded.config)


@pytest.mark.parametrize("pruned", [1], indirect=True)
def test_a_load_that_fails_leaves_no_trace_in_transformers_classes(pruned: Path) -> None:
    class Broken:
        @staticmethod
        def from_pretrained(*args: Any, **options: Any) -> None:
            assert MixtralDecoderLayer.__init__ is not layer
            raise KeyboardInterrupt

    layer = MixtralDecoderLayer.__init__
    with pytest.raises(KeyboardInterrupt):
        moe_ext.from_pretrained(pruned, auto_class=Broken)
    assert MixtralDecoderLayer.__init__ is layer
    assert "allow_global_per_layer_attribute_access" not in vars(MixtralConfig)


@pytest.mark.parametrize("pruned", [1], indirect=True)
def test_a_family_whose_decoder_layers_cannot_be_told_is_refused(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uneven_layers, "_decoder_layers", lambda config: [])
    with pytest.raises(ValueError, match="the decoder layers of model type 'mixtral' cannot be told"):
        moe_ext.from_pretrained(pruned)
