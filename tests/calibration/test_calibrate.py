"""calibrate against float64 brute force over transformers' own eager model."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext.calibration.statistics import RATIO_BINS
from moe_ext.runtime.patching import STATE, is_patched
from tests.support.batches import padded_batches, random_tokens
from tests.support.mixtral import MixtralFactory
from tests.support.reference import DEVICES, ExpertsCase, assert_histograms_close, expert_output


def brute_force(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Statistics from the inputs and routing that hooks see in the stock eager model."""
    layers, num_experts, top_k = len(model.model.layers), 8, 2
    moments = torch.zeros(layers, num_experts, 3, 3, dtype=torch.float64)
    histogram = torch.zeros(layers, top_k - 1, RATIO_BINS, dtype=torch.int64)
    coactivation = torch.zeros(layers, num_experts, num_experts, dtype=torch.int64)
    pairs = torch.zeros(layers, num_experts, num_experts, dtype=torch.float64)
    tokens = torch.zeros(layers, dtype=torch.int64)
    seen: dict[int, tuple[torch.Tensor, ...]] = {}

    def keep(layer: int) -> Any:
        def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[layer] = tuple(argument.cpu() for argument in args)

        return before

    model.set_experts_implementation("eager")
    handles = [
        block.mlp.experts.register_forward_pre_hook(keep(layer)) for layer, block in enumerate(model.model.layers)
    ]
    for batch in batches:
        with torch.no_grad():
            model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().tolist()
        for layer, block in enumerate(model.model.layers):
            x, experts, weights = seen[layer]
            gate_up, down = (parameter.cpu() for parameter in block.mlp.experts.parameters())
            case = ExpertsCase(x, gate_up, down, experts, weights)
            for token, counted in enumerate(mask):
                if not counted:
                    continue
                tokens[layer] += 1
                ratio = float(weights[token, 1]) / float(weights[token, 0])
                histogram[layer, 0, min(int(ratio * RATIO_BINS), RATIO_BINS - 1)] += 1
                norms = [float(expert_output(case, expert, token).norm()) for expert in experts[token].tolist()]
                for slot in range(top_k):
                    expert, gate, norm = int(experts[token, slot]), float(weights[token, slot]), norms[slot]
                    for a in range(3):
                        for b in range(3):
                            moments[layer, expert, a, b] += gate**a * norm**b
                    for place, other in enumerate(experts[token].tolist()):
                        coactivation[layer, expert, other] += 1
                        pairs[layer, expert, other] += gate * norm * float(weights[token, place]) * norms[place]
    for handle in handles:
        handle.remove()
    return {
        "moments": moments,
        "ratio_histogram": histogram,
        "coactivation": coactivation,
        "output_pairs": pairs,
        "tokens": tokens,
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("patched", [False, True])
def test_statistics_equal_float64_brute_force_from_eager(
    tiny_mixtral: MixtralFactory, device: str, patched: bool
) -> None:
    batches = padded_batches()
    model = tiny_mixtral().to(device)
    if patched:
        moe_ext.patch(model)
    stats = moe_ext.calibrate(model, batches, progress=False, dataset="random")
    with torch.no_grad():
        expected = brute_force(tiny_mixtral().to(device), batches)
    tolerance = 1e-5 if device == "cpu" else 1e-4
    torch.testing.assert_close(stats.output_pairs, expected["output_pairs"], rtol=tolerance, atol=0)
    if device == "cpu":
        torch.testing.assert_close(stats.moments, expected["moments"], rtol=1e-5, atol=0)
        assert torch.equal(stats.ratio_histogram, expected["ratio_histogram"])
    else:  # three layers of float32, summed in another order than the eager model's
        torch.testing.assert_close(stats.moments, expected["moments"], rtol=1e-4, atol=0)
        assert_histograms_close(stats.ratio_histogram, expected["ratio_histogram"])
    assert torch.equal(stats.coactivation, expected["coactivation"])
    assert torch.equal(stats.tokens, expected["tokens"])
    assert stats.tokens.tolist() == [13 + 5 + 9 + 13 + 26] * 3
    assert stats.layers == ("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp")
    assert (stats.model_type, stats.top_k, stats.dataset) == ("mixtral", 2, "random")


@pytest.mark.parametrize("device", DEVICES)
def test_calibration_over_parts_merges_to_one_run(tiny_mixtral: MixtralFactory, device: str) -> None:
    batches = padded_batches()
    model = tiny_mixtral().to(device)
    whole = moe_ext.calibrate(model, batches, progress=False)
    parts = [moe_ext.calibrate(model, [batch], progress=False) for batch in reversed(batches)]
    merged = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(merged.moments, whole.moments, rtol=1e-12, atol=0)
    assert torch.equal(merged.ratio_histogram, whole.ratio_histogram)
    assert torch.equal(merged.coactivation, whole.coactivation)
    torch.testing.assert_close(merged.output_pairs, whole.output_pairs, rtol=1e-12, atol=0)


def is_observed(module: nn.Module) -> bool:
    return getattr(getattr(module, STATE, None), "observer", None) is not None


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(tiny_mixtral: MixtralFactory, patched: bool, training: bool) -> None:
    model = tiny_mixtral().train(training)
    if patched:
        moe_ext.patch(model)
    implementation = model.get_experts_implementation()
    moe_ext.calibrate(model, padded_batches(), progress=False)
    assert model.training == training
    assert is_patched(model) == patched
    assert model.get_experts_implementation() == implementation
    assert not any(is_observed(module) for module in model.modules())


def test_every_module_keeps_its_own_training_mode(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    moe_ext.calibrate(model, padded_batches(), progress=False)
    assert [module.training for module in model.modules()] == before


def test_statistics_are_those_of_evaluation_mode(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral(router_jitter_noise=0.5)
    expected = moe_ext.calibrate(model, padded_batches(), progress=False)
    got = moe_ext.calibrate(model.train(), padded_batches(), progress=False)
    assert torch.equal(got.moments, expected.moments)


@pytest.mark.parametrize("device", DEVICES)
def test_counts_are_exact_under_autocast_and_another_default_dtype(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral().to(device)
    batches = [{"input_ids": random_tokens(24, 100)}]  # 2400 tokens: bfloat16 counts exactly to 256 only
    with torch.autocast(device, torch.bfloat16):
        autocast = moe_ext.calibrate(model, batches, progress=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = moe_ext.calibrate(model, batches, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    for stats in (autocast, other):
        routed = stats.routing_counts()
        assert torch.equal(stats.coactivation.diagonal(dim1=1, dim2=2).double(), routed)
        assert torch.equal(stats.coactivation.sum(2).double(), 2 * routed)
        assert stats.ratio_histogram.sum(2).tolist() == [[2400]] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_equal_weights_count_in_the_last_bin(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral().to(device)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    stats = moe_ext.calibrate(model, padded_batches(), progress=False)
    assert stats.ratio_histogram[:, 0, -1].tolist() == stats.tokens.tolist()


def test_calibrating_inside_a_calibration_is_refused(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()

    def nested() -> Iterator[dict[str, torch.Tensor]]:
        moe_ext.calibrate(model, padded_batches(), progress=False)
        yield padded_batches()[0]

    with pytest.raises(ValueError, match="the model is being calibrated already"):
        moe_ext.calibrate(model, nested(), progress=False)
    assert not is_patched(model)


def test_an_implementation_changed_behind_the_patch_is_named(tiny_mixtral: MixtralFactory) -> None:
    model = moe_ext.patch(tiny_mixtral())
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="set_experts_implementation was called on the patched model"):
        moe_ext.calibrate(model, padded_batches(), progress=False)


def test_an_interrupted_calibration_restores_the_model(tiny_mixtral: MixtralFactory) -> None:
    def interrupted() -> Iterator[dict[str, torch.Tensor]]:
        yield padded_batches()[0]
        raise KeyboardInterrupt

    model = tiny_mixtral()
    with pytest.raises(KeyboardInterrupt):
        moe_ext.calibrate(model, interrupted(), progress=False)
    assert not is_patched(model)
    assert not any(is_observed(module) for module in model.modules())


def test_a_skipping_model_is_refused(tiny_mixtral: MixtralFactory) -> None:
    model = moe_ext.patch(tiny_mixtral(), skip=torch.full((3, 1), 0.5))
    with pytest.raises(ValueError, match=r"the model skips experts.*patch\(model, skip=None\) before"):
        moe_ext.calibrate(model, padded_batches(), progress=False)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no token was counted"),
        ([{"input_ids": torch.zeros(1, 3).long(), "attention_mask": torch.zeros(1, 3)}], "no token was counted"),
        ([{"input_ids": "ab"}], r"batch 0: 'input_ids' has shape \(\)"),
        ([{"input_ids": torch.zeros(1, 3).long(), "text": ["a"]}], "batch 0: MixtralModel takes no 'text'"),
        ([{"tokens": torch.zeros(1, 3)}], "batch 0 is no mapping with 'input_ids'"),
        ([{"input_ids": torch.zeros(1, 1, 3).long()}], r"batch 0: 'input_ids' has shape \(1, 1, 3\); expected \(seq"),
        (
            [{"input_ids": torch.zeros(1, 3).long(), "attention_mask": torch.ones(1, 2)}],
            r"batch 0: 'attention_mask' has shape \(1, 2\); expected \(1, 3\)",
        ),
    ],
)  # fmt: skip
def test_bad_batches_are_refused(tiny_mixtral: MixtralFactory, batches: list[Any], message: str) -> None:
    model = tiny_mixtral()
    with pytest.raises(ValueError, match=message):
        moe_ext.calibrate(model, batches, progress=False)
    assert not is_patched(model)


@pytest.mark.parametrize("device", DEVICES)
def test_activations_that_are_not_finite_name_the_layer(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral().to(device)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp gave activations .* not finite"):
        moe_ext.calibrate(model, padded_batches(), progress=False)
