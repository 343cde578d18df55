"""Numbers of experts by layer in our section of a config, for families that have one number for all layers."""

from functools import partial
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import moe_ext
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.config_section import section_of
from moe_ext.models.layout import layout_of
from moe_ext.models.own_counts import built
from tests.support import every_family


def mixtral(counts: dict[str, Any]) -> MixtralForCausalLM:
    """A Mixtral of two layers with those numbers in its section."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(**sizes, num_hidden_layers=2, vocab_size=32, num_local_experts=6)
    config.moe_ext = {"num_experts": counts}
    with torch.device("meta"):
        model: MixtralForCausalLM = built(config, partial(MixtralForCausalLM._from_config, config))
    return model


def plan_for(model: PreTrainedModel, counts: list[int]) -> PruningPlan:
    layout = layout_of(model, moe_blocks(model))
    keep = tuple(tuple(range(count)) for count in counts)
    return PruningPlan(layout.model_type, layout.num_experts, layout.top_k, layout.layers, keep)


def test_every_layer_is_left_its_own_number_of_experts() -> None:
    model = mixtral({"0": 6, "1": 3})
    blocks = moe_blocks(model)
    assert [block.num_experts for block in blocks] == [6, 3]
    assert [len(block.router.weight) for block in blocks] == [6, 3]  # type: ignore[arg-type]
    assert [block.router.num_experts for block in blocks] == [6, 3]
    assert [len(block.experts.down_proj) for block in blocks] == [6, 3]  # type: ignore[arg-type]
    assert model.config.num_local_experts == 6


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"0": 6, "1": 7}, "says 7 experts for layer 1; expected 2 to 6"),
        ({"0": 1, "1": 6}, "says 1 experts for layer 0; expected 2 to 6"),
        ({"0": 6}, "says 0 experts for layer 1; expected 2 to 6"),
        ({"0": 6, "2": 6}, "expected layers with their numbers of experts"),
        ({"0": 6, "1": "3"}, "expected layers with their numbers of experts"),
    ],
)
def test_numbers_that_the_model_cannot_have_are_refused(counts: dict[str, Any], said: str) -> None:
    before = PreTrainedModel.post_init
    with pytest.raises(ValueError, match=rf"config\.moe_ext\.num_experts .*{said}"):
        mixtral(counts)
    assert PreTrainedModel.post_init is before


def test_code_that_reads_the_number_from_its_config_finds_that_of_its_layer() -> None:
    model = every_family.build("zaya")
    counts = [4 if layer % 2 else 6 for layer in range(len(moe_blocks(model)))]
    moe_ext.prune(model, plan_for(model, counts))
    blocks = moe_blocks(model)
    assert [block.router.config.num_experts for block in blocks] == counts  # type: ignore[union-attr]
    model.set_experts_implementation("eager")
    assert {block.experts.config._experts_implementation for block in blocks} == {"eager"}  # type: ignore[union-attr]


def test_numbers_that_a_patched_model_got_stay_when_it_is_unpatched() -> None:
    model = every_family.build("gemma4")
    counts = [4 if layer % 2 else 6 for layer in range(len(moe_blocks(model)))]
    thresholds = torch.full((len(counts), 1), 0.5)
    moe_ext.prune(moe_ext.patch(model, skip=thresholds), plan_for(model, counts))
    section = {"num_experts": {str(layer): count for layer, count in enumerate(counts)}}
    assert section_of(model.config).keys() == {"num_experts", "skip_thresholds"}
    moe_ext.unpatch(model)
    assert section_of(model.config) == section
    assert [block.num_experts for block in moe_blocks(model)] == counts
