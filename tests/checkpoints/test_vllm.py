"""Pruned checkpoints load in vLLM and generate what they generate in transformers. Opt-in: ``make test-vllm``.

vLLM wants another transformers than moe_ext: it lives in an environment of its own, whose Python MOE_EXT_VLLM_PYTHON
names. That there is no moe_ext in it is part of the test; our plugin, which is there, is switched off.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint, write_thresholds
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import moe_blocks
from tests.support.batches import random_tokens
from tests.support.families import HALVES, build, channels_for, keep_of, plan_for
from tests.support.paths import DEMO_MODEL
from tests.support.vllm_process import STOCK, VLLM, generated

pytestmark = pytest.mark.skipif(not VLLM, reason="opt-in: make test-vllm")

TOKENS = 64
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe"]
# A head size that vLLM's attention for CPUs has.
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
UNEVEN = ["mixtral", "qwen3_moe"]


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """The demo model, whole, and file by file pruned, with thresholds for skipping, and thinned; small random models,
    pruned, thinned, and both."""
    model, _ = load_checkpoint(DEMO_MODEL)
    moe_ext.prune_checkpoint(
        DEMO_MODEL, moe_ext.plan(moe_ext.aimer(model), keep=6), folder / "demo, pruned", dtype="float32", progress=False
    )
    write_thresholds(folder / "demo, pruned", torch.full((4, 1), 0.5), range(4))
    thinner = replace(plan_of_all(model), channels=channels_for(model, 112))
    moe_ext.prune_checkpoint(DEMO_MODEL, thinner, folder / "demo, thin", dtype="float32", progress=False)
    for family in FAMILIES:
        build(family, **SIZES).save_pretrained(folder / f"{family}, whole")
        model = build(family, **SIZES)
        moe_ext.prune(model, plan_for(model, keep_of(model, family))).save_pretrained(folder / f"{family}, pruned")
        write_thinned(family, folder / f"{family}, thin", fewer=False)
        write_thinned(family, folder / f"{family}, fewer and thin", fewer=True)
    for family in FAMILIES:
        model = build(family, **SIZES)
        text = [{"input_ids": random_tokens(2, 24, vocabulary=256)}]
        means = moe_ext.calibrate(model, text, progress=False, outputs=True)
        moe_ext.prune(model, plan_for(model, keep_of(model, family)), novices=means).save_pretrained(
            folder / f"{family}, novices"
        )
    for family in UNEVEN:
        model = build(family, **SIZES)
        moe_ext.prune(model, plan_for(model, keep_of(model, family, fewer=1))).save_pretrained(
            folder / f"{family}, uneven"
        )
    return {"demo, whole": DEMO_MODEL, **{path.name: path for path in folder.iterdir()}}


def plan_of_all(model: PreTrainedModel) -> PruningPlan:
    return plan_for(model, tuple(tuple(range(block.num_experts)) for block in moe_blocks(model)))


def write_thinned(family: str, folder: Path, fewer: bool) -> None:
    """A random model whose experts keep random channels, half of them or two thirds."""
    model, smaller = build(family, **SIZES), build(family, **SIZES)
    plan = plan_for(model, keep_of(model, family)) if fewer else plan_of_all(model)
    moe_ext.prune(smaller, plan)
    # A seed with which no two tokens of any model are near a tie.
    channels = channels_for(smaller, 12 if family in HALVES else 16, seed=2)
    moe_ext.prune(model, replace(plan, channels=channels)).save_pretrained(folder)


PROMPTS = [random_tokens(1, 5, vocabulary=256)[0].tolist(), random_tokens(1, 24, seed=1, vocabulary=256)[0].tolist()]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def in_vllm(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process of vLLM says of all checkpoints."""
    folder = tmp_path_factory.mktemp("vllm")
    jobs = {name: {"checkpoint": str(path), "prompts": PROMPTS} for name, path in checkpoints.items()}
    return generated(folder, jobs, TOKENS, STOCK)


def greedy_of_transformers(folder: Path, prompt: list[int]) -> tuple[list[int], float]:
    """The next tokens of the stock model, and by how much the best logit was ahead of the second where it was least."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(out.logits).topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), float((best[..., 0] - best[..., 1]).min())


@pytest.mark.parametrize(
    "name",
    [
        *(f"demo, {what}" for what in ("whole", "pruned", "thin")),
        *(f"{family}, {what}" for family in FAMILIES for what in ("whole", "pruned", "thin", "fewer and thin")),
    ],
)
def test_vllm_generates_the_tokens_of_transformers(
    name: str, checkpoints: dict[str, Path], in_vllm: dict[str, dict[str, Any]]
) -> None:
    assert "tokens" in in_vllm[name], in_vllm[name]
    for prompt, got in zip(PROMPTS, in_vllm[name]["tokens"], strict=True):
        expected, lead = greedy_of_transformers(checkpoints[name], prompt)
        assert lead > 2e-4  # float32 sums in another order move logits of about 10 by 1e-5: no tie can turn
        assert len(expected) == TOKENS
        assert got == expected


@pytest.mark.parametrize("family", UNEVEN)
def test_vllm_refuses_layers_with_different_numbers_of_experts(family: str, in_vllm: dict[str, dict[str, Any]]) -> None:
    assert "is a per-layer attribute and may vary across layers" in in_vllm[f"{family}, uneven"]["error"]


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_refuses_means_in_the_place_of_experts(family: str, in_vllm: dict[str, dict[str, Any]]) -> None:
    assert "There is no module or parameter named" in in_vllm[f"{family}, novices"]["error"]
    assert "moe_ext_novices" in in_vllm[f"{family}, novices"]["error"]
