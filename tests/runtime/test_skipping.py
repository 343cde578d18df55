"""Skip thresholds, their rule and their rate, against plain Python."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ContinuousBatchingConfig, GenerationConfig

import moe_ext
from moe_ext import ops
from moe_ext.calibration.statistics import RATIO_BINS, ExpertStatistics
from moe_ext.models.config_section import section_with, thresholds_in_config
from moe_ext.runtime.skipping import skip_weak
from tests.support.batches import random_tokens
from tests.support.families import build
from tests.support.malformed import StoredConfig
from tests.support.mixtral import MixtralFactory
from tests.support.reference import DEVICES, route_reference


def statistics_with_ratios(ratios: list[torch.Tensor], top_k: int) -> ExpertStatistics:
    """Statistics whose histogram holds the given (T, K - 1) ratios, one entry a layer."""
    names = tuple(f"layers.{layer}" for layer in range(len(ratios)))
    stats = ExpertStatistics.zeros(
        model_type="mixtral", layers=names, num_experts=8, top_k=top_k, gate="softmax over the selected logits"
    )
    for layer, values in enumerate(ratios):
        stats.tokens[layer] = values.shape[0]
        for rank in range(top_k - 1):
            for value in values[:, rank].tolist():
                stats.ratio_histogram[layer, rank, min(int(value * RATIO_BINS), RATIO_BINS - 1)] += 1
    return stats


@given(seed=st.integers(0, 99), quantile=st.floats(0, 1), top_k=st.integers(2, 4))
def test_thresholds_are_quantiles_to_one_bin(seed: int, quantile: float, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ratios = [torch.rand(300, top_k - 1, generator=generator) for _ in range(2)]
    thresholds = moe_ext.skip_thresholds(statistics_with_ratios(ratios, top_k), quantile)
    assert thresholds.shape == (2, top_k - 1)
    assert thresholds.dtype == torch.float32
    for layer, values in enumerate(ratios):
        ordered = values.double().sort(0).values
        for rank in range(top_k - 1):
            # The threshold leaves `quantile` of the ratios below it: give or take one bin and one value.
            below = [float(v) for v in ordered[:, rank] if float(v) < float(thresholds[layer, rank]) - 1 / RATIO_BINS]
            upto = [float(v) for v in ordered[:, rank] if float(v) <= float(thresholds[layer, rank]) + 1 / RATIO_BINS]
            assert len(below) <= quantile * 300 + 1
            assert len(upto) >= quantile * 300 - 1


def test_quantile_zero_skips_nothing() -> None:
    stats = statistics_with_ratios([torch.tensor([[0.0], [0.5]])], 2)
    assert moe_ext.skip_thresholds(stats, 0.0).tolist() == [[0.0]]


def test_a_negative_weight_counts_by_its_magnitude() -> None:
    weights, experts = torch.tensor([[0.6, -0.3, 0.1]]), torch.tensor([[4, 2, 0]])
    same = skip_weak(weights, experts, torch.zeros(2), 8)
    assert torch.equal(same[0], weights)
    assert torch.equal(same[1], experts)
    kept, left = skip_weak(weights, experts, torch.tensor([0.4, 0.4]), 8)
    torch.testing.assert_close(kept, torch.tensor([[0.6, -0.3, 0.0]]) / 0.9)
    assert left.tolist() == [[4, 2, 8]]


@pytest.mark.parametrize("device", DEVICES)
def test_the_median_skips_half_of_the_calibration_slots(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral().to(device)
    tokens = random_tokens(8, 64).to(device)
    thresholds = moe_ext.skip_thresholds(moe_ext.calibrate(model, [{"input_ids": tokens}], progress=False))
    moe_ext.patch(model, skip=torch.stack([thresholds[0], torch.zeros(1), torch.zeros(1)]))
    with moe_ext.count_skips(model) as count, torch.no_grad():
        model(tokens)
    # Half of the second slots is a quarter of all; the other layers skip nothing.
    assert count.rates()[0] == pytest.approx(0.25, abs=0.005)
    assert count.rates()[1:] == [0.0, 0.0]
    assert count.slots == [8 * 64 * 2] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_padding_is_not_counted_as_skipped_or_routed(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = moe_ext.patch(tiny_mixtral().to(device), skip=torch.full((3, 1), 0.7))
    tokens = random_tokens(2, 12).to(device)
    mask = torch.tensor([[1] * 12, [1] * 5 + [0] * 7]).to(device)
    with torch.no_grad():
        with moe_ext.count_skips(model) as padded:
            model(tokens, attention_mask=mask)
        with moe_ext.count_skips(model) as alone:
            model(tokens[:1])
            model(tokens[1:, :5])
    assert padded.slots == alone.slots == [(12 + 5) * 2] * 3
    assert padded.skipped == alone.skipped
    with moe_ext.count_skips(model) as generated:  # left padding, and steps that see a mask longer than their tokens
        model.generate(tokens, attention_mask=mask.flip(1), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.slots == [(12 + 5 + 2 * 3) * 2] * 3


def test_a_mask_that_does_not_tell_padding_is_refused(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    tokens = random_tokens(2, 5)
    with moe_ext.count_skips(model) as count, torch.no_grad():
        model.model(tokens, torch.tensor([[1] * 5, [0] * 2 + [1] * 3]))  # positional, the same
        with pytest.raises(ValueError, match="cannot tell padding from this attention mask"):
            model(tokens, attention_mask=torch.ones(2, 5, 5, dtype=torch.bool))
    assert count.slots == [(5 + 3) * 2] * 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # masks of booleans, and masks to be added
def test_a_static_cache_counts_as_a_growing_one(tiny_mixtral: MixtralFactory, attention: str) -> None:
    model = tiny_mixtral(attn_implementation=attention)
    moe_ext.patch(model, skip=torch.full((3, 1), 0.3))
    tokens, mask = random_tokens(2, 7), torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with moe_ext.count_skips(model) as expected:
        model.generate(tokens, **options)
    with moe_ext.count_skips(model) as count:
        model.generate(tokens, cache_implementation="static", **options)
    assert count == expected
    assert count.slots == [(7 + 4 + 2 * 5) * 2] * 3
    assert sum(count.skipped) > 0


@pytest.mark.parametrize("quantile", [-0.1, 1.1, float("nan")])
def test_a_quantile_outside_its_range_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        moe_ext.skip_thresholds(statistics_with_ratios([torch.rand(3, 1)], 2), quantile)


def test_a_layer_without_tokens_is_named() -> None:
    stats = statistics_with_ratios([torch.rand(3, 1), torch.rand(0, 1)], 2)
    with pytest.raises(ValueError, match=r"layer layers\.1 has no calibration tokens"):
        moe_ext.skip_thresholds(stats)


def test_a_single_expert_per_token_cannot_be_skipped() -> None:
    with pytest.raises(ValueError, match="top_k = 1"):
        moe_ext.skip_thresholds(statistics_with_ratios([torch.rand(3, 0)], 1))


@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 99), top_k=st.integers(1, 5), renormalise=st.booleans())
def test_the_differentiable_rule_equals_brute_force_and_the_operator(
    device: str, seed: int, top_k: int, renormalise: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 6, generator=generator).to(device)
    thresholds = torch.rand(top_k - 1, generator=generator).to(device)
    weights, experts = skip_weak(*ops.route(logits, top_k, None, renormalise), thresholds, 6)
    expected_weights, expected_experts = route_reference(logits, top_k, thresholds, renormalise)
    assert experts.tolist() == expected_experts
    expected = torch.tensor(expected_weights, dtype=torch.float64)
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=3e-6, atol=0)
    fused_weights, fused_experts = ops.route(logits, top_k, thresholds, renormalise)
    assert torch.equal(experts, fused_experts)
    torch.testing.assert_close(weights, fused_weights, rtol=3e-6, atol=0)


def test_thresholds_are_not_rounded_to_the_weights_dtype() -> None:
    weights, experts = torch.tensor([[1.0, 0.5]], dtype=torch.bfloat16), torch.tensor([[3, 4]])
    skipped = skip_weak(weights, experts, torch.tensor([0.501]), 8)  # 0.5 in bfloat16
    assert skipped[0].tolist() == [[1.5, 0.0]]
    assert skipped[0].dtype == torch.bfloat16
    assert skipped[1].tolist() == [[3, 8]]


def test_weights_of_0_only_stay_0() -> None:
    experts = torch.tensor([[0, 1, 2]])
    weights, kept = skip_weak(torch.zeros(1, 3), experts, torch.tensor([0.5, 0.5]), 8)
    assert weights.tolist() == [[0.0, 0.0, 0.0]]
    assert torch.equal(kept, experts)


def test_other_entries_of_the_configs_section_survive(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    model.config.moe_ext = {"note": "kept"}
    assert thresholds_in_config(model.config, range(3), 2) is None
    moe_ext.patch(model, skip=torch.full((3, 1), 0.5))
    assert model.config.moe_ext == {"note": "kept", "skip_thresholds": {str(layer): [0.5] for layer in range(3)}}
    moe_ext.patch(model, skip=None)
    assert model.config.moe_ext == {"note": "kept"}
    assert section_with(torch.zeros(1, 1), None, [4]) == {"skip_thresholds": {"4": [0.0]}}


def test_thresholds_name_the_decoder_layers_that_they_are_of() -> None:
    model = build("qwen2_moe")  # its layer 1 is dense
    thresholds = torch.tensor([[0.125, 0.25, 0.5], [0.75, 0.25, 0.0]])
    moe_ext.patch(model, skip=thresholds)
    stored = {"0": [0.125, 0.25, 0.5], "2": [0.75, 0.25, 0.0]}
    assert model.config.moe_ext == {"skip_thresholds": stored}
    moe_ext.unpatch(model)
    for written in (stored, thresholds.tolist()):  # the older form is read, too
        model.config.moe_ext = {"skip_thresholds": written}
        found = thresholds_in_config(model.config, [0, 2], 4)
        assert found is not None
        assert torch.equal(found, thresholds)
    with pytest.raises(ValueError, match=r"moe_ext.skip_thresholds is .*; expected a dict with the keys 0, 1$"):
        thresholds_in_config(StoredConfig(moe_ext={"skip_thresholds": stored}), [0, 1], 4)


@pytest.mark.parametrize(
    "stored",
    [{"0": [0.5], "1": [True]}, [[0.5], ["x"]], [[0.5], None], "0.5", {"0": 0.5, "1": 0.5}, [[0.5], [10**400]]],
)
def test_stored_thresholds_that_are_no_numbers_are_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match=r"skip_thresholds is|skip thresholds"):
        thresholds_in_config(StoredConfig(moe_ext={"skip_thresholds": stored}), [0, 1], 2)


@pytest.mark.parametrize("betas", [{"0": "x"}, {"0": None}, {"0": True}, {"0": 2.0}])
def test_stored_betas_that_are_no_numbers_are_refused(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"config.betas is|from 0 to 1"):
        thresholds_in_config(StoredConfig(betas=betas), [3], 2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_counts_every_token_that_ran(tiny_mixtral: MixtralFactory, attention: str) -> None:
    model = moe_ext.patch(tiny_mixtral(attn_implementation=attention), skip=torch.full((3, 1), 0.5))
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 9, 5)]
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    # Small: by default the cache takes most of the machine's memory.
    small = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32)
    with moe_ext.count_skips(model) as count:
        generated = model.generate_batch(prompts, settings, continuous_batching_config=small, warmup=False)
    with moe_ext.count_skips(model) as expected:
        alone = [model.generate(torch.tensor([prompt]), generation_config=settings) for prompt in prompts]
    assert [each.generated_tokens for each in generated.values()] == [each[0, -4:].tolist() for each in alone]
    assert count.slots == expected.slots == [(3 + 9 + 5 + 3 * 3) * 2] * 3
    assert count.skipped == pytest.approx(expected.skipped, abs=2)  # attention rounds otherwise
    assert sum(count.skipped) > 0


def test_what_follows_packed_sequences_is_no_token(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    with moe_ext.count_skips(model) as count, torch.no_grad():
        model(random_tokens(1, 8), cu_seq_lens_q=torch.tensor([0, 2, 5, 5]))
    assert count.slots == [10] * 3
