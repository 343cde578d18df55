"""search of families whose routers do anything: against layers that are really pruned and run the family's own code."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_ext
from moe_ext import SearchResult
from moe_ext.models.blocks import MoeBlock, moe_blocks
from moe_ext.models.sliced_router import SlicedRouter
from moe_ext.pruning.keep_experts import keep_experts
from moe_ext.reconstruction import expert_outputs, layer_search, routed_errors
from moe_ext.reconstruction.subsets import GreedySearch, all_subsets
from moe_ext.runtime.backward_walk import OutputGradients
from moe_ext.runtime.head_gradients import Labels
from tests.reconstruction.test_search import TOLERANCE, losses_by_subset
from tests.support import families
from tests.support.batches import padded_batches

# Softmax over all experts; sigmoid, correction bias and groups; a bias and a softmax; a bias that the block holds.
DIFFERENT: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False, "num_hidden_layers": 2},
    "olmoe": {"num_experts": 7, "num_experts_per_tok": 2, "norm_topk_prob": False, "num_hidden_layers": 2},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3},
    "glm4_moe": {"num_hidden_layers": 3},
    "ernie4_5_moe": {"num_hidden_layers": 3},
    "phimoe": {"num_hidden_layers": 2},
    "minimax_m2": {"num_hidden_layers": 2},
    "gpt_oss": {"num_hidden_layers": 2},
    "mixtral": {"hidden_act": "relu", "num_hidden_layers": 2},
}
OFF_THE_OPERATORS = ("mixtral",)  # by that activation
KEEP = {"deepseek_v3": 6, "glm4_moe": 6}


def build(name: str) -> Any:
    return families.build(name, **DIFFERENT[name])


def search(model: Any, **arguments: Any) -> SearchResult:
    return moe_ext.search(model, padded_batches(), progress=False, **arguments)


def kept_of(block: MoeBlock, size: int) -> Iterator[tuple[int, ...]]:
    """Every set of that size which keeps as many experts of every group, by its dropped experts."""
    groups = block.groups
    for dropped in itertools.combinations(range(block.num_experts), block.num_experts - size):
        if len({sum(e * groups // block.num_experts == group for e in dropped) for group in range(groups)}) == 1:
            yield tuple(expert for expert in range(block.num_experts) if expert not in dropped)


def skipped(weights: Tensor, thresholds: Tensor | None) -> Tensor:
    """Weights (T, K) with the skip rule applied, a token at a time."""
    if thresholds is None:
        return weights
    rows = []
    for row in weights.tolist():
        order = sorted(range(len(row)), key=lambda slot: -row[slot])
        kept = list(row)
        for rank, slot in enumerate(order[1:]):
            if row[slot] < float(thresholds[rank]) * row[order[0]]:
                kept[slot] = 0.0
        rows.append([value * sum(row) / sum(kept) for value in kept])
    return torch.tensor(rows)


def inputs_of(model: Any, layer: int) -> list[Tensor]:
    """What a stock model gives a layer for every batch."""
    seen: list[Tensor] = []
    handle = moe_blocks(model)[layer].module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in padded_batches():
        with torch.no_grad():
            model(**batch)
    handle.remove()
    return seen


def outputs_of(block: MoeBlock, inputs: list[Tensor], thresholds: Tensor | None = None) -> list[Tensor]:
    """What a layer's experts return for every batch (T, H), without padding."""
    seen: list[Tensor] = []

    def skip(module: Any, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        return output[0], skipped(output[1], thresholds), *output[2:]

    handles = [block.experts.register_forward_hook(lambda module, args, out: seen.append(out))]
    handles += [block.router.register_forward_hook(skip)]
    for x in inputs:
        with torch.no_grad():
            block.module(x)
    for handle in handles:
        handle.remove()
    masks = [mask_of(batch) for batch in padded_batches()]
    return [out.flatten(0, -2)[mask].double() for out, mask in zip(seen, masks, strict=True)]


def mask_of(batch: dict[str, Tensor]) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()


def pruned(block: MoeBlock, kept: tuple[int, ...]) -> MoeBlock:
    """A copy of a layer without the other experts."""
    block = next(each for each in moe_blocks(copy.deepcopy(block.model)) if each.name == block.name)
    with torch.no_grad():
        keep_experts(block, kept)
    return block


def brute_force(
    block: MoeBlock, inputs: list[Tensor], size: int, thresholds: Tensor | None = None
) -> dict[tuple[int, ...], list[Tensor]]:
    """By the experts kept, what a layer's output changes by in every batch when it is really pruned."""
    full = outputs_of(block, inputs)
    changes = {}
    for kept in kept_of(block, size):
        outputs = outputs_of(pruned(block, kept), inputs, thresholds)
        changes[kept] = [a - b for a, b in zip(full, outputs, strict=True)]
    return changes


def norms(changes: dict[tuple[int, ...], list[Tensor]]) -> dict[tuple[int, ...], float]:
    return {kept: sum(float(change.norm()) for change in of_batches) for kept, of_batches in changes.items()}


@pytest.mark.parametrize("name", list(DIFFERENT))
def test_losses_equal_those_of_layers_that_are_really_pruned(name: str) -> None:
    model, last = build(name), len(moe_blocks(build(name))) - 1
    size = KEEP.get(name, 5)
    result = search(model, keep=size, strict=name not in OFF_THE_OPERATORS)
    assert result.is_exact()
    got = losses_by_subset(result.losses[last], size)
    expected = norms(brute_force(moe_blocks(model)[last], inputs_of(model, last), size))
    assert list(got) == list(expected)
    assert list(got.values()) == pytest.approx(list(expected.values()), rel=TOLERANCE)
    assert result.plan.keep[last] == min(expected, key=expected.__getitem__)
    moe_ext.prune(model, result.plan)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "minimax_m2"])
