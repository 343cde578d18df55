"""Folders with quantised experts, whoever wrote them, are loaded packed: the numbers of their format's own library."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FineGrainedFP8Config

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.packed_experts import WeightFormat, packed_format
from moe_ext.runtime.formulas import experts_layer
from tests.support.batches import random_tokens
from tests.support.checkpoints import declare_float8, plain_copy, quantise, rewritten, tensors_in
from tests.support.families import build
from tests.support.packed import SIZES, same_bits, same_state, with_floats
from tests.support.paths import DEMO_MODEL
from tests.support.quantised import FORMS, modules, write

RUN = {
    "compressed-tensors, 4 bits": WeightFormat("int4", 32),
    "compressed-tensors, 8 bits packed": WeightFormat("int8", 0),
    "compressed-tensors, int8": WeightFormat("int8", 0),
    "compressed-tensors, float8": WeightFormat("fp8", 0),
    "compressed-tensors, MXFP4": WeightFormat("mxfp4", 32),
    "GPTQ, 4 bits": WeightFormat("int4", 32, symmetric=False),
    "AWQ": WeightFormat("int4", 32, symmetric=False),
    "float8, a scale a tensor": WeightFormat("fp8", 0),
    "float8, static": WeightFormat("fp8", 0),
}
REFUSED = {
    "compressed-tensors, 4 bits and zeros": r"int4 with scales \(64, 4\)",
    "compressed-tensors, float8 in blocks": r"float8 \(64, 64\) with scales \(4, 2\)",
    "compressed-tensors, NVFP4": "NVFP4",
    "GPTQ, 8 bits": "GPTQ's numbers of 8 bits",
}
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}


def written(name: str, folder: Path) -> Path:
    build("mixtral", dtype=torch.bfloat16, **SMALL).save_pretrained(folder)
    write(FORMS[name](), folder)
    return folder


@pytest.mark.parametrize("name", RUN)
def test_numbers_are_those_that_the_formats_own_code_reads(name: str, tmp_path: Path) -> None:
    form, folder = FORMS[name](), written(name, tmp_path / "source")
    model = moe_ext.from_pretrained(folder)
    assert {packed_format(block.experts) for block in moe_blocks(model)} == {RUN[name]}
    layers = [experts_layer(block.experts) for block in moe_blocks(model)]
    for module, stored in modules(tensors_in(folder)).items():
        layer, expert, key = int(module.split(".")[2]), int(module.split(".")[-3]), module.split(".")[-2]
        rows = layers[layer].rows(expert)
        got = {"w1": rows[:64], "w3": rows[64:], "w2": layers[layer].outputs(expert)}[key]
        assert torch.equal(got.bfloat16(), form.read(stored).bfloat16())
    save_checkpoint(model, None, tmp_path / "saved")  # in compressed-tensors' layout, whatever they came from
    again = moe_ext.from_pretrained(tmp_path / "saved")
    before, after = model.state_dict(), again.state_dict()
    assert all(same_bits(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_that_the_operators_do_not_take_are_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path / "source")
    with pytest.raises(ValueError, match=rf"source: .*experts\.0\.w1\.weight is stored as {REFUSED[name]}"):
        moe_ext.from_pretrained(folder)


def test_columns_in_another_order_than_their_own_are_refused(tmp_path: Path) -> None:
    folder = written("GPTQ, 4 bits", tmp_path / "source")

    def turned(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("g_idx"):
                tensors[name] = tensors[name].flip(0).contiguous()

    rewritten(folder, turned)
    with pytest.raises(ValueError, match="act-order"):
        moe_ext.from_pretrained(folder)


def test_other_quantised_weights_become_what_they_stand_for(tmp_path: Path) -> None:
    """DeepSeek-V3 as it is published: all projections float8 in blocks, experts and others."""
    build("deepseek_v3", dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path / "source")
    rewritten(tmp_path / "source", lambda tensors: quantise(tensors, 128))
    declare_float8(tmp_path / "source", 128)
    plain_copy(tmp_path / "source", tmp_path / "plain", 128)
    model = moe_ext.from_pretrained(tmp_path / "source")
    stock = moe_ext.from_pretrained(tmp_path / "source", quantization_config=FineGrainedFP8Config(dequantize=True))
    assert {packed_format(block.experts) for block in moe_blocks(model)} == {WeightFormat("fp8", 128)}
    expected = stock.state_dict()
    inside = tuple(f"{block.name}.experts." for block in moe_blocks(model))
    assert expected.keys() - model.state_dict().keys() == set()
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside):
            assert same_bits(tensor, expected[name]), name
    assert same_state(with_floats(model, copy.deepcopy(stock)), stock)


def test_the_loaded_model_computes_what_a_dequantised_one_does(tmp_path: Path) -> None:
    folder = written("AWQ", tmp_path / "source")
    model = moe_ext.from_pretrained(folder, dtype=torch.float32)
    stock = transformers.MixtralForCausalLM(model.config).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
    stock.load_state_dict(state, strict=False)
    with torch.no_grad():
        got, expected = (
            each(random_tokens(2, 12)).logits for each in (moe_ext.patch(model), with_floats(model, stock))
        )
    assert float((got - expected).abs().max()) <= 2e-4 * float(expected.abs().max())  # float32 sums in other orders


def test_the_command_lines_loading_runs_them_too(tmp_path: Path) -> None:
    folder = written("compressed-tensors, 4 bits", tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_MODEL / name).read_bytes())
    model, tokenizer = load_checkpoint(folder, dtype="float32")
    assert packed_format(moe_blocks(model)[0].experts) == RUN["compressed-tensors, 4 bits"]
    assert moe_blocks(model)[0].experts.down_proj_scales.dtype == torch.bfloat16  # as stored
    assert model.dtype == torch.float32
    save_checkpoint(model, tokenizer, tmp_path / "saved")
    before, after = tensors_in(folder), tensors_in(tmp_path / "saved")
    assert all(same_bits(before[name], after[name]) for name in before if ".experts." in name)


def test_no_experts_are_ever_in_memory_as_floats(tmp_path: Path) -> None:
    folder = written("AWQ", tmp_path / "source")
    largest = [0]

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else (out,):
                if isinstance(each, torch.Tensor) and each.is_floating_point() and not each.is_meta:
                    largest[0] = max(largest[0], each.numel())
            return out

    with Watching():
        model = moe_ext.from_pretrained(folder)
    embeddings = model.get_input_embeddings().weight.numel()
    assert largest[0] <= max(2 * 64 * 64, embeddings) < 4 * 64 * 64  # two projections of one expert


def test_options_without_a_meaning_are_refused(tmp_path: Path) -> None:
    folder = written("AWQ", tmp_path / "source")
    with pytest.raises(ValueError, match=r"loaded packed; from_pretrained then has no option 'device_map'"):
        moe_ext.from_pretrained(folder, device_map="auto")
