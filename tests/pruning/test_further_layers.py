"""Layers for multi-token prediction in checkpoint folders: pruned as the last layer of a model with one layer more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_layers import MtpModel

import moe_ext
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.layout import layout_of
from tests.support import every_family
from tests.support.checkpoints import rewritten, tensors_in

FIRST, LAST = (0, 2, 3, 4, 6, 7), (0, 1, 3, 4, 5, 7)
NAMES = {
    "deepseek_v3": ("model.layers.3.", "model.layers.3.", "num_nextn_predict_layers"),
    "glm4_moe": ("model.layers.3.", "model.layers.3.", "num_nextn_predict_layers"),
    "qwen3_next": ("model.layers.3.", "mtp.layers.0.", "mtp_num_hidden_layers"),
}


def sources(name: str, folder: Path) -> tuple[Path, Path]:
    """A folder with four layers, and the same where the config counts the last as one for multi-token prediction."""
    before, after, field = NAMES[name]
    whole, drafting = folder / "whole", folder / "drafting"
    for each in (whole, drafting):
        every_family.build(name, dtype=torch.bfloat16).save_pretrained(each)
    content = json.loads((drafting / "config.json").read_text())
    content = {**content, "num_hidden_layers": 3, field: 1, "layer_types": content.get("layer_types", [])[:3]}
    content["mlp_layer_types"] = content.get("mlp_layer_types", [])[:3]
    (drafting / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value != []}))

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            if key.startswith(before):
                tensors[after + key.removeprefix(before)] = tensors.pop(key)
        tensors[f"{after}eh_proj.weight"] = torch.ones(3, dtype=torch.bfloat16)

    rewritten(drafting, renamed)
    return whole, drafting


def plan_for(folder: Path, *more: tuple[int, ...]) -> PruningPlan:
    model = moe_ext.from_pretrained(folder)
    blocks = moe_blocks(model)
    layout = layout_of(model, blocks)
    keep = ((FIRST,) * len(blocks))[: len(blocks) - len(more)] + more
    return PruningPlan(layout.model_type, layout.num_experts, layout.top_k, layout.layers, keep)


@pytest.mark.filterwarnings("ignore:.*no place for")
@pytest.mark.parametrize("name", NAMES)
def test_they_are_pruned_as_the_last_layer_is(name: str, tmp_path: Path) -> None:
    before, after, field = NAMES[name]
    whole, drafting = sources(name, tmp_path)
    moe_ext.prune_checkpoint(whole, plan_for(whole, LAST, LAST), tmp_path / "expected", progress=False)
    moe_ext.prune_checkpoint(drafting, plan_for(drafting, LAST), tmp_path / "got", progress=False)
    expected = {
        after + key.removeprefix(before) if key.startswith(before) else key: tensor
        for key, tensor in tensors_in(tmp_path / "expected").items()
    }
    expected[f"{after}eh_proj.weight"] = torch.ones(3, dtype=torch.bfloat16)
    got = tensors_in(tmp_path / "got")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
    config: dict[str, Any] = json.loads((tmp_path / "got" / "config.json").read_text())
    assert config[field] == 1


@pytest.mark.filterwarnings("ignore:.*no place for")
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_transformers_drafts_with_them_and_patched_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, drafting = sources(name, tmp_path)

    def with_its_own(tensors: dict[str, torch.Tensor]) -> None:
        for part, shape in {"eh_proj": (32, 64), "enorm": (32,), "hnorm": (32,), "shared_head.norm": (32,)}.items():
            generator = torch.Generator().manual_seed(len(part))
            tensors[f"model.layers.3.{part}.weight"] = torch.rand(shape, generator=generator).bfloat16()

    rewritten(drafting, with_its_own)
    moe_ext.prune_checkpoint(drafting, plan_for(drafting, LAST), tmp_path / "got", progress=False)
    kind = type(every_family.build(name))
    # By such patterns transformers finds the layers, with the numbers that they have in the released checkpoints.
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])
    model = kind.from_pretrained(tmp_path / "got", dtype=torch.float32).eval()
    drafts = MtpModel.from_pretrained(model).layers[0].mtp_block.mlp
    kept = kind.from_pretrained(drafting.parent / "whole", dtype=torch.float32).model.layers[3].mlp
    assert torch.equal(drafts.experts.down_proj, kept.experts.down_proj[list(LAST)])
    assert torch.equal(drafts.gate.weight, kept.gate.weight[list(LAST)])
    prompt, options = torch.arange(5, 13)[None], {"max_new_tokens": 6, "do_sample": False}
    said = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, use_mtp=True, **options), said)
    moe_ext.patch(model)
    assert torch.equal(model.generate(prompt, use_mtp=True, **options), said)


@pytest.mark.filterwarnings("ignore:.*no place for")
def test_pruned_in_memory_a_model_has_none_and_says_what_keeps_them(tmp_path: Path) -> None:
    _, drafting = sources("glm4_moe", tmp_path)
    model = moe_ext.from_pretrained(drafting)
    with pytest.warns(UserWarning, match=r"counts none. moe_ext.prune_checkpoint keeps them, from folder to folder"):
        moe_ext.prune(model, plan_for(drafting, LAST))
    model.save_pretrained(tmp_path / "pruned")
    assert not [key for key in tensors_in(tmp_path / "pruned") if "layers.3." in key]
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.filterwarnings("ignore:.*no place for")
def test_they_are_left_out_where_the_config_cannot_say_how_many_experts_they_have(tmp_path: Path) -> None:
    _, drafting = sources("deepseek_v3", tmp_path)
    plan = plan_for(drafting, (0, 1, 4, 5))  # fewer in the last layer
    with pytest.warns(UserWarning, match="layers for multi-token prediction are not in the pruned model"):
        moe_ext.prune_checkpoint(drafting, plan, tmp_path / "got", progress=False)
    assert not [key for key in tensors_in(tmp_path / "got") if "layers.3." in key]
    assert json.loads((tmp_path / "got" / "config.json").read_text())["num_nextn_predict_layers"] == 0