@pytest.mark.parametrize("loss", ["reconstruction", "fisher"])
def test_a_routers_own_code_finds_what_its_formula_does(name: str, loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"keep": 6, "loss": loss, "budget": "layer"}
    by_formula = search(build(name), **arguments)
    calls, route = [], SlicedRouter.route

    def counting(self: SlicedRouter, *call: Any) -> Any:
        calls.append(call)
        return route(self, *call)

    monkeypatch.setattr(SlicedRouter, "route", counting)
    monkeypatch.setattr(routed_errors, "known_router", lambda block: None)
    monkeypatch.setattr(layer_search, "ranks_stay", lambda block, thresholds: None)
    by_code = search(build(name), **arguments)
    assert calls
    for ours, theirs in zip(by_formula.losses, by_code.losses, strict=True):
        assert torch.equal(ours.keep, theirs.keep)
        scale = float(theirs.losses.max())
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=TOLERANCE, atol=1e-7 * scale)


@pytest.mark.parametrize("name", ["deepseek_v3", "olmoe"])
def test_losses_of_layers_that_skip_equal_brute_force(name: str) -> None:
    model = build(name)
    thresholds = torch.full((len(moe_blocks(model)), moe_blocks(model)[0].top_k - 1), 0.8)
    result = search(model, keep=6, skip=thresholds)
    got = losses_by_subset(result.losses[1], 6)
    expected = norms(brute_force(moe_blocks(model)[1], inputs_of(model, 1), 6, thresholds[1]))
    assert list(got.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    assert result.layer_losses()[1] > search(model, keep=6).layer_losses()[1]


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_m2", "qwen3_moe"])
def test_progressive_judges_on_what_really_pruned_layers_give(name: str) -> None:
    model = build(name)
    result = search(model, keep=6, method="progressive")
    given = copy.deepcopy(model)
    keep_experts(moe_blocks(given)[0], result.plan.keep[0])
    got = losses_by_subset(result.losses[1], 6)
    expected = norms(brute_force(moe_blocks(model)[1], inputs_of(given, 1), 6))
    assert list(got.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    assert result.losses[1].losses.tolist() != search(model, keep=6).losses[1].losses.tolist()


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_fisher_losses_equal_the_projections_of_really_pruned_layers(name: str) -> None:
    model, size = build(name), 6
    strict = name not in OFF_THE_OPERATORS
    result = search(model, keep=size, loss="fisher", budget="layer", labels="text", strict=strict)
    batches, found = padded_batches(), {}
    masks = [batch["attention_mask"].flatten().bool() if "attention_mask" in batch else None for batch in batches]
    with OutputGradients(model, moe_blocks(model), batches, masks, Labels("text")) as walk:
        walk.observe(1, lambda batch, x, logits, gradient: found.update({batch: gradient}))
    gradients = [found[batch][mask_of(batches[batch])] for batch in range(len(batches))]
    got, expected = losses_by_subset(result.losses[1], size), {}
    for kept, changes in brute_force(moe_blocks(model)[1], inputs_of(model, 1), size).items():
        squares = [(change * g.double()).sum(1).square() for change, g in zip(changes, gradients, strict=True)]
        expected[kept] = float(torch.cat(squares).mean() / 2)
    assert list(got) == list(expected)
    scale = max(expected.values())
    assert list(got.values()) == pytest.approx(list(expected.values()), rel=1e-3, abs=1e-5 * scale)
    assert "predicted" in result.plan.made_by


@pytest.mark.parametrize("name", ["deepseek_v3", "olmoe"])
def test_greedy_evaluates_the_same_losses_and_keeps_groups_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = search(build(name), keep=4)
    monkeypatch.setattr(routed_errors, "MEMORY", 3000)  # most lies in the file
    monkeypatch.setattr(routed_errors, "DIFFERENCE_BYTES", 0)
    monkeypatch.setattr(expert_outputs, "GRAM_BYTES", 0)
    greedy = search(build(name), keep=4, method="greedy")
    assert exact.is_exact()
    assert not greedy.is_exact()
    for whole, part, best, found in zip(
        exact.losses, greedy.losses, exact.layer_losses(), greedy.layer_losses(), strict=True
    ):
        known = losses_by_subset(whole, 4)
        for subset, loss in losses_by_subset(part, 4).items():
            assert loss == pytest.approx(known[subset], rel=1e-9)
        assert best * (1 - 1e-9) <= found <= 1.1 * best
    blocks = moe_blocks(build(name))
    for rows in (layer.keep.view(len(layer.keep), blocks[0].groups, -1).sum(2) for layer in greedy.losses):
        assert bool((rows == rows[:, :1]).all())


def test_a_models_budget_is_shared_out_in_steps_of_the_groups() -> None:
    result = search(build("deepseek_v3"), keep=6, budget="model")
    counts = [len(kept) for kept in result.plan.keep]
    assert sum(counts) == 12
    assert {count % 2 for count in counts} == {0}
    curves = [[layer.best(size)[1] for size in (8, 6, 4)] for layer in result.losses]
    shares = [(4, 8), (6, 6), (8, 4)]
    totals = [curves[0][(8 - a) // 2] + curves[1][(8 - b) // 2] for a, b in shares]
    assert sum(result.layer_losses()) == pytest.approx(min(totals))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (5, "keep: 5 keeps 5 experts, which 2 groups do not share equally"),
        (2, r"keep: 2 keeps 2 of 8 experts; expected 4 to 8 \(what the router needs to all\)"),
    ],
)
def test_numbers_that_the_groups_cannot_have_are_refused(keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(build("deepseek_v3"), keep=keep)


def test_experts_that_the_operators_cannot_run_are_searched_where_the_advice_is_followed() -> None:
    with pytest.raises(ValueError, match="With strict=False such layers stay on transformers' implementation"):
        search(build("mixtral"), keep=6)
    with pytest.warns(UserWarning, match="left on transformers"):
        result = search(build("mixtral"), keep=6, strict=False)
    assert result.plan.made_by["strict"] is False


@pytest.mark.parametrize(("num_experts", "size", "groups"), [(6, 4, 1), (6, 4, 2), (8, 4, 4), (9, 6, 3), (4, 4, 2)])
def test_all_subsets_of_groups_are_those_that_keep_as_many_of_each(num_experts: int, size: int, groups: int) -> None:
    expected = []
    for dropped in itertools.combinations(range(num_experts), num_experts - size):
        row = [expert not in dropped for expert in range(num_experts)]
        of_groups = [
            sum(row[first : first + num_experts // groups]) for first in range(0, num_experts, num_experts // groups)
        ]
        if len(set(of_groups)) == 1:
            expected.append(row)
    assert all_subsets(num_experts, [size], groups).tolist() == expected


def test_a_greedy_walk_in_groups_drops_one_of_each_and_no_protected_one() -> None:
    values = torch.tensor([1.0, 5.0, 2.0, 9.0, 0.0, 3.0, 4.0, 8.0], dtype=torch.float64)
    walk = GreedySearch(lambda keep: (~keep).double() @ values, 8, lambda *_: None, stay=[4], groups=2)
    walk.run([4])
    keep, losses = walk.subsets()
    best = keep[keep.sum(1) == 4][losses[keep.sum(1) == 4].argmin()]
    assert best.tolist() == [False, True, False, True, True, False, False, True]
    assert bool((keep.view(-1, 2, 4).sum(2)[:, 0] == keep.view(-1, 2, 4).sum(2)[:, 1]).all())
