"""Every family of the installed transformers that goes through its experts interface, each on a tiny random model of
its real config class. No family is named for what works: one that transformers adds tomorrow is run as well, as one is
here that was made up (:mod:`tests.support.made_up_family`).

What a family cannot do stands in ``CANNOT`` with the reason that a user is told; a test wants that very refusal. What
the tests record (``does``) is what benchmarks/families.py makes the table of docs/support.md of.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import moe_ext
from moe_ext.calibration.statistics import RATIO_BINS, ExpertStatistics
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import MoeBlock, moe_blocks
from moe_ext.models.boundary import eager_forward
from moe_ext.models.fixed_choices import gate_rows, remapped, tables
from moe_ext.models.layout import layout_of
from moe_ext.pruning.keep_experts import keep_experts
from moe_ext.runtime.patching import layer_state
from tests.reconstruction.test_search import losses_by_subset
from tests.support import every_family, made_up_family
from tests.support.every_family import TinyFamily, batches_of, given
from tests.support.families import reloaded
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*left on transformers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-token prediction:UserWarning"),
]

FAMILIES = every_family.names()

LOOPS = ("inkling2_loop",)
"""Families that run a layer more than once: sums over its tokens are added up in another order from a folder."""


class Cannot(NamedTuple):
    """What a family does not do: what the refusal says, and the reason in the documentation's words."""

    said: str
    reason: str


_SHARED = Cannot(
    "share their experts|are in two lists of decoder layers",
    "encoder and decoder have the same experts under two names, and what is counted, skipped or removed in one would "
    "hold for the other",
)
CANNOT: dict[tuple[str, str], Cannot] = {
    **{
        ("diffusion_gemma", job): _SHARED
        for job in (
            *("calibrate", "calibrate a folder", "search", "prune", "prune a folder", "stock loads it"),
            *("unequal layers", "bfloat16", "skip"),
        )
    },
    ("inkling2_loop", "search"): Cannot(
        "runs 3 times in a forward pass", "decoder layers run more than once, each time on other inputs"
    ),
    ("muse_spark", "operators"): Cannot(
        "a norm after each expert",
        "every expert's output goes through a norm, which no operator has; `strict=False` leaves such experts on "
        "transformers' implementation",
    ),
    ("zaya", "skip"): Cannot("at least 2 experts a token", "nothing to do: a token has one expert, and none is weaker"),
}

Does = Callable[[str], AbstractContextManager[None]]
Record = Callable[[str, object], None]


@pytest.fixture(scope="module", params=[*FAMILIES, made_up_family.NAME])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyFamily]:
    """A family, for all the tests before the next one."""
    name, folder = request.param, tmp_path_factory.mktemp("family")
    if name != made_up_family.NAME:
        yield TinyFamily(name, folder)
        return
    with made_up_family.registered(tmp_path_factory.mktemp("transformers")):
        assert name in every_family.names()
        yield TinyFamily(name, folder)


@pytest.fixture
def does(family: TinyFamily, record_property: Record) -> Does:
    """Runs a job of the family: it goes, or is refused with the reason in the table."""

    @contextmanager
    def run(job: str) -> Iterator[None]:
        cannot = CANNOT.get((family.name, job))
        record_property(f"{family.name} {job}", "yes" if cannot is None else cannot.reason)
        if cannot is None:
            yield
            return
        with pytest.raises(Exception, match=cannot.said):
            yield

    return run


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def statistics(model: PreTrainedModel, **options: Any) -> ExpertStatistics:
    return moe_ext.calibrate(model, [given(model)], progress=False, strict=False, **options)


def keep_of(blocks: list[MoeBlock], fewer: int = 0) -> tuple[tuple[int, ...], ...]:
    """Random experts to keep, 6 of every layer, or as many less in every second one; as many of every group."""
    generator, kept = torch.Generator().manual_seed(0), []
    layers = list(dict.fromkeys(block.layer for block in blocks))
    for block in blocks:
        size, count = block.num_experts // block.groups, 6 - (fewer if layers.index(block.layer) % 2 else 0)
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


