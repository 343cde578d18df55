"""What becomes of a token's routing weights when experts are skipped or fewer are chosen: against float64 by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralForCausalLM

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.config_section import GateScale, scale_in_config
from moe_ext.runtime.patching import altered_gates, is_patched
from moe_ext.runtime.skipping import share_of_largest, skip_weak
from tests.support.batches import padded_batches, random_tokens
from tests.support.command_line import inside, moe_json
from tests.support.families import build
from tests.support.mixtral import THRESHOLDS, MixtralFactory
from tests.support.paths import DEMO_MODEL
from tests.support.reference import DEVICES

SCALES: list[GateScale] = ["kept", "none", 2, 5, 8]


def by_hand(logits: Tensor, top_k: int, thresholds: Tensor | None, scale: GateScale) -> Tensor:
    """(T, E) weights of a router that takes the softmax over the selected logits; 0 for experts not chosen."""
    weights = torch.zeros(logits.shape, dtype=torch.float64)
    for token, row in enumerate(logits.double().tolist()):
        order = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))
        chosen = order[:top_k]
        among = order[:scale] if isinstance(scale, int) else chosen
        total = sum(torch.exp(torch.tensor([row[e] for e in among]).double() - max(row)).tolist())
        value = {e: float(torch.exp(torch.tensor(row[e] - max(row)).double())) / total for e in chosen}
        everything, first = sum(value.values()), value[chosen[0]]
        for rank, expert in enumerate(chosen[1:]):
            if thresholds is not None and value[expert] < float(thresholds[rank]) * first:
                del value[expert]
        if scale == "kept":
            value = {e: v * everything / sum(value.values()) for e, v in value.items()}
        for expert, v in value.items():
            weights[token, expert] = v
    return weights


def spread(weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """(T, K) slots as (T, E) weights."""
    table = torch.zeros(len(weights), num_experts + 1, dtype=torch.float64)
    return table.scatter(1, experts.cpu(), weights.cpu().double())[:, :num_experts]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_a_patched_router_gives_the_weights_of_the_definition(
    tiny_mixtral: MixtralFactory, device: str, gradients: bool, skips: bool, scale: GateScale
) -> None:
    model = tiny_mixtral().to(device)
    moe_ext.patch(model, skip=THRESHOLDS if skips else "config", renormalise=scale)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).to(device)
    for layer, block in enumerate(moe_blocks(model)):
        with torch.set_grad_enabled(gradients):
            logits, weights, experts = block.router(x)
        assert weights.shape == experts.shape == (40, 2)
        assert weights.requires_grad == gradients
        expected = by_hand(logits.detach().cpu(), 2, THRESHOLDS[layer] if skips else None, scale)
        # float32 softmax: a few roundings of 2^-24.
        torch.testing.assert_close(spread(weights.detach(), experts, 8), expected, rtol=1e-6, atol=1e-7)
        skipped = experts == 8
        assert bool(skipped.any()) == skips
        assert not bool(weights[skipped].any())


def test_fewer_experts_keep_the_weights_that_they_had_among_more(tiny_mixtral: MixtralFactory) -> None:
    """What arXiv 2609.04575 does: K goes from 4 to 2, the weights stay those of 4."""
    trained = tiny_mixtral(num_experts_per_tok=4)
    fewer = tiny_mixtral(num_experts_per_tok=2)
    fewer.load_state_dict(trained.state_dict())
    trained.set_experts_implementation("eager")
    for layer in trained.model.layers:  # transformers' own code, the two weakest of four experts with weight 0

        def weakest_out(_: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, experts = output
            return logits, torch.cat([weights[:, :2], torch.zeros_like(weights[:, 2:])], 1), experts

        layer.mlp.gate.register_forward_hook(weakest_out)
    moe_ext.patch(fewer, renormalise=4)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(fewer(tokens).logits, trained(tokens).logits, rtol=1e-4, atol=1e-4)
        plain = moe_ext.patch(fewer, renormalise="kept")(tokens).logits
    assert not torch.allclose(plain, trained(tokens).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "jamba", "mixtral"])
def test_none_leaves_every_familys_kept_weights_as_they_were(name: str) -> None:
    model = build(name)
    thresholds = torch.full((len(moe_blocks(model)), moe_blocks(model)[0].top_k - 1), 0.9)
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = [block.router(x) for block in moe_blocks(moe_ext.patch(model))]
        after = [block.router(x) for block in moe_blocks(moe_ext.patch(model, skip=thresholds, renormalise="none"))]
    for (_, weights, _), (_, kept, experts), block in zip(before, after, moe_blocks(model), strict=True):
        gone = experts == block.num_routed
        assert bool(gone.any())
        assert torch.equal(kept, weights.masked_fill(gone, 0.0))


@given(seed=st.integers(0, 99), top_k=st.integers(1, 6), more=st.integers(0, 5))
def test_the_share_of_the_largest_is_differentiable(seed: int, top_k: int, more: int) -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    among = min(6, top_k + more)
    share = share_of_largest(logits, top_k, among)
    values = logits.detach().sort(dim=1, descending=True).values.exp()
    torch.testing.assert_close(share[:, 0].detach(), values[:, :top_k].sum(1) / values[:, :among].sum(1))
    assert torch.autograd.gradcheck(lambda each: share_of_largest(each, top_k, among), logits)


def test_slots_keep_their_dtype_and_places_without_scaling() -> None:
    weights, experts = torch.tensor([[0.25, 1.0, 0.5]], dtype=torch.bfloat16), torch.tensor([[3, 1, 4]])
    kept, left = skip_weak(weights, experts, torch.tensor([0.6, 0.2]), 8, rescale=False)
    assert kept.tolist() == [[0.25, 1.0, 0.0]]
    assert kept.dtype == torch.bfloat16
    assert left.tolist() == [[3, 1, 8]]


def test_the_scale_is_in_the_config_and_stock_readers_ignore_it(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    model, tokens = tiny_mixtral(), random_tokens(2, 9)
    with torch.no_grad():
        plain = model(tokens).logits
        moe_ext.patch(model, skip=THRESHOLDS, renormalise="none")
        expected = model(tokens).logits
        model.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())["moe_ext"]
        assert stored["renormalise"] == "none"
        loaded = MixtralForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(tokens).logits, plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(moe_ext.patch(loaded)(tokens).logits, expected)
        # Another option replaces it; thresholds stay.
        kept = moe_ext.patch(loaded, renormalise="kept")(tokens).logits
        assert not torch.allclose(kept, expected)
        assert loaded.config.moe_ext == {"skip_thresholds": stored["skip_thresholds"]}
        moe_ext.patch(loaded, renormalise=4)
        assert loaded.config.moe_ext["renormalise"] == 4
        # Without skipping by this object nothing of the config applies, and all of it stays.
        torch.testing.assert_close(moe_ext.patch(loaded, skip=None)(tokens).logits, plain, rtol=1e-4, atol=1e-4)
        assert altered_gates(loaded) is None
    moe_ext.unpatch(loaded)
    assert loaded.config.moe_ext == stored
    assert not hasattr(moe_ext.unpatch(model).config, "moe_ext")


@pytest.mark.parametrize(
    ("name", "renormalise", "message"),
    [
        ("mixtral", "all", "renormalise is 'all'; expected 'kept', 'none', a number of experts, or 'config'"),
        ("mixtral", True, "renormalise is True; expected"),
        ("mixtral", 0, "renormalise is 0; expected"),
        ("mixtral", 1, r"renormalise is 1; expected 2 to 8 \(top_k to the experts of model.layers.0.mlp\)"),
        ("mixtral", 9, "renormalise is 9; expected 2 to 8"),
        ("olmoe", 9, "renormalise is 9: a number is for routers that take the softmax over the selected logits"),
        ("deepseek_v3", 4, "renormalise is 4: a number is for routers"),
    ],
)
def test_what_the_router_cannot_have_is_refused(name: str, renormalise: Any, message: str) -> None:
    model = build(name)
    with pytest.raises(ValueError, match=message):
        moe_ext.patch(model, renormalise=renormalise)
    assert not is_patched(model)
    assert not hasattr(model.config, "moe_ext")


@pytest.mark.parametrize("stored", ["most", 0, 1.5, None, True, [2]])
def test_a_scale_that_is_none_in_a_config_is_refused(tiny_mixtral: MixtralFactory, stored: Any) -> None:
    model = tiny_mixtral()
    model.config.moe_ext = {"renormalise": stored}
    with pytest.raises(ValueError, match=r"config.moe_ext.renormalise is .*; expected 'kept', 'none' or a number"):
        moe_ext.patch(model)
    assert not is_patched(model)


def test_statistics_and_plans_are_not_made_of_altered_weights(tiny_mixtral: MixtralFactory) -> None:
    model = moe_ext.patch(tiny_mixtral(), renormalise=4)
    assert altered_gates(model) == "runs with renormalise=4"
    with pytest.raises(
        ValueError, match=r"the model runs with renormalise=4, which would bias its statistics; patch\("
    ):
        moe_ext.calibrate(model, padded_batches(), progress=False)
    with pytest.raises(ValueError, match=r"the model runs with renormalise=4; patch\(model, skip=None\) before"):
        moe_ext.search(model, padded_batches(), keep=6, progress=False)
    moe_ext.patch(model, skip=THRESHOLDS, renormalise="none")
    model = moe_ext.patch(model, skip=None)
    model.config.moe_ext = {"skip_thresholds": THRESHOLDS.tolist(), "renormalise": "none"}
    with pytest.raises(ValueError, match="skip: the model's config has renormalise='none', which search does not"):
        moe_ext.search(model, padded_batches(), keep=6, skip="config", progress=False)


def test_the_command_stores_it_and_evaluation_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    (tmp_path / "c.txt").write_text((DEMO_MODEL / "held_out" / "c.txt").read_text()[:1500])
    text = {"c": (tmp_path / "c.txt").read_text()}
    stats = tmp_path / "stats.safetensors"
    assert inside("calibrate", str(DEMO_MODEL), "--text", str(tmp_path), "--window", "64", "--out", str(stats)) == 0
    assert inside("skip", str(DEMO_MODEL), str(stats), "--renormalise", "none", "--out", str(tmp_path / "out")) == 0
    save_checkpoint(model, tokenizer, tmp_path / "copy")
    assert inside("skip", str(tmp_path / "copy"), str(stats), "--renormalise", "none", "--in-place") == 0
    found = moe_json("eval", tmp_path / "out", "--text", tmp_path, "--window", "64")
    thresholds = moe_ext.skip_thresholds(moe_ext.ExpertStatistics.load(stats))
    perplexities = []
    for scale in ("none", "kept"):
        moe_ext.patch(model, skip=thresholds, renormalise=scale)
        perplexities.append(moe_ext.perplexity(model, text, tokenizer, window=64).per_domain)
    assert found["perplexity"] == perplexities[0] != perplexities[1]
    copied, _ = load_checkpoint(tmp_path / "copy")
    assert scale_in_config(copied.config) == "none"
    capsys.readouterr()
    assert inside("skip", str(DEMO_MODEL), str(stats), "--renormalise", "most", "--out", str(tmp_path / "x")) == 2
    assert "expected kept, none or a number of experts" in capsys.readouterr().err
