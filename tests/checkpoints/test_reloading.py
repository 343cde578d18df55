"""Stock transformers finds every weight of a pruned checkpoint under its name.

A weight that it does not find it fills with random numbers, and says so in a warning only: a checkpoint with names of
its own loads, and generates nonsense, as llm-compressor 0.14's pruned Mixtral does.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_ext
from tests.support.families import ALL, build, keep_of, plan_for


def names_in(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def what_does_not_fit(model_class: Any, folder: Path) -> dict[str, Any]:
    """What stock loading reports: missing, unexpected and mismatched keys, and errors; empty if all fits."""
    _, found = model_class.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= found.keys()
    return {kind: keys for kind, keys in found.items() if keys}


@pytest.mark.parametrize("way", ["prune", "prune_checkpoint"])
@pytest.mark.parametrize("family", ALL)
def test_stock_transformers_finds_every_weight_under_the_names_of_the_hub(
    family: str, way: str, tmp_path: Path
) -> None:
    model = build(family, dtype=torch.bfloat16)
    plan = plan_for(model, keep_of(model, family))
    model.save_pretrained(tmp_path / "whole")
    if way == "prune":
        moe_ext.prune(model, plan).save_pretrained(tmp_path / "pruned")
    else:
        moe_ext.prune_checkpoint(tmp_path / "whole", plan, tmp_path / "pruned", progress=False)
    assert what_does_not_fit(type(model), tmp_path / "pruned") == {}
    assert names_in(tmp_path / "pruned") <= names_in(tmp_path / "whole")


def test_mixtrals_names_are_those_of_the_hub(tmp_path: Path) -> None:
    model = build("mixtral")
    moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral"))).save_pretrained(tmp_path)
    experts = {name for name in names_in(tmp_path) if "experts" in name}
    assert experts == {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{part}.weight"
        for layer in range(3)
        for expert in range(5)
        for part in (1, 2, 3)
    }


def test_names_that_are_filled_with_random_numbers_would_be_found(tmp_path: Path) -> None:
    model = build("mixtral")
    moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral"))).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    linear = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

    def renamed(name: str) -> str:
        name = re.sub(r"w[123]", lambda found: linear[found[0]], name)
        return name.replace("block_sparse_moe.experts", "mlp.experts")

    save_file({renamed(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    found = what_does_not_fit(type(model), tmp_path)  # loads all the same
    assert {f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(3)} <= set(found["missing_keys"])
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in found["unexpected_keys"]
