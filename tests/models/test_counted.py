"""What depends on the number of experts, as it is measured, against what the modeling code of some families says."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models import counted
from moe_ext.models.blocks import counted_of, counting_attributes, moe_blocks
from moe_ext.models.counted import Dimension
from moe_ext.models.fixed_choices import remapped
from moe_ext.models.layout import layout_of
from tests.support import every_family


def test_places_of_kept_experts_come_before_those_of_no_expert() -> None:
    assert Dimension(0).places([1, 3], 4) == [1, 3]
    assert Dimension(0, per_expert=2, others=1).places([0, 2], 3) == [0, 1, 4, 5, 6]
    assert Dimension(0, per_expert=2, others=1).size(3) == 7


@pytest.mark.parametrize(
    ("name", "field", "tensor", "dimension"),
    [
        ("mixtral", "num_local_experts", "model.layers.0.mlp.gate.weight", Dimension(0)),
        ("zaya", "num_experts", "model.layers.1.mlp.gate.balancing_biases", Dimension(0, 1, 1)),  # a choice to skip
        ("inkling", "n_routed_experts", "model.language_model.layers.0.mlp.gate.weight", Dimension(0, 1, 2)),  # shared
        ("gemma4", "num_experts", "model.language_model.layers.0.router.per_expert_scale", Dimension(0)),
        (
            "ernie4_5_moe",
            "moe_num_experts",
            "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias",
            Dimension(1),
        ),
        ("minimax_m2", "num_local_experts", "model.layers.0.mlp.e_score_correction_bias", Dimension(0)),
        ("gpt_oss", "num_local_experts", "model.layers.0.mlp.experts.down_proj_bias", Dimension(0)),
    ],
)
def test_fields_and_dimensions_are_those_of_the_code(name: str, field: str, tensor: str, dimension: Dimension) -> None:
    found = counted_of(every_family.build(name))
    assert found.fields == (field,)
    assert found.tensors[tensor] == dimension


def test_a_tensor_that_no_expert_is_counted_in_is_not_named() -> None:
    tensors = counted_of(every_family.build("muse_spark", moe_hidden_size=8)).tensors  # as wide as there are experts
    assert not any("norm" in name or "expert_proj" in name for name in tensors)


def test_attributes_follow_where_they_count_experts_only() -> None:
    filter_model = every_family.build("openai_privacy_filter")  # its block calls K num_experts
    named = {(type(each.module).__name__, each.name, each.value) for each in counting_attributes(filter_model, [5] * 4)}
    assert named == {
        ("OpenAIPrivacyFilterTopKRouter", "num_experts", 5),
        ("OpenAIPrivacyFilterExperts", "num_experts", 5),
    }
    zaya = every_family.build("zaya")
    assert ("num_router_classes", 6) in {(each.name, each.value) for each in counting_attributes(zaya, [5] * 4)}
    jamba = every_family.build("jamba")
    assert (jamba, "num_experts", 5) in counting_attributes(jamba, [5, 4])  # the head's copy: the largest layer's


def test_what_somebody_set_on_a_module_is_left_alone() -> None:
    model = every_family.build("mixtral")
    model.num_experts = 77
    assert model not in {each.module for each in counting_attributes(model, [5] * 4)}


def test_a_config_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = every_family.build("mixtral", vocab_size=91)
    before = counted_of(model)
    monkeypatch.setattr(counted, "_measure", None)
    assert counted_of(model) is before
    with pytest.raises(TypeError):
        counted_of(every_family.build("mixtral", vocab_size=90))


def test_a_model_whose_config_counts_no_experts_is_refused_before_it_is_touched() -> None:
    model = every_family.build("mixtral")
    block = moe_blocks(model)[0]
    block.experts.num_experts = 9  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: no field of the 'mixtral' config is found to hold"):
        counted_of(model)


# ---- the boundary


def test_the_router_is_told_by_what_it_returns_where_nothing_names_it() -> None:
    (block, *_) = moe_blocks(every_family.build("gemma4"))
    assert type(block.router).__name__ == "Gemma4TextRouter"
    assert not hasattr(block.router, "top_k")
    assert block.top_k == 2


def test_experts_of_another_part_than_the_text_decoder_are_left_out() -> None:
    names = [block.name for block in moe_blocks(every_family.build("dots3_note"))]
    assert len(names) == 3
    assert all("language_model" in name for name in names)


def test_layers_with_different_k_are_calibrated_skipped_and_pruned() -> None:
    chosen = [2, 3, 1, 2]
    model = every_family.build("hunyuan_v1_moe", moe_topk=chosen)
    blocks, inputs = moe_blocks(model), every_family.inputs(model, 1, padding=3)
    assert [block.top_k for block in blocks] == chosen
    layout = layout_of(model, blocks)
    assert (layout.top_k, layout.fewest) == (3, 3)
    stats = moe_ext.calibrate(model, [inputs], progress=False)
    tokens = int(inputs["attention_mask"].sum())
    assert stats.routing_counts().sum(1).tolist() == [tokens * top_k for top_k in chosen]
    assert (stats.ratio_histogram.sum(-1) > 0).tolist() == [[True, False], [True, True], [False, False], [True, False]]
    thresholds = moe_ext.skip_thresholds(stats)
    assert (thresholds > 0).tolist() == [[True, False], [True, True], [False, False], [True, False]]
    expected = _logits(model, inputs)
    moe_ext.patch(model, skip=thresholds)
    assert not torch.equal(_logits(model, inputs), expected)
    moe_ext.unpatch(model)
    moe_ext.prune(model, moe_ext.plan(moe_ext.score(stats, "man"), keep=4))
    assert bool(_logits(model, inputs).isfinite().all())


def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits


def test_a_group_of_experts_without_tokens_is_named() -> None:
    model = every_family.build("ernie4_5_vl_moe")
    with pytest.raises(ValueError, match=r"no token came to 3 of 6 MoE layers, the first .*vision_moe: .* images"):
        moe_ext.calibrate(model, [every_family.inputs(model, 1)], progress=False)


def test_pruned_it_runs_text_that_leaves_a_group_of_experts_without_tokens() -> None:
    model = every_family.build("ernie4_5_vl_moe")
    layout = layout_of(model, moe_blocks(model))
    keep = ((0, 2, 3, 5, 6, 7),) * layout.num_layers
    moe_ext.prune(model, PruningPlan(layout.model_type, layout.num_experts, layout.top_k, layout.layers, keep))
    text = every_family.inputs(model, 1)
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        expected = _logits(model, text)
        moe_ext.patch(model)
        torch.testing.assert_close(_logits(model, text), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        moe_ext.unpatch(model)


def test_padding_that_a_group_of_experts_cannot_tell_is_refused() -> None:
    model = every_family.build("ernie4_5_vl_moe")
    inputs = every_family.inputs(model, 1, padding=3)
    inputs["moe_mm_token_type_ids"] = (inputs["input_ids"] % 3 == 0).int()
    with pytest.raises(ValueError, match=r"text_moe has \d+ of a batch's 24 tokens, .* batches without padding"):
        moe_ext.calibrate(model, [inputs], progress=False)


@pytest.mark.filterwarnings("ignore:.*left on transformers")
@pytest.mark.parametrize(("name", "fields"), [("muse_spark", {}), ("nemotron_h", {"moe_latent_size": 16})])
def test_means_of_latent_experts_have_their_width(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = every_family.build(name, **fields)
    inputs = every_family.inputs(model, 1)
    stats = moe_ext.calibrate(model, [inputs], progress=False, outputs=True, strict=False)
    assert stats.output_sum is not None
    assert stats.output_sum.shape[-1] == 16
    moe_ext.prune(model, moe_ext.plan(moe_ext.score(stats, "mone"), keep=5), novices=stats)
    expected = _logits(model, inputs)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(_logits(moe_ext.from_pretrained(tmp_path).eval(), inputs), expected)


# ---- tables


def test_a_removed_experts_tokens_go_to_the_nearest_that_they_do_not_have() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.0]])
    table = torch.tensor([[0, 2], [1, 0], [0, 1], [4, 3], [3, 4]], dtype=torch.int32)
    got = remapped(table, [1, 2, 3], rows)
    # 0 is nearest to 1, then to 3; 4 is nearest to 2, then to 3. Kept: 1, 2, 3 become 0, 1, 2.
    assert got.tolist() == [[0, 1], [0, 2], [2, 0], [1, 2], [2, 1]]
    assert got.dtype == torch.int32
    assert torch.equal(remapped(table, range(5), rows), table)
