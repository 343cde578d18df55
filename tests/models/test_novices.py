"""Means in the place of removed experts, against the stock model with those experts' outputs overwritten."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moe_ext
from moe_ext import ops
from moe_ext.models.blocks import moe_blocks
from tests.support.batches import random_tokens
from tests.support.families import STOCK_ONLY, build, keep_of, logits_of, on_devices, plan_for, reloaded

NAMES = ["mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe", "jamba", "gpt_oss"]
pytestmark = pytest.mark.filterwarnings("ignore:.*left on transformers:UserWarning")


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": random_tokens(3, 17, seed=5)}]


def calibrated(model: Any, name: str) -> moe_ext.ExpertStatistics:
    return moe_ext.calibrate(model, batches(), progress=False, outputs=True, strict=name not in STOCK_ONLY)


def with_constant_experts(model: Any, keep: tuple[tuple[int, ...], ...], stats: moe_ext.ExpertStatistics) -> Any:
    """The stock eager model, all of whose experts compute, with the outputs of removed ones exchanged for their mean:
    what the experts gave is taken back slot by slot and the mean is put there."""
    model.set_experts_implementation("eager")
    for layer, (block, kept) in enumerate(zip(moe_blocks(model), keep, strict=True)):
        assert stats.output_sum is not None
        mean = stats.output_sum[layer] / stats.routing_counts()[layer][:, None].clamp(min=1)

        def exchanged(module: Any, args: Any, out: Tensor, kept: Any = kept, mean: Tensor = mean) -> Tensor:
            x, experts, weights = args
            total = out.clone()
            for token in range(len(x)):
                for slot, expert in enumerate(experts[token].tolist()):
                    if expert not in kept:
                        one = torch.tensor([[expert]], device=x.device)
                        weight = weights[token, slot].reshape(1, 1)
                        gave = type(module).forward(module, x[token : token + 1], one, weight)[0]
                        total[token] += weight[0, 0] * mean[expert].to(out) - gave
            return total

        block.experts.register_forward_hook(exchanged)
    return model


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(("name", "device"), on_devices(NAMES))
def test_a_removed_expert_gives_its_mean_output(name: str, patched: bool, device: str) -> None:
    model = build(name).to(device)
    stats = calibrated(model, name)
    keep = keep_of(model, name)
    expected = logits_of(with_constant_experts(build(name).to(device), keep, stats), random_tokens(2, 13))
    moe_ext.prune(model, plan_for(model, keep), novices=stats)
    assert [block.num_experts for block in moe_blocks(model)] == [len(kept) for kept in keep]
    if patched:
        moe_ext.patch(model, strict=name not in STOCK_ONLY)
    torch.testing.assert_close(logits_of(model, random_tokens(2, 13)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_moe_ext_reloads_means_to_the_bit_and_stock_transformers_refuses(name: str, tmp_path: Path) -> None:
    model = build(name)
    stats = calibrated(model, name)
    grouped = moe_blocks(model)[0].groups == 2
    keep = keep_of(model, name, fewer=2 if grouped else 1)
    moe_ext.prune(model, plan_for(model, keep), novices=stats)
    model.save_pretrained(tmp_path)
    loaded = reloaded(moe_ext.from_pretrained, tmp_path, auto_class=type(model))
    tokens = random_tokens(2, 13)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_with_means_says_so_outside_its_experts(name: str, tmp_path: Path) -> None:
    """An engine that leaves out what it does not know of experts would serve the checkpoint without its means."""
    model = build(name)
    stats = calibrated(model, name)
    keep = keep_of(model, name)
    moe_ext.prune(model, plan_for(model, keep), novices=stats)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    marks = {key: value for key, value in stored.items() if key.endswith(".moe_ext_novices")}
    assert [key.split(".")[-2] for key in marks] == [str(block.layer) for block in moe_blocks(model)]
    assert [int(value) for value in marks.values()] == [stats.layout.num_experts - len(kept) for kept in keep]


def test_means_of_half_precision_models_keep_their_dtype(tmp_path: Path) -> None:
    model = build("mixtral", dtype=torch.bfloat16)
    stats = calibrated(model, "mixtral")
    moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral")), novices=stats)
    model.save_pretrained(tmp_path)
    loaded = reloaded(moe_ext.from_pretrained, tmp_path)
    assert torch.equal(logits_of(loaded, random_tokens(2, 9)), logits_of(model, random_tokens(2, 9)))
    assert loaded.model.layers[0].mlp.experts.moe_ext_means.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_model_with_means_skips_as_the_unpruned_one_routes(name: str) -> None:
    model, whole = build(name), build(name)
    stats = calibrated(model, name)
    thresholds = moe_ext.skip_thresholds(stats, 0.4)
    moe_ext.prune(model, plan_for(model, keep_of(model, name)), novices=stats)
    rates = []
    for one in (model, whole):
        moe_ext.patch(one, skip=thresholds, strict=name not in STOCK_ONLY)
        with moe_ext.count_skips(one) as count:
            logits_of(one, random_tokens(2, 13))
        rates.append(count.rates())
    assert rates[0][0] == rates[1][0]  # the first layer's router sees the same tokens
    assert 0.1 < rates[0][0] < 0.5


def test_unpatching_leaves_the_means(tmp_path: Path) -> None:
    model = build("mixtral")
    moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral")), novices=calibrated(build("mixtral"), "mixtral"))
    tokens = random_tokens(2, 9)
    expected = logits_of(model, tokens)
    assert torch.equal(logits_of(moe_ext.unpatch(moe_ext.patch(model)), tokens), expected)


def test_slots_of_means_cost_the_operator_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = build("mixtral"), build("mixtral")
    keep = keep_of(model, "mixtral")
    moe_ext.patch(moe_ext.prune(model, plan_for(model, keep), novices=calibrated(whole, "mixtral")))
    routed, given = [], []
    experts = ops.experts

    def watched(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, *more: Any) -> Tensor:
        given.append(index)
        return experts(x, gate_up, down, index, *more)

    monkeypatch.setattr(ops, "experts", watched)
    for block in moe_blocks(model):
        block.router.register_forward_hook(lambda module, args, output: routed.append(output[2]))
    logits_of(model, random_tokens(2, 13))
    for chosen, index, kept in zip(routed, given, keep, strict=True):
        place = {expert: new for new, expert in enumerate(kept)}
        assert index.tolist() == [[place.get(expert, len(kept)) for expert in token] for token in chosen.tolist()]


def test_gradients_pass_a_layer_with_means() -> None:
    model = build("mixtral")
    stats = calibrated(model, "mixtral")
    moe_ext.patch(moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral")), novices=stats))
    tokens = random_tokens(1, 9)
    model(tokens, labels=tokens).loss.backward()
    for block in moe_blocks(model):
        for parameter in (*block.router.parameters(), *block.experts.parameters()):
            assert parameter.grad is not None
            assert bool(parameter.grad.isfinite().all())


def test_what_means_do_not_go_with_is_refused() -> None:
    model = build("mixtral")
    plan = plan_for(model, keep_of(model, "mixtral"))
    without = moe_ext.calibrate(model, batches(), progress=False)
    with pytest.raises(
        ValueError, match=r"novices: the statistics have no sums of outputs: calibrate\(..., outputs=True"
    ):
        moe_ext.prune(model, plan, novices=without)
    with pytest.raises(ValueError, match="novices: the statistics are of another model than the plan"):
        moe_ext.prune(model, plan, novices=calibrated(build("qwen3_moe"), "qwen3_moe"))
    fewer = calibrated(build("mixtral", num_local_experts=6), "mixtral")
    with pytest.raises(ValueError, match="novices: the statistics are of another model than the plan"):
        moe_ext.prune(model, plan, novices=fewer)
    narrow = calibrated(build("mixtral", hidden_size=16), "mixtral")
    with pytest.raises(ValueError, match="novices: the statistics' outputs have 16 dimensions; the model's have 32"):
        moe_ext.prune(model, plan, novices=narrow)
    stats = calibrated(model, "mixtral")
    moe_ext.prune(model, plan, novices=stats)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp has means in the place .*; prune the unpruned model instead"):
        moe_ext.prune(model, plan)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp has means in the place .*; calibrate the unpruned model"):
        moe_ext.calibrate(model, batches(), progress=False)


def test_a_layer_with_means_is_never_half_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    stats = calibrated(model, "mixtral")
    to, calls = Tensor.to, 0

    def out_of_memory(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += args[-1:] == (torch.float32,)  # a layer's means take the dtype of its weights
        if calls == 2:
            raise MemoryError
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", out_of_memory)
    with pytest.raises(MemoryError):
        moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral")), novices=stats)
    for block, count in zip(moe_blocks(model), (5, 8, 8), strict=True):
        assert {parameter.shape[0] for parameter in block.experts.parameters()} == {count}
        assert (block.num_experts, block.has_novices) == (count, count == 5)


@pytest.mark.parametrize("left", [[5, 5, 5], {"0": "5"}, {"7": 5}, {"0": 0}, {"0": 9}])
def test_a_config_that_makes_no_sense_is_refused(left: Any, tmp_path: Path) -> None:
    model = build("mixtral")
    moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral")), novices=calibrated(build("mixtral"), "mixtral"))
    model.config.moe_ext["experts_left"] = left
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.moe_ext\.experts_left"):
        moe_ext.from_pretrained(tmp_path)
