"""What our vLLM plugin reads of a config, and its skip rule: parts that need no vLLM."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_ext_vllm import hooks
from moe_ext_vllm.checkpoint import read
from moe_ext_vllm.rule import Carried, share_of_largest, skip_weak

from moe_ext.models.config_section import section_with
from moe_ext.runtime import skipping


def config(**fields: Any) -> SimpleNamespace:
    """As much of vLLM's ModelConfig as is read: a text model of three decoder layers."""
    text = SimpleNamespace(**{"num_hidden_layers": 3, **fields})
    return SimpleNamespace(hf_text_config=text, hf_config=text)


def test_thresholds_that_moe_ext_writes_are_read_by_decoder_layer() -> None:
    section = section_with(torch.tensor([[0.5, 0.25], [0.75, 0.0]]), {"renormalise": "none"}, [0, 2])
    checkpoint = read(config(moe_ext=section))
    assert checkpoint.thresholds == {0: (0.5, 0.25), 2: (0.75, 0.0)}
    assert checkpoint.scale == "none"
    assert not checkpoint.is_plain


def test_older_forms_are_read_where_they_say_whose_they_are() -> None:
    by_layer = {0: (0.5,), 1: (0.25,), 2: (0.75,)}
    assert read(config(betas={"0": 0.5, "1": 0.25, "2": 0.75})).thresholds == by_layer
    assert read(config(moe_ext={"skip_thresholds": [[0.5], [0.25], [0.75]]})).thresholds == by_layer
    top = config()
    top.hf_config = SimpleNamespace(moe_ext={"skip_thresholds": [[0.5], [0.25], [0.75]]})
    assert read(top).thresholds == by_layer


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"betas": {"0": 0.5, "1": 0.5}}, r"keys \['0', '1'\], which do not say"),
        ({"moe_ext": {"skip_thresholds": [[0.5]] * 2}}, "2 rows and does not say to which of the 3 decoder layers"),
        ({"moe_ext": {"skip_thresholds": {"3": [0.5]}}}, "expected rows by decoder layer, below 3"),
        ({"moe_ext": {"skip_thresholds": {"0": [1.5]}}}, "expected numbers from 0 to 1"),
        ({"moe_ext": {"skip_thresholds": {"0": 0.5}}}, "expected numbers from 0 to 1"),
        ({"moe_ext": {"skip_thresholds": "all"}}, "is 'all'; expected rows"),
        ({"moe_ext": {"renormalise": "all"}}, "'kept', 'none' or a number"),
        ({"moe_ext": {"renormalise": True}}, "'kept', 'none' or a number"),
        ({"moe_ext": [0.5]}, "expected a dict"),
    ],
)
def test_what_has_no_meaning_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(config(**fields))


def test_other_checkpoints_are_plain() -> None:
    assert read(config()).is_plain
    assert read(config(betas=[0.9, 0.999])).is_plain
    assert read(config(moe_ext={})).is_plain
    assert read(config(per_layer_attributes={"num_key_value_heads", "intermediate_size"})).is_plain


def test_a_draft_of_speculative_decoding_is_plain() -> None:
    draft = config(moe_ext={"skip_thresholds": {"0": [0.5]}})
    draft.runner_type = "draft"
    assert read(draft).is_plain


def test_layers_that_differ_and_means_in_the_place_of_experts_are_seen() -> None:
    assert read(config(per_layer_attributes={"num_local_experts"})).unequal == {"num_local_experts"}
    assert read(config(moe_ext={"experts_left": {"0": 5}})).novices
    own = read(config(moe_ext={"num_experts": {"0": 5, "1": 6}}))
    assert own.own_counts
    assert not own.is_plain


@given(
    tokens=st.integers(0, 9),
    top_k=st.integers(1, 8),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rescale=st.booleans(),
)
def test_the_rule_is_that_of_a_patched_model(
    tokens: int, top_k: int, seed: int, dtype: torch.dtype, rescale: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Not in the order of their weights, as routers with groups leave them.
    weights = torch.rand(tokens, top_k, generator=generator).to(dtype)
    experts = torch.rand(tokens, 11, generator=generator).argsort(-1)[:, :top_k].to(torch.int32)
    thresholds = torch.rand(top_k - 1, generator=generator)
    expected, marked = skipping.skip_weak(weights, experts, thresholds, 11, rescale=rescale)
    for carried in Carried:
        got, slots, skipped = skip_weak(weights, experts, thresholds, 11, carried, rescale)
        torch.testing.assert_close(got, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=0)
        assert torch.equal(skipped, marked == 11)
        assert torch.equal(slots[~skipped], experts[~skipped])
        assert slots.dtype == torch.int32
        strongest = experts.gather(1, weights.argmax(-1, keepdim=True)).expand_as(experts) if tokens else experts
        mark = {Carried.PAST_THE_LAST: torch.full_like(experts, 11), Carried.MINUS_ONE: torch.full_like(experts, -1)}
        assert torch.equal(slots[skipped], mark.get(carried, strongest)[skipped])


def test_a_token_without_weight_or_with_nan_keeps_its_experts() -> None:
    weights = torch.tensor([[0.0, 0.0], [torch.nan, 0.5]])
    experts = torch.tensor([[3, 1], [2, 0]])
    got, slots, skipped = skip_weak(weights, experts, torch.tensor([0.9]), 4, Carried.PAST_THE_LAST, rescale=True)
    assert not skipped.any()
    assert torch.equal(slots, experts)
    assert torch.equal(got[0], weights[0])
    assert got[1].isnan().all()


def test_the_share_of_the_largest_is_that_of_a_patched_model() -> None:
    logits = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(share_of_largest(logits, 3, 5), skipping.share_of_largest(logits, 3, 5))


def test_without_vllm_every_hook_is_missing_and_named() -> None:
    with pytest.raises(RuntimeError, match="MOE_EXT_VLLM=0") as raised:
        hooks.check()
    assert all(f"{module}.{name}" in str(raised.value) for module, name, _ in hooks.HOOKS)
