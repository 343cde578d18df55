"""Every family of the installed transformers that goes through its experts interface, each on a tiny random model of
its real config class. No family is named for what works: one that transformers adds tomorrow is run as well.

What a family cannot do stands in ``CANNOT`` with the reason that a user is told; a test wants that very refusal.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import moe_ext
from moe_ext.calibration.statistics import RATIO_BINS, ExpertStatistics
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import MoeBlock, moe_blocks
from moe_ext.models.boundary import eager_forward
from moe_ext.models.fixed_choices import gate_rows, remapped, tables
from moe_ext.models.layout import layout_of
from tests.support import every_family
from tests.support.families import reloaded
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*left on transformers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-token prediction:UserWarning"),
]

FAMILIES = every_family.names()

_ALIKE = "is not homogeneous across layers"
CANNOT: dict[tuple[str, str], str] = {
    # Encoder and decoder have the same experts, under two names.
    ("diffusion_gemma", "all"): "share their experts",
    # One expert a token: there is no weaker one.
    ("zaya", "skip"): "at least 2 experts a token",
    # Numbers of experts that differ between layers: the family's config or code has one for all.
    ("zaya", "uneven"): "ZayaRouter reads the one number",
    ("gemma4", "uneven"): _ALIKE,
    ("dots3_note", "uneven"): _ALIKE,
    ("qwen4_exp", "uneven"): "'num_experts' is a per-layer attribute",
    ("openai_privacy_filter", "uneven"): "do not know which layer they are",
    ("ernie4_5_vl_moe", "uneven"): "beside others of the same layer",
}


@contextmanager
def refused(name: str, *jobs: str) -> Iterator[None]:
    """A family's jobs: whether they go, or are refused with the reason in the table."""
    reasons = [CANNOT[name, job] for job in ("all", *jobs) if (name, job) in CANNOT]
    if not reasons:
        yield
        return
    with pytest.raises(Exception, match=reasons[0]):
        yield


def given(model: PreTrainedModel, *, padding: int = 3) -> dict[str, Tensor]:
    """Text, the last sequence padded; with tokens that count as images where a family has experts for them."""
    kinds = "moe_mm_token_type_ids"
    if kinds not in inspect.signature(model.forward).parameters:
        return every_family.inputs(model, 1, padding=padding)
    inputs = every_family.inputs(model, 1)
    inputs[kinds] = (inputs["input_ids"] % 3 == 0).int()
    return inputs


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def statistics(model: PreTrainedModel, **options: Any) -> ExpertStatistics:
    return moe_ext.calibrate(model, [given(model)], progress=False, strict=False, **options)


