"""Folders are quantised from file to file into what others load, and are whole or absent."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

import moe_ext
from moe_ext.checkpoints.stored_tensors import CheckpointError
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.packed_experts import WeightFormat
from moe_ext.pruning import shard_writer
from moe_ext.quantisation import folder as quantise_folder
from moe_ext.runtime.formulas import experts_layer
from tests.support.checkpoints import rewritten, tensors_in
from tests.support.command_line import moe_json
from tests.support.families import build, plan_for
from tests.support.packed import FORMATS, SIZES, arguments, same_bits, same_state, with_floats
from tests.support.quantised import modules


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral in the Hub's layout, with a file beside its weights."""
    folder = tmp_path_factory.mktemp("quantise") / "source"
    build("mixtral", dtype=torch.bfloat16, num_local_experts=4, **SIZES).save_pretrained(folder)
    (folder / "LICENSE").write_text("text")
    return folder


@pytest.fixture(params=list(FORMATS))
def form(request: pytest.FixtureRequest) -> WeightFormat:
    return FORMATS[request.param]


def declared(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def test_compressed_tensors_reads_the_numbers_that_run(source: Path, form: WeightFormat, tmp_path: Path) -> None:
    moe_ext.quantize_checkpoint(source, out=tmp_path / "out", progress=False, **arguments(form))
    config = QuantizationConfig.model_validate(declared(tmp_path / "out"))
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    model = moe_ext.from_pretrained(tmp_path / "out")
    layers = [experts_layer(block.experts) for block in moe_blocks(model)]
    stored = modules(tensors_in(tmp_path / "out"))
    assert len(stored) == 2 * 4 * 3
    for module, tensors in stored.items():
        layer, expert, name = int(module.split(".")[2]), int(module.split(".")[-3]), module.split(".")[-2]
        rows = layers[layer].rows(expert)
        expected = {"w1": rows[:128], "w3": rows[128:], "w2": layers[layer].outputs(expert)}[name]
        got = compressor.decompress(dict(tensors), scheme)["weight"]
        # It multiplies in bfloat16, which rounds the same product once.
        assert torch.equal(got.bfloat16(), expected.bfloat16()), module


def test_memory_and_files_give_the_same(source: Path, form: WeightFormat, tmp_path: Path) -> None:
    moe_ext.quantize_checkpoint(source, out=tmp_path / "out", progress=False, **arguments(form))
    model = moe_ext.quantize(moe_ext.from_pretrained(source), **arguments(form))
    loaded = moe_ext.from_pretrained(tmp_path / "out")
    assert same_state(model, loaded)
    expected = tensors_in(tmp_path / "out")
    for saved, each in (("model", model), ("loaded", loaded)):
        each.save_pretrained(tmp_path / saved)
        got = tensors_in(tmp_path / saved)
        assert got.keys() == expected.keys()
        assert [name for name in got if not same_bits(got[name], expected[name])] == []
        assert declared(tmp_path / saved) == declared(tmp_path / "out")


def test_all_else_is_copied(source: Path, tmp_path: Path) -> None:
    moe_ext.quantize_checkpoint(source, "int4", tmp_path / "out", progress=False)
    before, after = tensors_in(source), tensors_in(tmp_path / "out")
    others = {name for name in before if ".experts." not in name}
    assert others == {name for name in after if ".experts." not in name}
    assert all(same_bits(before[name], after[name]) for name in others)
    assert (tmp_path / "out" / "LICENSE").read_text() == "text"
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **config,
        "quantization_config": declared(tmp_path / "out"),
    }
    matrices = {name.removesuffix(".weight") for name in others if before[name].dim() == 2 and "embed" not in name}
    assert set(declared(tmp_path / "out")["ignore"]) == matrices