def test_patched_it_says_the_same_and_unpatched_it_is_what_it_was(
    family: TinyFamily, does: Does, record_property: Record
) -> None:
    model = family.model()
    model.set_experts_implementation("eager")
    inputs = given(model)
    expected = logits_of(model, inputs)
    with does("operators"):
        moe_ext.patch(model)
    with does("patch"):
        moe_ext.patch(model, strict=False)
        fused = all(layer_state(block).router is not None for block in moe_blocks(model))
        record_property(f"{family.name} router", "one operator" if fused else "its own code")
        # The stock path rounds after every step of every layer: some 8 roundings a layer, up to 12 layers with loops.
        bound = 96 * 2.0**-22 * float(expected.abs().max())
        torch.testing.assert_close(logits_of(model, inputs), expected, rtol=0, atol=bound)
        if model.can_generate() and every_family.CANVAS not in inputs:  # denoising hangs on the last bits
            _generates_what_stock_does(family.whole, model)
        moe_ext.unpatch(model)
        assert torch.equal(logits_of(model, inputs), expected)


def _generates_what_stock_does(stock: PreTrainedModel, model: PreTrainedModel) -> None:
    tokens = every_family.inputs(model, 2, shape=(1, 6))
    said = [one.generate(**tokens, max_new_tokens=3, do_sample=False) for one in (stock, model)]
    assert torch.equal(*(getattr(each, "sequences", each) for each in said))


# ---- calibrate


def test_statistics_equal_brute_force_in_float64(family: TinyFamily, does: Does) -> None:
    model = family.whole
    with does("calibrate"):
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


def test_statistics_of_a_folder_are_those_of_the_model(family: TinyFamily, does: Does) -> None:
    model, options = family.whole_in_bfloat16, dict[str, Any](progress=False, strict=False)
    batches = batches_of(model)
    with does("calibrate a folder"):
        got = moe_ext.calibrate(family.folder_in_bfloat16, batches, **options)
        expected = moe_ext.calibrate(model, batches, **options)
        for key, tensor in expected.tensors().items():
            if family.name in LOOPS and tensor.is_floating_point():
                torch.testing.assert_close(got.tensors()[key], tensor, rtol=1e-12, atol=0)
            else:
                assert torch.equal(got.tensors()[key], tensor), key
        assert got.model_digest == expected.model_digest


# ---- search


def test_a_search_finds_what_really_pruned_layers_lose(family: TinyFamily, does: Does) -> None:
    model = family.whole
    batches, last = batches_of(model), -1
    with does("search"):
        result = moe_ext.search(model, batches, keep=6, strict=False, progress=False)
        losses = losses_by_subset(result.losses[last], 6)
        assert result.plan.keep[last] == min(losses, key=losses.__getitem__)
        worst, pruned = max(losses, key=losses.__getitem__), family.model()
        _leave(pruned, worst)
        outputs = zip(*(_outputs_of_experts(one, batches, last) for one in (model, pruned)), strict=True)
        loss = sum(float((one - other).norm()) for one, other in outputs)
        assert losses[worst] == pytest.approx(loss, rel=1e-4)  # experts in float32, whose outputs nearly cancel


def _leave(model: PreTrainedModel, kept: tuple[int, ...]) -> None:
    """Really prunes the last layer, and it alone."""
    *others, own = moe_blocks(model)
    beside = [block for block in others if block.layer == own.layer]
    if not beside:
        with torch.no_grad():
            keep_experts(own, kept)
        return
    layout = layout_of(model, [*others, own])  # blocks of one decoder layer need as many each
    counts = [len(kept) if block in beside else block.num_experts for block in others]
    keep = (*(tuple(range(count)) for count in counts), kept)
    moe_ext.prune(model, PruningPlan(layout.model_type, layout.num_experts, layout.top_k, layout.layers, keep))


def _outputs_of_experts(model: PreTrainedModel, batches: list[dict[str, Tensor]], layer: int) -> list[Tensor]:
    """What a layer's experts give together for every batch (T, H), padding left out."""
    found: list[Tensor] = []
    handle = moe_blocks(model)[layer].experts.register_forward_hook(lambda module, args, output: found.append(output))
    for batch in batches:
        logits_of(model, batch)
    handle.remove()
    masks = [batch["attention_mask"].flatten().bool() if "attention_mask" in batch else ... for batch in batches]
    return [output.flatten(0, -2)[mask].double() for output, mask in zip(found, masks, strict=True)]


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


