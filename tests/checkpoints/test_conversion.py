"""Checkpoints of which transformers makes several parameters of one tensor, or shares experts out among modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import moe_ext
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import model_type_of, moe_blocks
from tests.support import every_family
from tests.support.checkpoints import tensors_in


def kimi_k25() -> PreTrainedModel:
    """Its text decoder is DeepSeek-V3's, and its image encoder's queries, keys and values are stored as one tensor."""
    text = every_family.config("deepseek_v3").to_dict()
    vision = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24,
              "projection_hidden_size": 32, "pos_emb_height": 4, "pos_emb_width": 4}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("kimi_k25", text_config=text, vision_config=vision)
    return transformers.Kimi_K25ForConditionalGeneration(config).eval()


def built(name: str) -> Any:
    model = kimi_k25() if name == "kimi_k25" else every_family.build(name)
    return model.to(torch.bfloat16)


NAMES = ["lara_mini", "ernie4_5_vl_moe", "kimi_k25"]


def plan_without(model: Any, *dropped: tuple[int, ...]) -> PruningPlan:
    """Drops some experts of every layer, in turn."""
    blocks = moe_blocks(model)
    keep = tuple(
        tuple(expert for expert in range(block.num_experts) if expert not in dropped[layer % len(dropped)])
        for layer, block in enumerate(blocks)
    )
    names = tuple(block.name for block in blocks)
    return PruningPlan(model_type_of(model), blocks[0].num_experts, blocks[0].top_k, names, keep)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_the_hubs_format_is_pruned_as_the_loaded_model(name: str, tmp_path: Path) -> None:
    model = built(name)
    model.save_pretrained(tmp_path / "source", save_original_format=True)
    plan = plan_without(model, (0, 5), (1, 4))
    loaded = type(model).from_pretrained(tmp_path / "source", dtype="auto")
    moe_ext.prune(loaded, plan).save_pretrained(tmp_path / "memory", save_original_format=True)
    moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "folder", progress=False)
    expected, got = tensors_in(tmp_path / "memory"), tensors_in(tmp_path / "folder")
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(got[key].view(torch.uint8), tensor.view(torch.uint8)), key
    type(model).from_pretrained(tmp_path / "folder")


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_is_loaded_alone_is_the_loaded_models(name: str, tmp_path: Path) -> None:
    model = built(name)
    model.save_pretrained(tmp_path / "source", save_original_format=True)
    loaded = type(model).from_pretrained(tmp_path / "source", dtype="auto").state_dict()
    with LayersOnDisk(tmp_path / "source", read_ahead=False) as layers:
        seen = set()
        for layer in range(layers.num_layers):
            layers.need(layer)
            for key, tensor in layers.model.state_dict().items():
                if not tensor.is_meta:
                    assert torch.equal(tensor, loaded[key]), key
                    seen.add(key)
        assert {key for key in loaded if ".layers." in key} <= seen


def test_experts_that_share_their_numbers_need_equal_counts(tmp_path: Path) -> None:
    """ERNIE's files number the experts for text and for images through, and loading gives each a half."""
    model = built("ernie4_5_vl_moe")
    model.save_pretrained(tmp_path / "source", save_original_format=True)
    plan = plan_without(model, (0, 5), (1,))
    with pytest.raises(ValueError):  # noqa: PT011  by moe_ext.prune already, or for the tensor
        moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "folder", progress=False)
    assert not (tmp_path / "folder").exists()


def test_two_moe_blocks_in_a_layer_are_refused_where_one_is_expected() -> None:
    model = every_family.build("ernie4_5_vl_moe")
    text, padded = [every_family.inputs(model, 1)], [every_family.inputs(model, 1, padding=2)]
    in_one = r"\S+ and \S+ are in one decoder layer; expected one a layer"
    with pytest.raises(ValueError, match=f"refit: {in_one}"):
        moe_ext.prune(model, plan_without(model, (0, 5)), refit=text)
    with pytest.raises(ValueError, match=r"vision_moe: the experts ran 0 times in 1 batches"):
        moe_ext.search(model, text, keep=6, progress=False)

    def nothing_runs(input_ids: Any, attention_mask: Any, **more: Any) -> None:
        raise AssertionError

    model.forward = model.model.forward = nothing_runs
    refused: list[tuple[dict[str, Any], str]] = [
        ({"method": "progressive"}, "search, method='progressive'"),
        ({"budget": "model"}, "search, budget='model'"),
        ({"loss": "fisher"}, "search, budget='model'"),
        ({"loss": "fisher", "budget": "layer"}, "search of text with padding"),
        ({}, "search of text with padding"),
    ]
    for options, said in refused:
        with pytest.raises(ValueError, match=rf"{said}: {in_one}: prune this family by statistics"):
            moe_ext.search(model, padded, keep=6, progress=False, **options)
