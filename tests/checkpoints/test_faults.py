"""Checkpoints that are not what they look like: transformers fills in random numbers, and every job here refuses."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import moe_ext
from moe_ext.checkpoints.faults import check_loaded
from moe_ext.checkpoints.finite import is_finite
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.checkpoints.stored_tensors import INDEX, CheckpointError, stored_tensors
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from tests.support.checkpoints import rewritten, tensors_in
from tests.support.families import build, logits_of, plan_for
from tests.support.paths import DEMO_MODEL


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    build("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path / "source", max_shard_size=20_000)
    return tmp_path / "source"


def without(part: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        rewritten(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name])

    return drop


def declared(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **fields}))


def renamed(folder: Path) -> None:
    rewritten(folder, lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def emptied(folder: Path) -> None:
    rewritten(folder, lambda tensors: None)
    (folder / "model.safetensors").write_bytes(b"")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no gate": (without("layers.1.block_sparse_moe.gate"), "lacks 1 tensors, model.layers.1.mlp.gate.weight"),
    "no layer": (without("layers.2."), "lacks 9 tensors, such as model.layers.2.input_layernorm.weight"),
    "no experts": (without("experts"), r"lacks 6 tensors, such as model.layers.0.mlp.experts.down_proj"),
    "no tensor": (without(""), "lacks 30 tensors"),
    "an empty file": (emptied, "truncated"),
    "another name": (renamed, "holds neither model.safetensors nor model.safetensors.index.json"),
    "another family": (
        lambda folder: declared(folder, model_type="qwen2_moe", architectures=["Qwen2MoeForCausalLM"]),
        "lacks .*model.layers.0.mlp",
    ),
    "another family's type alone": (lambda folder: declared(folder, model_type="qwen2_moe"), "lacks .*layers.0.mlp"),
    "another width": (lambda folder: declared(folder, intermediate_size=20), r"has shape .*, expected \(8, 40, 32\)"),
    "weights elsewhere": (
        lambda folder: declared(folder, transformers_weights="other.safetensors"), "names weights of its own",
    ),
}  # fmt: skip


CONFIGS: dict[str, tuple[Any, str]] = {
    "a list": ([1], "config.json is no JSON object"),
    "a type that is none": ({"dtype": "os"}, "dtype is 'os'; expected a type of torch"),
    "a type that is a number": ({"torch_dtype": 5}, "torch_dtype is '5'; expected a type of torch"),
    "a class that is a number": ({"architectures": [5]}, r"architectures are '\[5\]'; expected a list of names"),
}


@pytest.mark.parametrize("way", ["in memory", "layer by layer"])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_none_is_refused_in_words(case: str, way: str, mixtral: Path) -> None:
    fields, message = CONFIGS[case]
    if isinstance(fields, dict):
        declared(mixtral, **fields)
    else:
        (mixtral / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        moe_ext.from_pretrained(mixtral) if way == "in memory" else LayersOnDisk(mixtral)


@pytest.mark.parametrize("way", ["in memory", "layer by layer"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_lacks_tensors_is_refused_with_names(fault: str, way: str, mixtral: Path) -> None:
    damage, message = FAULTS[fault]
    damage(mixtral)
    with pytest.raises((CheckpointError, ValueError, FileNotFoundError), match=message) as raised:
        moe_ext.from_pretrained(mixtral) if way == "in memory" else LayersOnDisk(mixtral)
    assert len(str(raised.value)) < 500 + len(str(mixtral))


def test_what_is_allowed_to_be_missing_is_named(mixtral: Path) -> None:
    without("layers.1.block_sparse_moe.gate")(mixtral)
    with pytest.warns(UserWarning, match="lacks 1 tensors, model.layers.1.mlp.gate.weight: filled with random numbers"):
        moe_ext.from_pretrained(mixtral, allow_missing=True)


def test_a_head_that_the_checkpoint_never_had_is_missing_of_any_class(mixtral: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, score\.weight"):
        moe_ext.from_pretrained(mixtral, auto_class=AutoModelForSequenceClassification)


def test_other_shapes_are_named_whatever_class_loads(mixtral: Path) -> None:
    declared(mixtral, intermediate_size=20)
    with pytest.raises(CheckpointError, match=r"down_proj has shape \(8, 32, 24\), expected \(8, 32, 20\)"):
        moe_ext.from_pretrained(mixtral, auto_class=AutoModelForCausalLM)


def test_a_message_names_few_tensors_of_bounded_length() -> None:
    with pytest.raises(CheckpointError) as raised:
        check_loaded("m", [f"{'x' * 9999}.{index}" for index in range(9999)])
    assert "lacks 9999 tensors, such as xxx" in str(raised.value)
    assert len(str(raised.value)) < 500


def edited_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_leaves_tensors_out_or_names_more_loads_as_in_transformers(mixtral: Path) -> None:
    gate, tokens = "model.layers.0.block_sparse_moe.gate.weight", torch.arange(9)[None]
    expected = logits_of(load_checkpoint_model(mixtral), tokens)
    edited_index(mixtral, lambda names: (names.update(ghost=names[gate]), names.pop(gate)))
    with pytest.warns(UserWarning, match="names 1 tensors that no shard holds, such as 'ghost': ignored"):
        assert gate in stored_tensors(mixtral)
    with pytest.warns(UserWarning, match="ghost"):
        assert torch.equal(logits_of(load_checkpoint_model(mixtral), tokens), expected)


def load_checkpoint_model(folder: Path) -> Any:
    model = moe_ext.from_pretrained(folder)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # aligned alike
    return model


@pytest.mark.parametrize("way", ["in memory", "layer by layer"])
def test_tensors_without_a_place_are_named(way: str, mixtral: Path) -> None:
    rewritten(mixtral, lambda tensors: tensors.update(stray=torch.ones(2)))
    with pytest.warns(UserWarning, match="the model has no place for 1 tensors, stray: ignored"):
        moe_ext.from_pretrained(mixtral) if way == "in memory" else LayersOnDisk(mixtral)


# ---- numbers that are none

W2 = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def broken(folder: Path, number: float) -> None:
    rewritten(folder, lambda tensors: tensors[W2][3, 5].fill_(number))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(number: float, mixtral: Path) -> None:
    broken(mixtral, number)
    shutil.copy(DEMO_MODEL / "tokenizer.json", mixtral)
    message = r"not all numbers are finite in .*model\.layers\.1\.mlp\.experts\.down_proj"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(mixtral)
    with LayersOnDisk(mixtral) as layers:
        layers.need(0)
        with pytest.raises(CheckpointError, match=message):
            layers.need(1)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_prune_copies_weights_that_are_not_finite_and_names_them(dtype: str, mixtral: Path, tmp_path: Path) -> None:
    broken(mixtral, float("nan"))
    model = build("mixtral")
    plan = plan_for(model, ((1, 2, 3),) * 3)
    with pytest.warns(UserWarning, match=r"not finite: 1 tensors, .*layers\.1\.block_sparse_moe\.experts\.1\.w2"):
        moe_ext.prune_checkpoint(mixtral, plan, tmp_path / "got", dtype=dtype, progress=False)
    written = tensors_in(tmp_path / "got")[W2.replace("experts.2", "experts.1")]
    assert written.isnan().sum() == 1
    assert written[3, 5].isnan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe_ext.prune_checkpoint(mixtral, plan_for(model, ((1, 3, 4),) * 3), tmp_path / "rest", progress=False)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_every_number_that_a_type_has_is_told_to_be_finite_or_not(dtype: torch.dtype) -> None:
    assert is_finite(torch.tensor([torch.finfo(dtype).min, 0, torch.finfo(dtype).max], dtype=dtype))
    assert is_finite(torch.empty(0, dtype=dtype))
    if dtype.itemsize == 1:
        for byte in range(256):
            number = torch.tensor([byte], dtype=torch.uint8).view(dtype)
            assert is_finite(number) == bool(number.float().isfinite())
    for strange in (float("nan"), -float("nan"), *([float("inf"), -float("inf")] if dtype.itemsize > 1 else [])):
        assert not is_finite(torch.tensor([1.0, strange, 1.0], dtype=dtype))
