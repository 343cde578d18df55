"""Families that hold experts in ways that nothing here is for: refused, with the reason and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import moe_ext
from moe_ext.decision.pruning_plan import PruningPlan

_SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
_SEQ2SEQ = {"vocab_size": 32, "d_model": 16, "num_layers": 2, "num_heads": 2, "num_experts": 4, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "jetmoe": (
        "JetMoeForCausalLM",
        {**_SIZES, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "intermediate_size": 16},
        "experts of attention heads, too, with a router of their own",
    ),
    "doge": (
        "DogeForCausalLM",
        {**_SIZES, "intermediate_size": 16, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
        "rows of two embedding tables, found by pairs of keys",
    ),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {**_SEQ2SEQ, "d_kv": 8, "d_ff": 16, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        "tokens beyond an expert's capacity pass it by",
    ),
    "nllb_moe": (
        "NllbMoeForConditionalGeneration",
        {
            **_SEQ2SEQ,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
            "max_position_embeddings": 32,
        },
        "tokens beyond an expert's capacity pass it by",
    ),
}


def tiny(name: str) -> PreTrainedModel:
    head, fields, _ = FAMILIES[name]
    model_class = getattr(transformers, head)
    model: PreTrainedModel = model_class(model_class.config_class(**fields)).eval()
    for parameter in model.parameters():  # some are left as they come from memory
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_refused_with_the_reason_and_what_to_do_in_memory_and_from_a_folder(name: str, tmp_path: Path) -> None:
    model, folder = tiny(name), tmp_path / "whole"
    model.save_pretrained(folder)
    batches = [{"input_ids": torch.arange(3, 9)[None]}]
    plan = PruningPlan(model.config.model_type, 4, 2, ("layer",), ((0, 1),))
    jobs: list[Callable[[], object]] = [
        lambda: moe_ext.patch(model),
        lambda: moe_ext.calibrate(model, batches, progress=False),
        lambda: moe_ext.search(model, batches, keep=2, progress=False),
        lambda: moe_ext.prune(model, plan),
        lambda: moe_ext.calibrate(folder, batches, progress=False),
        lambda: moe_ext.search(folder, batches, keep=2, progress=False),
        lambda: moe_ext.prune_checkpoint(folder, plan, tmp_path / "pruned", progress=False),
    ]
    expected = rf"no MoE layers that are supported: .*{FAMILIES[name][2]}.* Quantise it instead, or take a model of"
    for job in jobs:
        with pytest.raises(ValueError, match=expected):
            job()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_dense_model_is_not_said_to_have_experts() -> None:
    dense = {**FAMILIES["doge"][1], "is_moe": False}
    for name, fields in (("Doge", dense), ("Llama", {**_SIZES, "intermediate_size": 16})):
        with torch.device("meta"):
            model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields))
        with pytest.raises(ValueError, match=rf"experts interface \(model type '{name.lower()}'\)$"):
            moe_ext.patch(model)