def test_an_interrupted_run_leaves_nothing_that_looks_finished_and_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"shard_size": 60_000, "progress": False}
    moe_ext.quantize_checkpoint(source, "int4", tmp_path / "whole", **options)
    write, left = shard_writer.write_shard, [2]
    written = []

    def interrupted(path: Path, *arguments: Any) -> list[str]:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        written.append(path.name)
        return write(path, *arguments)

    monkeypatch.setattr(quantise_folder, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moe_ext.quantize_checkpoint(source, "int4", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    left[0] = 1000
    moe_ext.quantize_checkpoint(source, "int4", tmp_path / "out", **options)
    assert len(written) == len(set(written)) > 3  # none twice
    whole, got = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out"))
    assert whole == got
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_stored_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    build("granitemoe", **SIZES).save_pretrained(tmp_path / "fused")
    build("gpt_oss", **SIZES).save_pretrained(tmp_path / "gpt_oss")
    build("mixtral", **{**SIZES, "intermediate_size": 96}).save_pretrained(tmp_path / "narrow")
    moe_ext.quantize_checkpoint(source, "int8", tmp_path / "quantised", progress=False)
    for name, kind, said in (
        ("fused", "int4", "granitemoe checkpoints hold all experts of a layer in one tensor"),
        ("gpt_oss", "int4", "or store them as mxfp4, gpt-oss' own form"),
        ("narrow", "int4", r"w2\.weight has 96 columns; group_size 128 does not divide them"),
        ("quantised", "int4", "holds compressed-tensors weights already"),
    ):
        with pytest.raises(ValueError, match=said):
            moe_ext.quantize_checkpoint(tmp_path / name, kind, tmp_path / "out", progress=False)
        assert not list(tmp_path.glob("*out*"))
        if name in ("fused", "gpt_oss", "narrow"):  # in memory they run; what cannot be stored is not
            model = moe_ext.quantize(moe_ext.from_pretrained(tmp_path / name), kind)
            with pytest.raises(ValueError, match=r"in one tensor|does not divide"):
                model.save_pretrained(tmp_path / "out")
            assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_an_error_with_the_tensors_name(source: Path, tmp_path: Path) -> None:
    build("mixtral", **SIZES).save_pretrained(tmp_path / "source")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][5, 7] = torch.nan

    rewritten(tmp_path / "source", spoil)
    with pytest.raises(CheckpointError, match=r"layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight' holds numbers"):
        moe_ext.quantize_checkpoint(tmp_path / "source", "fp8", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_gpt_oss_is_stored_as_transformers_reads_it(tmp_path: Path) -> None:
    build("gpt_oss", dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path / "source")
    moe_ext.quantize_checkpoint(tmp_path / "source", "mxfp4", tmp_path / "out", progress=False, shard_size=100_000)
    stock = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=transformers.Mxfp4Config(dequantize=True), dtype="auto"
    )
    model = moe_ext.from_pretrained(tmp_path / "out")
    assert same_state(with_floats(model, copy.deepcopy(stock)), stock)
    model.save_pretrained(tmp_path / "saved")
    got, expected = tensors_in(tmp_path / "saved"), tensors_in(tmp_path / "out")
    assert got.keys() == expected.keys()
    assert all(same_bits(got[name], expected[name]) for name in got)
    assert declared(tmp_path / "saved") == declared(tmp_path / "out")


def test_a_quantised_folder_is_pruned_as_a_pruned_one_is_quantised(source: Path, tmp_path: Path) -> None:
    plan = plan_for(build("mixtral", num_local_experts=4, **SIZES), ((0, 2, 3), (1, 2, 3)))
    asked: dict[str, Any] = {"progress": False, "group_size": 32}
    moe_ext.quantize_checkpoint(source, "int4", tmp_path / "q", **asked)
    moe_ext.prune_checkpoint(tmp_path / "q", plan, tmp_path / "q, p", progress=False)
    moe_ext.prune_checkpoint(source, plan, tmp_path / "p", progress=False)
    moe_ext.quantize_checkpoint(tmp_path / "p", "int4", tmp_path / "p, q", **asked)
    got, expected = tensors_in(tmp_path / "q, p"), tensors_in(tmp_path / "p, q")
    assert got.keys() == expected.keys()
    assert all(same_bits(got[name], expected[name]) for name in got)
    assert declared(tmp_path / "q, p") == declared(tmp_path / "p, q")


def test_the_command_line_writes_the_same(source: Path, tmp_path: Path) -> None:
    options = ("--experts", "int4", "--group-size", "64", "--asymmetric")
    said = moe_json("quantize", source, "--out", tmp_path / "got", *options)
    moe_ext.quantize_checkpoint(source, "int4", tmp_path / "expected", group_size=64, symmetric=False, progress=False)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("got", "expected")]
    assert files[0] == files[1]
    assert said["weight_bytes"] < said["weight_bytes_before"]
