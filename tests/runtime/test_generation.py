"""Every way of generating with a patched model that skips: tokens are those of transformers' own code under the same
rule, and every token that ran is counted, drafts that were not accepted among them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_ext
from moe_ext.models.blocks import moe_blocks
from tests.support.batches import random_tokens
from tests.support.families import build

pytestmark = pytest.mark.usefixtures("one_thread")

THRESHOLD = 0.6
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

PROMPTS = random_tokens(2, 7)
REPEATS = random_tokens(1, 6).repeat(1, 3)  # a prompt in which drafts can be looked up; drafts take one sequence
QUANTO = {"backend": "quanto", "q_group_size": 8, "residual_length": 4}  # groups for tiny models
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from a GPU only")
MODES: dict[str, tuple[Tensor, Callable[[], dict[str, Any]]]] = {
    "growing cache": (PROMPTS, dict),
    "no cache": (PROMPTS, lambda: {"use_cache": False}),
    "static cache": (PROMPTS, lambda: {"cache_implementation": "static"}),
    "offloaded cache": (PROMPTS, lambda: {"cache_implementation": "offloaded"}),
    "offloaded static cache": (PROMPTS, lambda: {"cache_implementation": "offloaded_static"}),
    "quantised cache": (PROMPTS, lambda: {"cache_implementation": "quantized", "cache_config": QUANTO}),
    "sampling": (PROMPTS, lambda: {"do_sample": True, "temperature": 0.7}),
    "beams": (PROMPTS, lambda: {"num_beams": 3}),
    "beams, static cache": (PROMPTS, lambda: {"num_beams": 3, "cache_implementation": "static"}),
    "beams, sampling": (PROMPTS, lambda: {"num_beams": 2, "do_sample": True}),
    "drafts of the prompt": (REPEATS, lambda: {"prompt_lookup_num_tokens": 3}),
    "drafts of another model": (REPEATS, lambda: {"assistant_model": build("mixtral", num_hidden_layers=1)}),
}


def skip_by_hook(model: nn.Module) -> dict[str, list[int]]:
    """Has transformers' own routers skip as defined; returns what is counted of it, by layer."""
    blocks = moe_blocks(model)
    counts = {"slots": [0] * len(blocks), "skipped": [0] * len(blocks)}

    def rule(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            logits, weights, experts = output  # weights fall along a row
            kept = weights * (weights >= THRESHOLD * weights[:, :1])
            counts["slots"][layer] += weights.numel()
            counts["skipped"][layer] += int((kept == 0).sum())
            return logits, kept * weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True), experts

        return hook

    for layer, block in enumerate(blocks):
        block.router.register_forward_hook(rule(layer))
    return counts


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=needs_cuda if "offl" in mode else ()) for mode in MODES])
def test_skipping_gives_the_same_tokens_and_counts_in_every_mode(mode: str) -> None:
    if mode == "quantised cache":
        pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    prompts, options = MODES[mode]
    device = "cuda" if mode.startswith("offloaded") else "cpu"
    stock, model = (build("mixtral").to(device) for _ in range(2))
    expected_counts = skip_by_hook(stock)
    moe_ext.patch(model, skip=torch.full((3, 1), THRESHOLD))

    def generated(which: Any) -> Tensor:
        torch.manual_seed(1)
        prompt = prompts.to(device)
        return which.generate(prompt, attention_mask=torch.ones_like(prompt), **{**GREEDY, **options()})

    expected = generated(stock)
    with moe_ext.count_skips(model) as count:
        assert torch.equal(generated(model), expected)
    assert {"slots": count.slots, "skipped": count.skipped} == expected_counts
    assert sum(count.skipped) > 0