def test_pruned_it_is_the_masked_model_and_from_disk_the_same_bytes(
    family: TinyFamily, does: Does, tmp_path: Path
) -> None:
    model = family.model()
    inputs = given(model)
    with does("prune"):
        plan = plan_of(model)
        moe_ext.prune(model, plan)
        pruned = logits_of(model, inputs)
        whole = family.model()
        with masked(whole, plan):
            expected = logits_of(whole, inputs)
        torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        model.save_pretrained(tmp_path / "memory")
    with does("prune a folder"):
        moe_ext.prune_checkpoint(family.folder, plan_of(family.whole), tmp_path / "disk", progress=False)
        found, expected_tensors = (
            load_file(tmp_path / place / "model.safetensors", "cpu") for place in ("disk", "memory")
        )
        assert found.keys() == expected_tensors.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected_tensors.items())


def test_in_bfloat16_it_is_patched_and_pruned_and_stock_loads_what_is_saved(
    family: TinyFamily, does: Does, tmp_path: Path
) -> None:
    model = copy.deepcopy(family.whole_in_bfloat16)
    inputs = given(model)
    with does("bfloat16"):
        moe_ext.patch(model, strict=False)
        assert bool(logits_of(model, inputs).isfinite().all())
        moe_ext.prune(model, plan_of(model))
        moe_ext.unpatch(model)
    with does("stock loads it"):
        plan_of(family.whole)
        pruned = logits_of(model, inputs)
        model.save_pretrained(tmp_path)
        again = reloaded(type(model).from_pretrained, tmp_path, dtype=torch.bfloat16).eval()
        again.set_experts_implementation(model.config._experts_implementation)
        assert torch.equal(logits_of(again, inputs), pruned)


def test_layers_may_keep_different_numbers(family: TinyFamily, does: Does, tmp_path: Path) -> None:
    model = family.model()
    inputs = given(model)
    with does("unequal layers"):
        moe_ext.prune(model, plan_of(model, fewer=2))
        assert {block.num_experts for block in moe_blocks(model)} == {6, 4}
        pruned = logits_of(model, inputs)
        model.save_pretrained(tmp_path)
        with pytest.raises((RuntimeError, ValueError)):  # not a word about it would be worse
            type(model).from_pretrained(tmp_path)
        again = reloaded(moe_ext.from_pretrained, tmp_path).eval()
        assert torch.equal(logits_of(again, inputs), pruned)
        moe_ext.patch(again, strict=False)
        torch.testing.assert_close(logits_of(again, inputs), pruned, rtol=0, atol=1e-4 * float(pruned.abs().max()))
        assert statistics(again).experts == tuple(block.num_experts for block in moe_blocks(model))


# ---- skip


def test_it_skips_by_the_rule(family: TinyFamily, does: Does) -> None:
    model = family.whole
    inputs = given(model)
    with does("skip"):
        (_, index, weights), *_ = seen_by_experts(model, inputs)[0]
        thresholds = moe_ext.skip_thresholds(statistics(model))
        moe_ext.patch(model, skip=thresholds, strict=False)
        (_, got_index, got_weights), *_ = seen_by_experts(model, inputs)[0]
        moe_ext.unpatch(model)
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


# ---- the table


def test_the_table_in_the_docs_is_of_what_these_tests_find() -> None:
    assert {name for name, _ in CANNOT} <= set(FAMILIES)
    newest = max((ROOT / "benchmarks" / "results").glob("????-??-??-families.json"))
    result = json.loads(newest.read_text(encoding="utf-8"))
    if result["versions"]["transformers"] != transformers.__version__:
        return  # of other families
    assert set(result["families"]) == set(FAMILIES)
    assert len(FAMILIES) >= 67
    for name, jobs in result["families"].items():
        for job in set(jobs) - {"router"}:
            cannot = CANNOT.get((name, job))
            assert jobs[job] == ("yes" if cannot is None else cannot.reason), (name, job)
    assert {job for name, job in CANNOT} <= set(result["families"]["mixtral"])
