"""Models that accelerate dispatches: weights that are in memory only while their module runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_ext
from moe_ext.models.blocks import moe_blocks
from tests.support.batches import random_tokens
from tests.support.families import build, keep_of, logits_of, plan_for
from tests.support.reference import DEVICES

pytest.importorskip("accelerate")

OUTSIDE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAPS: dict[str, dict[str, str]] = {
    "one device": {"": "cpu"},
    "some layers on disk": {
        **OUTSIDE, "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    },
    "all layers on disk": {**OUTSIDE, "model.layers": "disk"},
    "everything but a norm on disk": {**dict.fromkeys(OUTSIDE, "disk"), "model.layers": "disk", "model.norm": "cpu"},
}  # fmt: skip
if "cuda" in DEVICES:
    MAPS |= {
        "cuda:0, cpu and disk": {
            "model.embed_tokens": "cuda:0", "model.norm": "cuda:0", "model.rotary_emb": "cuda:0", "lm_head": "cuda:0",
            "model.layers.0": "cuda:0", "model.layers.1": "cpu", "model.layers.2": "disk",
        },
        "cuda:0 for the middle layer": {**OUTSIDE, "model.layers.0": "cpu", "model.layers.1": "cuda:0",
                                        "model.layers.2": "disk"},
    }  # fmt: skip


@pytest.fixture(params=["mixtral", "deepseek_v3"])  # a fused router, and one that runs its own code
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    build(request.param).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def dispatched(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    where: dict[str, Any] = {"device_map": MAPS[name], "offload_folder": str(folder / "offload")}
    return moe_ext.from_pretrained(folder, dtype=dtype, **where).eval()


@pytest.mark.parametrize("name", MAPS)
def test_a_patched_model_computes_what_the_stock_one_does(name: str, folder: Path) -> None:
    tokens = random_tokens(2, 9)
    expected = logits_of(moe_ext.from_pretrained(folder), tokens)
    model = dispatched(folder, name)
    moe_ext.patch(model)
    # float32 sums of a few dozen terms in another order, through three layers
    torch.testing.assert_close(logits_of(model, tokens).cpu(), expected, rtol=1e-4, atol=1e-4)
    if name != "one device":
        assert next(moe_blocks(model)[-1].experts.parameters()).is_meta  # still offloaded


@pytest.mark.parametrize("name", MAPS)
def test_a_patched_model_in_bfloat16_is_as_near_to_float32_as_the_stock_one(name: str, folder: Path) -> None:
    tokens = random_tokens(4, 32)
    exact = logits_of(moe_ext.from_pretrained(folder, dtype=torch.float32), tokens)
    model = dispatched(folder, name, torch.bfloat16)
    stock = (logits_of(model, tokens).cpu().float() - exact).abs().mean()
    ours = (logits_of(moe_ext.patch(model), tokens).cpu().float() - exact).abs().mean()
    # Both round weights and activations alike; a token near a tie, of which each has its own, changes its expert.
    assert 0 < ours < 1.25 * stock


@pytest.mark.parametrize("name", MAPS)
def test_skipping_works_below_the_hooks_and_unpatching_restores(name: str, folder: Path) -> None:
    tokens = random_tokens(2, 9)
    model = dispatched(folder, name)
    stock = logits_of(model, tokens)
    blocks = moe_blocks(model)
    moe_ext.patch(model, skip=torch.full((len(blocks), blocks[0].top_k - 1), 0.9))
    with moe_ext.count_skips(model) as count:
        assert not torch.allclose(logits_of(model, tokens), stock)
    assert count.rate() > 0.1
    assert torch.equal(logits_of(moe_ext.unpatch(model), tokens), stock)


@pytest.mark.parametrize("name", [name for name in MAPS if name not in ("one device", "all layers on disk")])
def test_calibration_finds_what_it_finds_in_memory(name: str, folder: Path) -> None:
    batches = [{"input_ids": random_tokens(2, 9, seed=seed)} for seed in range(2)]
    here, there = moe_ext.from_pretrained(folder), dispatched(folder, name)
    expected = moe_ext.calibrate(here, batches, progress=False)
    got = moe_ext.calibrate(there, batches, progress=False)
    assert torch.equal(got.coactivation, expected.coactivation)
    # Offloaded weights may lie at other addresses, where products round differently.
    torch.testing.assert_close(got.moments, expected.moments, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_perplexity_is_that_of_the_model_in_memory(name: str, folder: Path) -> None:
    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 96 for letter in text]}

    texts, options = {"all": "the quick brown fox jumps over the lazy dog"}, {"window": 16, "progress": False}
    expected = moe_ext.perplexity(moe_ext.from_pretrained(folder), texts, tokenizer, **options)  # type: ignore[arg-type]
    model = moe_ext.patch(dispatched(folder, name))
    # float32 sums of a few dozen terms in another order, through three layers
    assert moe_ext.perplexity(model, texts, tokenizer, **options).mean == pytest.approx(expected.mean, rel=1e-4)  # type: ignore[arg-type]


def test_offloaded_weights_are_not_pruned_scored_or_searched(folder: Path) -> None:
    model = dispatched(folder, "some layers on disk")
    name = model.config.model_type
    plan = plan_for(model, keep_of(model, name))
    with pytest.raises(ValueError, match="offloaded by accelerate's hooks; prune a model that is in memory"):
        moe_ext.prune(model, plan)
    with pytest.raises(ValueError, match="offloaded by accelerate's hooks; score a model"):
        moe_ext.aimer(model)
    with pytest.raises(ValueError, match="offloaded by accelerate's hooks; search a model"):
        moe_ext.search(model, [{"input_ids": random_tokens(1, 9)}], keep=6, progress=False)