def keep_of(blocks: list[MoeBlock], fewer: int = 0) -> tuple[tuple[int, ...], ...]:
    """Random experts to keep, 6 of every layer, or as many less in every second one; as many of every group."""
    generator, kept = torch.Generator().manual_seed(0), []
    for layer, block in enumerate(blocks):
        size, count = block.num_experts // block.groups, 6 - (fewer if layer % 2 else 0)
        chosen = [
            group * size + torch.randperm(size, generator=generator)[: count // block.groups]
            for group in range(block.groups)
        ]
        kept.append(tuple(sorted(torch.cat(chosen).tolist())))
    return tuple(kept)


def plan_of(model: PreTrainedModel, fewer: int = 0) -> PruningPlan:
    blocks = moe_blocks(model)
    layout = layout_of(model, blocks)
    return PruningPlan(layout.model_type, layout.num_experts, layout.top_k, layout.layers, keep_of(blocks, fewer))


def seen_by_experts(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[int, list[tuple[Tensor, ...]]]:
    """What every MoE layer's experts are given, by layer: hidden states (T, H), experts (T, K), weights (T, K)."""
    found: dict[int, list[tuple[Tensor, ...]]] = {}

    def watch(layer: int) -> Callable[..., None]:
        return lambda module, args: found.setdefault(layer, []).append(tuple(each.detach().clone() for each in args))

    handles = [block.experts.register_forward_pre_hook(watch(layer)) for layer, block in enumerate(moe_blocks(model))]
    logits_of(model, inputs)
    for handle in handles:
        handle.remove()
    return found


# ---- patch


@pytest.mark.parametrize("name", FAMILIES)
def test_patched_it_says_the_same_and_unpatched_it_is_what_it_was(name: str) -> None:
    model = every_family.build(name)
    model.set_experts_implementation("eager")
    inputs = given(model)
    expected = logits_of(model, inputs)
    with refused(name, "patch"):
        moe_ext.patch(model, strict=False)
        # The stock path rounds after every step of every layer: some 8 roundings a layer, up to 12 layers with loops.
        bound = 96 * 2.0**-22 * float(expected.abs().max())
        torch.testing.assert_close(logits_of(model, inputs), expected, rtol=0, atol=bound)
        if model.can_generate():
            _generates_what_stock_does(name, model)
        moe_ext.unpatch(model)
        assert torch.equal(logits_of(model, inputs), expected)


def _generates_what_stock_does(name: str, model: PreTrainedModel) -> None:
    stock = every_family.build(name)
    tokens = every_family.inputs(model, 2, shape=(1, 6))
    said = [one.generate(**tokens, max_new_tokens=3, do_sample=False) for one in (stock, model)]
    assert torch.equal(*(getattr(each, "sequences", each) for each in said))


# ---- calibrate


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_equal_brute_force_in_float64(name: str) -> None:
    model = every_family.build(name)
    with refused(name):
        blocks = moe_blocks(model)
        inputs = given(model)
        mask = inputs["attention_mask"].flatten().bool()
        got = statistics(model, outputs=True)
        assert got.output_sum is not None
        assert got.output_pairs is not None
        for layer, calls in seen_by_experts(model, inputs).items():
            expected = _brute_force(blocks[layer], calls, mask)
            ranks = blocks[layer].top_k - 1
            assert torch.equal(got.coactivation[layer], expected["coactivation"])
            assert got.tokens[layer] == expected["tokens"]
            # A ratio that rounds to the other side of a bin's edge is in the bin beside it.
            histogram = got.ratio_histogram[layer, :ranks]
            assert torch.equal(histogram.sum(-1), expected["histogram"].sum(-1))
            beside = (histogram - expected["histogram"]).cumsum(-1)
            assert bool((beside.abs() <= 1).all())
            for field in ("moments", "output_sum", "output_pairs"):
                want = expected[field]
                torch.testing.assert_close(
                    getattr(got, field)[layer], want, rtol=1e-4, atol=1e-4 * float(want.abs().max())
                )


def _brute_force(block: MoeBlock, calls: list[tuple[Tensor, ...]], mask: Tensor) -> dict[str, Tensor]:
    """A layer's statistics slot by slot, the experts being the family's own code in float64."""
    experts = copy.deepcopy(block.experts).double()
    count, ranks = block.num_experts, block.top_k - 1
    moments, histogram = torch.zeros(count, 3, 3).double(), torch.zeros(ranks, RATIO_BINS, dtype=torch.int64)
    coactivation, pairs = torch.zeros(count, count, dtype=torch.int64), torch.zeros(count, count).double()
    sums: Tensor | None = None
    tokens = 0
    for x, index, weights in calls:
        counted = mask if len(mask) == len(x) else torch.ones(len(x), dtype=torch.bool)
        for token in counted.nonzero().flatten().tolist():
            tokens += 1
            norms: dict[int, float] = {}
            for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                if weight == 0:
                    continue
                with torch.no_grad():
                    f = eager_forward(experts)(
                        experts, x[token : token + 1].double(), torch.tensor([[expert]]), torch.ones(1, 1).double()
                    )[0]
                sums = torch.zeros(count, len(f)).double() if sums is None else sums
                sums[expert] += f
                norm = float(f.norm())
                norms[expert] = weight * norm
                for a in range(3):
                    for b in range(3):
                        moments[expert, a, b] += weight**a * norm**b
            for one, first in norms.items():
                for two, second in norms.items():
                    coactivation[one, two] += 1
                    pairs[one, two] += first * second
            ranked = sorted((abs(weight) for weight in weights[token].tolist()), reverse=True)
            for rank, weight in enumerate(ranked[1:]):
                if weight != 0:
                    histogram[rank, min(int(weight / ranked[0] * RATIO_BINS), RATIO_BINS - 1)] += 1
    assert sums is not None
    found = {"moments": moments, "histogram": histogram, "coactivation": coactivation, "output_pairs": pairs}
    return {**found, "output_sum": sums, "tokens": torch.tensor(tokens)}


# ---- prune


@contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[None]:
    """Pruning by definition: the family's own routers, the logits and biases of removed experts at -inf."""
    linear, dropped = F.linear, dict[int, Tensor]()

    def with_mask(*operands: Any) -> Tensor:
        output: Tensor = linear(*operands)
        places = dropped.get(output.shape[-1])
        return output if places is None else output.index_fill(-1, places, -torch.inf)

    def routing(removed: dict[int, Tensor]) -> Callable[..., None]:
        def before(*_: Any) -> None:
            dropped.update(removed)
            F.linear = with_mask  # type: ignore[assignment]

        return before

    def after(*_: Any) -> None:
        dropped.clear()
        F.linear = linear

    handles = []
    for layer, block in enumerate(moe_blocks(model)):
        removed = torch.tensor(plan.removed(layer), dtype=torch.int64)
        sizes = set()
        for part in block.routing_tensors():
            sizes.add(part.tensor.shape[part.dimension.index])
            if part.tensor.numel() == part.tensor.shape[part.dimension.index]:  # a bias, or a scale
                part.tensor.data.index_fill_(part.dimension.index, removed, -torch.inf)
        for table in tables(block).values():  # which says who is chosen whatever the logits
            kept = torch.tensor(plan.keep[layer])
            table.data.copy_(kept[remapped(table, plan.keep[layer], gate_rows(block))])
        handles.append(block.router.register_forward_pre_hook(routing(dict.fromkeys(sizes, removed))))
        handles.append(block.router.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_it_is_the_masked_model_and_stock_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    model, whole = every_family.build(name), every_family.build(name)
    inputs = given(model)
    with refused(name, "prune"):
        plan = plan_of(model)
        moe_ext.prune(model, plan)
        pruned = logits_of(model, inputs)
        with masked(whole, plan):
            expected = logits_of(whole, inputs)
        torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        model.save_pretrained(tmp_path / "pruned")
        again = reloaded(type(model).from_pretrained, tmp_path / "pruned").eval()
        again.set_experts_implementation(model.config._experts_implementation)
        assert torch.equal(logits_of(again, inputs), pruned)


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_from_disk_it_has_the_bytes_that_pruning_in_memory_gives(name: str, tmp_path: Path) -> None:
    model = every_family.build(name)
    model.save_pretrained(tmp_path / "whole")
    with refused(name, "prune"):
        plan = plan_of(model)
        moe_ext.prune_checkpoint(tmp_path / "whole", plan, tmp_path / "pruned", progress=False)
        found = type(model).from_pretrained(tmp_path / "pruned").state_dict()
        moe_ext.prune(model, plan)
        expected = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_may_keep_different_numbers_or_a_refusal_leaves_the_model_alone(name: str, tmp_path: Path) -> None:
    model = every_family.build(name)
    inputs, config = given(model), model.config.to_dict()
    expected = logits_of(model, inputs)
    with refused(name, "prune", "uneven"):
        moe_ext.prune(model, plan_of(model, fewer=2))
    if (name, "all") in CANNOT:
        return
    counts = {block.num_experts for block in moe_blocks(model)}
    if len(counts) == 1:  # it was refused
        assert model.config.to_dict() == config
        assert torch.equal(logits_of(model, inputs), expected)
        return
    assert (name, "uneven") not in CANNOT
    assert counts == {6, 4}
    pruned = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    again = reloaded(moe_ext.from_pretrained, tmp_path).eval()
    assert torch.equal(logits_of(again, inputs), pruned)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_it_is_patched_pruned_and_loaded(name: str, tmp_path: Path) -> None:
    model = every_family.build(name, dtype=torch.bfloat16)
    inputs = given(model)
    with refused(name, "prune"):
        moe_ext.patch(model, strict=False)
        assert bool(logits_of(model, inputs).isfinite().all())
        moe_ext.prune(model, plan_of(model))
        moe_ext.unpatch(model)
        pruned = logits_of(model, inputs)
        model.save_pretrained(tmp_path)
        again = reloaded(type(model).from_pretrained, tmp_path, dtype=torch.bfloat16).eval()
        assert torch.equal(logits_of(again, inputs), pruned)


# ---- skip


@pytest.mark.parametrize("name", FAMILIES)
def test_it_skips_by_the_rule(name: str) -> None:
    model = every_family.build(name)
    inputs = given(model)
    with refused(name, "skip"):
        (_, index, weights), *_ = seen_by_experts(model, inputs)[0]
        thresholds = moe_ext.skip_thresholds(statistics(model))
        moe_ext.patch(model, skip=thresholds, strict=False)
        (_, got_index, got_weights), *_ = seen_by_experts(model, inputs)[0]
        count = moe_blocks(model)[0].num_experts
        got = torch.zeros(len(index), count + 1).double().scatter(1, got_index.long(), got_weights.double())[:, :count]
        torch.testing.assert_close(got, _skipped(index, weights.double(), thresholds[0], count), rtol=1e-4, atol=1e-5)
        assert int((got_index == count).sum()) > 0


def _skipped(index: Tensor, weights: Tensor, thresholds: Tensor, count: int) -> Tensor:
    """(T, E) weights that the rule leaves, token by token."""
    left = torch.zeros(len(index), count).double()
    for token, (experts, values) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        ranked = sorted(zip(values, experts, strict=True), key=lambda pair: -abs(pair[0]))
        kept = ranked[:1] + [
            pair
            for pair, threshold in zip(ranked[1:], thresholds.tolist(), strict=False)
            if not abs(pair[0]) < threshold * abs(ranked[0][0])
        ]
        scale = sum(abs(value) for value in values) / (sum(abs(value) for value, _ in kept) or 1.0)
        for value, expert in kept:
            left[token, expert] = value * scale
    return left


def test_the_table_of_what_cannot_be_done_names_families_that_there_are() -> None:
    assert {name for name, _ in CANNOT} <= set(FAMILIES)
    assert len(FAMILIES) >= 67


def test_what_cannot_be_done_is_said_in_the_docs() -> None:
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    rows = "".join(line for line in text.splitlines() if line.startswith("|"))
    assert {name for name, _ in CANNOT if f"`{name}`" not in rows} == set()
