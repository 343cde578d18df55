"""Statistics of GGUF files beside a config: those of the model whose weights they hold."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

import moe_ext
from moe_ext.checkpoints.stored_tensors import CheckpointError
from tests.support.batches import padded_batches
from tests.support.families import build
from tests.support.gguf_files import write_gguf

SHARED: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16}
WIDTHS = {"intermediate_size": 64, "moe_intermediate_size": 64}  # their first layer is dense
FAMILIES: dict[str, tuple[str, gguf.MODEL_ARCH, dict[str, Any]]] = {
    "mixtral": ("llama", gguf.MODEL_ARCH.LLAMA, {"intermediate_size": 64}),
    "qwen2_moe": (
        "qwen2moe",
        gguf.MODEL_ARCH.QWEN2MOE,
        {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 32, "mlp_only_layers": []},
    ),
    "qwen3_moe": ("qwen3moe", gguf.MODEL_ARCH.QWEN3MOE, {"moe_intermediate_size": 64}),
    "olmoe": ("olmoe", gguf.MODEL_ARCH.OLMOE, {"intermediate_size": 64}),
    "glm4_moe": ("glm4moe", gguf.MODEL_ARCH.GLM4_MOE, {**WIDTHS, "use_qk_norm": True, "num_nextn_predict_layers": 1}),
    "dots1": ("dots1", gguf.MODEL_ARCH.DOTS1, WIDTHS),
    "ernie4_5_moe": ("ernie4_5-moe", gguf.MODEL_ARCH.ERNIE4_5_MOE, WIDTHS),
}  # fmt: skip


def model_of(family: str) -> PreTrainedModel:
    return build(family, **SHARED, **FAMILIES[family][2])


def write(model: PreTrainedModel, family: str, kind: Kind, folder: Path, split: int = 0) -> None:
    """The model as llama.cpp's converter writes it: names by llama.cpp's own table, rows of Mixtral's queries and keys
    as in its conversion/llama.py. The model then holds what the file stands for."""
    name, architecture, _ = FAMILIES[family]
    table = gguf.get_tensor_name_map(architecture, 2)
    tensors = {}

    def put(key: str, tensor: torch.Tensor, suffix: str) -> None:
        values = tensor.detach().numpy()
        held = kind if values.ndim > 1 and "gate_inp" not in key else Kind.F32
        tensors[key + suffix] = (quantize(numpy.ascontiguousarray(values), held), held)
        tensor.data.copy_(torch.from_numpy(dequantize(*tensors[key + suffix])).view(tensor.shape))

    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if ".experts." in key:
                layer = int(key.split(".")[2])
                if key.endswith("gate_up_proj"):
                    gate, up = (part.clone() for part in tensor.chunk(2, 1))
                    put(f"blk.{layer}.ffn_gate_exps", gate, ".weight")
                    put(f"blk.{layer}.ffn_up_exps", up, ".weight")
                    tensor.copy_(torch.cat([gate, up], 1))
                else:
                    put(f"blk.{layer}.ffn_down_exps", tensor, ".weight")
                continue
            stem, _, suffix = key.rpartition(".")
            if suffix == "e_score_correction_bias":
                stem, suffix = f"{stem.replace('mlp.gate.moe_statics', 'mlp.moe_statics')}.e_score_correction", "bias"
                bias = tensor.reshape(-1).clone()
                put(str(table.get_name(stem)), bias, ".bias")
                continue
            stem = stem.replace("mlp.gate", "block_sparse_moe.gate") if family == "mixtral" else stem
            place = table.get_name(stem)
            assert place is not None, key
            heads = {"q_proj": 4, "k_proj": 2}.get(stem.rsplit(".", 1)[-1])
            if family == "mixtral" and heads is not None:
                halves = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2)
                turned = halves.flatten(0, 2).clone()
                put(place, turned, f".{suffix}")
                tensor.copy_(turned.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2))
            elif stem.endswith("shared_expert_gate"):
                row = tensor[0].clone()
                put(place, row, f".{suffix}")
                tensor.copy_(row[None])
            else:
                put(place, tensor, f".{suffix}")
    folder.mkdir()
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    further = getattr(model.config, "num_nextn_predict_layers", 0) if family == "glm4_moe" else 0
    for layer in range(2, 2 + further):  # of which transformers has nothing
        tensors[f"blk.{layer}.nextn.eh_proj.weight"] = (numpy.zeros((64, 128), numpy.float32), Kind.F32)
        tensors[f"blk.{layer}.ffn_gate_exps.weight"] = (numpy.zeros((8, 64, 64), numpy.float32), Kind.F32)
    counts = {"block_count": 2 + further, "expert_count": 8, "expert_used_count": 2}
    counts |= {"nextn_predict_layers": further} if further else {}
    fields = {f"{name}.{field}": (number, gguf.GGUFValueType.UINT32) for field, number in counts.items()}
    write_gguf(folder / "model.gguf", tensors, fields, architecture=name, split=split)


def assert_same(got: moe_ext.ExpertStatistics, expected: moe_ext.ExpertStatistics) -> None:
    assert torch.equal(got.coactivation, expected.coactivation)
    torch.testing.assert_close(got.moments, expected.moments, rtol=1e-4, atol=0)  # memory may be aligned otherwise


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_model_that_the_file_holds(family: str, kind: Kind, tmp_path: Path) -> None:
    model = model_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(model, family, kind, tmp_path / "source", split=9 if kind == Kind.Q8_0 else 0)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert (len(changed) > 10) == (kind == Kind.Q8_0)
    got = moe_ext.calibrate(tmp_path / "source", padded_batches(), progress=False)
    assert_same(got, moe_ext.calibrate(model, padded_batches(), progress=False))


def test_a_search_runs_on_a_gguf_file(tmp_path: Path) -> None:
    write(model := model_of("mixtral"), "mixtral", Kind.Q8_0, tmp_path / "source")
    got = moe_ext.search(tmp_path / "source", padded_batches(), keep=4, progress=False)
    assert got.plan.keep == moe_ext.search(model, padded_batches(), keep=4, progress=False).plan.keep
    moe_ext.prune_gguf(tmp_path / "source" / "model.gguf", got.plan, tmp_path / "got.gguf", progress=False)


def test_what_a_folder_with_a_gguf_file_cannot_is_refused(tmp_path: Path) -> None:
    write(model_of("mixtral"), "mixtral", Kind.F32, source := tmp_path / "source")
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
    build("granitemoe").config.save_pretrained(source)
    with pytest.raises(ValueError, match=r"made for mixtral, qwen2_moe, .*; the config is of 'granitemoe'"):
        moe_ext.calibrate(source, padded_batches(), progress=False)
