"""Statistics of GGUF files beside a config: those of the model whose weights they hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import moe_ext
from moe_ext.checkpoints.stored_tensors import CheckpointError
from tests.support.batches import padded_batches
from tests.support.families import build
from tests.support.gguf_converter import FAMILIES, convert, differing, model_of
from tests.support.gguf_files import Tensors


def kind_of(kind: str) -> Callable[[str], Kind]:
    """The type of a tensor by its name; as in gpt-oss's own files, MXFP4 is for experts alone."""
    return lambda name: Kind[kind] if kind != "MXFP4" or "exps" in name else Kind.Q8_0


def written(family: str, kind: str, folder: Path, **options: Any) -> tuple[Path, Path]:
    """A folder, and one with a GGUF file in the place of its weights."""
    architecture, _, own = FAMILIES[family]
    return convert(model_of(family), architecture, kind_of(kind), folder, **{**own, **options})


def assert_same(got: moe_ext.ExpertStatistics, expected: moe_ext.ExpertStatistics) -> None:
    assert torch.equal(got.coactivation, expected.coactivation)
    torch.testing.assert_close(got.moments, expected.moments, rtol=1e-4, atol=0)  # memory may be aligned otherwise


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "Q8_0") for family in FAMILIES), ("mixtral", "F32"), ("granitemoe", "F16"), ("deepseek_v3", "BF16"),
     ("gpt_oss", "MXFP4")],
)  # fmt: skip
def test_statistics_are_those_of_the_folder_that_was_converted(family: str, kind: str, tmp_path: Path) -> None:
    plain, source = written(family, kind, tmp_path, split=9 if kind == "Q8_0" else 0)
    assert (differing(model_of(family), plain, tmp_path / "before") > 10) == (kind != "F32")
    got = moe_ext.calibrate(source, padded_batches(), progress=False)
    assert_same(got, moe_ext.calibrate(plain, padded_batches(), progress=False))


def fuse(held: Tensors) -> None:
    """As the converter's --fuse-gate-up-exps does."""
    for name in [name for name in held if "ffn_gate_exps" in name]:
        (gate, kind), (up, _) = held.pop(name), held.pop(name.replace("gate", "up"))
        held[name.replace("gate", "gate_up")] = (numpy.concatenate([gate, up], 1), kind)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gate_and_up_may_be_one_tensor(family: str, tmp_path: Path) -> None:
    plain, source = written(family, "Q8_0", tmp_path, change=fuse)
    got = moe_ext.calibrate(source, padded_batches(), progress=False)
    assert_same(got, moe_ext.calibrate(plain, padded_batches(), progress=False))


def test_latent_attention_may_be_there_in_both_forms_and_is_refused_in_half_of_one(tmp_path: Path) -> None:
    halves = {f"blk.{layer}.attn_{part}_b.weight": (numpy.zeros((64, 64), numpy.float32), Kind.F32)
              for layer in (0, 1) for part in "kv"}  # fmt: skip
    plain, source = written("deepseek_v2", "F32", tmp_path / "both", change=lambda held: held.update(halves))
    got = moe_ext.calibrate(source, padded_batches(), progress=False)
    assert_same(got, moe_ext.calibrate(plain, padded_batches(), progress=False))
    _, source = written("deepseek_v3", "F32", tmp_path / "half", change=lambda held: held.pop("blk.1.attn_v_b.weight"))
    with pytest.raises(CheckpointError, match=r"holds 'blk\.1\.attn_k_b\.weight' without its neighbour"):
        moe_ext.calibrate(source, padded_batches(), progress=False)
    _, source = written("deepseek_v2", "F32", tmp_path / "flat", change=lambda held: (
        held.update(halves), held.pop("blk.0.attn_kv_b.weight")))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"has shape \(64, 64\), which does not fit .* newer llama\.cpp"):
        moe_ext.calibrate(source, padded_batches(), progress=False)


def test_a_config_that_declares_the_published_weights_quantised_is_read(tmp_path: Path) -> None:
    plain, source = written("gpt_oss", "MXFP4", tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (source / "config.json").write_text(json.dumps(config))
    got = moe_ext.calibrate(source, padded_batches(), progress=False)
    assert_same(got, moe_ext.calibrate(plain, padded_batches(), progress=False))


@pytest.mark.parametrize(
    ("name", "message"),
    [("blk.0.attn_gate.weight", r"'blk\.0\.attn_gate\.weight' of a 'olmoe' file has no known place in the model"),
     ("blk.2.ffn_up_exps.weight", "holds experts of layer 2, in which the config's model has none")],
)  # fmt: skip
def test_a_tensor_without_a_place_is_refused(name: str, message: str, tmp_path: Path) -> None:
    more = {name: (numpy.zeros((8, 64, 64), numpy.float32), Kind.F32)}
    _, source = written("olmoe", "F32", tmp_path, change=lambda held: held.update(more))
    with pytest.raises(ValueError, match=message):
        moe_ext.calibrate(source, padded_batches(), progress=False)


def test_a_package_that_is_too_old_for_an_architecture_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, source = written("olmoe", "F32", tmp_path)
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", {})
    with pytest.raises(ValueError, match=r"does not know the architecture 'olmoe': pip install --upgrade gguf"):
        moe_ext.calibrate(source, padded_batches(), progress=False)


def test_experts_of_two_shapes_are_refused(tmp_path: Path) -> None:
    wider = {"blk.0.ffn_up_exps.weight": (numpy.zeros((8, 96, 64), numpy.float32), Kind.F32)}
    _, source = written("olmoe", "F32", tmp_path, change=lambda held: held.update(wider))
    with pytest.raises(CheckpointError, match=r"has shape \(8, 96, 64\) and \(12, 64, 64\); expected one"):
        moe_ext.calibrate(source, padded_batches(), progress=False)


def test_a_search_runs_on_a_gguf_file(tmp_path: Path) -> None:
    plain, source = written("mixtral", "Q8_0", tmp_path)
    got = moe_ext.search(source, padded_batches(), keep=4, progress=False)
    assert got.plan.keep == moe_ext.search(plain, padded_batches(), keep=4, progress=False).plan.keep
    moe_ext.prune_gguf(source / "model.gguf", got.plan, tmp_path / "got.gguf", progress=False)


def test_what_a_folder_with_a_gguf_file_cannot_is_refused(tmp_path: Path) -> None:
    _, source = written("mixtral", "F32", tmp_path)
    stats = moe_ext.calibrate(source, padded_batches(), progress=False)
    plan = moe_ext.plan(moe_ext.score(stats, "ean"), keep=4)
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    shutil.copy(source / "model.gguf", source / "other.gguf")
    with pytest.raises(CheckpointError, match="holds 2 GGUF files; expected one, or one split set"):
        moe_ext.calibrate(source, padded_batches(), progress=False)
    (source / "other.gguf").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(CheckpointError, match=r"has other shapes than the model"):
        moe_ext.calibrate(source, padded_batches(), progress=False)
    build("jamba").config.save_pretrained(source)
    with pytest.raises(ValueError, match=r"made for mixtral, qwen2_moe, .*; the config is of 'jamba'"):
        moe_ext.calibrate(source, padded_batches(), progress=False)
