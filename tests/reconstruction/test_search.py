"""search against a float64 brute force that masks the router and runs transformers' eager layer once a subset."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MixtralForCausalLM

import moe_ext
from moe_ext import LayerLosses, SearchResult, ops
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.models.blocks import moe_blocks
from moe_ext.reconstruction import expert_outputs
from moe_ext.reconstruction import losses as layer_losses
from moe_ext.reconstruction.result import SearchFileError
from moe_ext.runtime import layer_walk
from moe_ext.runtime.batches import read_domains, token_batches
from moe_ext.runtime.patching import is_patched
from tests.support import families
from tests.support.batches import padded_batches, random_tokens
from tests.support.mixtral import MixtralFactory
from tests.support.paths import DEMO_MODEL
from tests.support.reference import DEVICES

Batches = list[dict[str, Tensor]]

# Float32 experts and routers err by some 1e-6; what enters a layer, by some 1e-6 more. Issue 5 asks for 1e-5.
TOLERANCE = 1e-5


def search(model: Any, batches: Batches, **arguments: Any) -> SearchResult:
    return moe_ext.search(model, batches, progress=False, **arguments)


# ---- the brute force


def route(logits: Tensor, top_k: int, thresholds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mixtral's router in the precision of the logits (transformers' rounds to float32), and NAEE's skipping."""
    weights, experts = torch.softmax(logits, dim=-1).topk(top_k, dim=-1)
    if thresholds is not None:
        skipped = torch.zeros_like(weights, dtype=torch.bool)
        skipped[:, 1:] = weights[:, 1:] < thresholds * weights[:, :1]
        weights = weights.masked_fill(skipped, 0.0)
    return weights / weights.sum(-1, keepdim=True), experts


def layer_output(block: nn.Module, x: Tensor, keep: Tensor, thresholds: Tensor | None = None) -> Tensor:
    """The float64 block's output for x (T, H), without the experts that are not kept: transformers' eager experts."""
    router: Any = block.gate
    logits = nn.functional.linear(x, router.weight).masked_fill(~keep, -torch.inf)
    weights, experts = route(logits, router.top_k, thresholds)
    output: Tensor = block.experts(x, experts, weights)  # type: ignore[operator]
    return output


def mask_router(block: nn.Module, keep: Tensor, thresholds: Tensor | None) -> None:
    """A live layer routes as if it had only the kept experts."""

    def masked(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = output[0].masked_fill(~keep.to(output[0].device), -torch.inf)
        skip = None if thresholds is None else thresholds.to(logits.device)
        return output[0], *route(logits, int(module.top_k), skip)  # type: ignore[arg-type]

    block.gate.register_forward_hook(masked)  # type: ignore[union-attr]


def inputs_of(model: Any, layer: int, batches: Batches) -> list[Tensor]:
    """The layer's inputs (T, H) float64 of every batch, without padding, from the stock eager model."""
    seen: list[Tensor] = []
    handle = model.model.layers[layer].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in batches:
        with torch.no_grad():
            model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    handle.remove()
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool() for batch in batches]
    return [x.cpu().flatten(0, 1)[mask].double() for x, mask in zip(seen, masks, strict=True)]


def brute_force_losses(
    block: nn.Module, inputs: list[Tensor], size: int, thresholds: Tensor | None = None
) -> dict[tuple[int, ...], float]:
    """Losses by the experts kept, in lexicographic order of the dropped ones."""
    block = copy.deepcopy(block).cpu().double()
    block.experts.config._experts_implementation = "eager"  # type: ignore[union-attr]
    experts = int(block.experts.num_experts)  # type: ignore[union-attr, arg-type]
    losses = {}
    with torch.no_grad():
        full = [layer_output(block, x, torch.ones(experts, dtype=torch.bool)) for x in inputs]
        for dropped in itertools.combinations(range(experts), experts - size):
            keep = torch.ones(experts, dtype=torch.bool)
            keep[list(dropped)] = False
            outputs = [layer_output(block, x, keep, thresholds) for x in inputs]
            loss = sum(float((a - b).norm()) for a, b in zip(full, outputs, strict=True))
            losses[tuple(keep.nonzero().flatten().tolist())] = loss
    return losses


def losses_by_subset(found: LayerLosses, size: int) -> dict[tuple[int, ...], float]:
    rows = zip(found.keep, found.losses.tolist(), strict=True)
    return {tuple(keep.nonzero().flatten().tolist()): loss for keep, loss in rows if int(keep.sum()) == size}


def assert_equals(found: LayerLosses, kept: tuple[int, ...], expected: dict[tuple[int, ...], float]) -> None:
    got = losses_by_subset(found, len(kept))
    assert list(got) == list(expected)
    assert list(got.values()) == pytest.approx(list(expected.values()), rel=TOLERANCE, abs=0)
    assert kept == min(expected, key=expected.__getitem__)  # the first of equals


def eager(model: MixtralForCausalLM) -> MixtralForCausalLM:
    model.set_experts_implementation("eager")
    return model


# ---- exactness


# On a GPU three of them: layers of 8 experts take its kernels through hundreds of subsets.
@pytest.mark.parametrize(
    ("num_experts", "top_k", "device"),
    [(num_experts, top_k, "cpu") for num_experts in (4, 5, 6, 7, 8) for top_k in (1, 2, 3)]
    + [(4, 1, device) for device in DEVICES[1:]]
    + [(5, 3, device) for device in DEVICES[1:]]
    + [(6, 2, device) for device in DEVICES[1:]],
)
def test_layerwise_equals_float64_brute_force(
    tiny_mixtral: MixtralFactory, device: str, num_experts: int, top_k: int
) -> None:
    shape = {"num_local_experts": num_experts, "num_experts_per_tok": top_k, "num_hidden_layers": 2}
    model, batches = tiny_mixtral(num_experts, **shape).to(device), padded_batches()
    reference = eager(tiny_mixtral(num_experts, **shape))
    inputs = [inputs_of(reference, layer, batches) for layer in range(2)]
    for keep in range(top_k, num_experts + 1):
        result = search(model, batches, keep=keep)
        assert result.is_exact()
        for layer, block in enumerate(reference.model.layers):
            expected = brute_force_losses(block.mlp, inputs[layer], keep)
            assert_equals(result.losses[layer], result.plan.keep[layer], expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("skipping", [False, True])
def test_progressive_equals_float64_brute_force_on_the_pruned_layers_inputs(
    tiny_mixtral: MixtralFactory, device: str, skipping: bool
) -> None:
    batches, skip = padded_batches(), torch.tensor([[0.6], [0.3], [0.8]]) if skipping else None
    result = search(tiny_mixtral().to(device), batches, keep=5, method="progressive", skip=skip)
    reference = eager(tiny_mixtral())
    for layer, block in enumerate(reference.model.layers):
        thresholds = None if skip is None else skip[layer]
        expected = brute_force_losses(block.mlp, inputs_of(reference, layer, batches), 5, thresholds)
        assert_equals(result.losses[layer], result.plan.keep[layer], expected)
        keep = torch.zeros(8, dtype=torch.bool)
        keep[list(result.plan.keep[layer])] = True
        mask_router(block.mlp, keep, thresholds)
    assert result.plan.keep != search(tiny_mixtral().to(device), batches, keep=5, skip=skip).plan.keep


@pytest.mark.parametrize("top_k", [2, 3])
def test_losses_with_skip_thresholds_equal_brute_force(tiny_mixtral: MixtralFactory, top_k: int) -> None:
    model = tiny_mixtral(num_experts_per_tok=top_k, num_hidden_layers=1)
    skip = torch.linspace(0.7, 0.4, top_k - 1)[None]
    for keep in (8, 5):
        result = search(model, padded_batches(), keep=keep, skip=skip)
        reference = eager(tiny_mixtral(num_experts_per_tok=top_k, num_hidden_layers=1))
        inputs = inputs_of(reference, 0, padded_batches())
        expected = brute_force_losses(reference.model.layers[0].mlp, inputs, keep, skip[0])
        assert_equals(result.losses[0], result.plan.keep[0], expected)
    assert result.layer_losses()[0] > search(model, padded_batches(), keep=8, skip=skip).layer_losses()[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("keep", [4, 6])
def test_the_demo_models_subsets_equal_brute_force(keep: int) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL, dtype="float32")
    texts = [text[:400] for text in read_domains([DEMO_MODEL / "calibration"]).values()]
    batches = list(token_batches(texts, tokenizer, window=64, batch_size=4))
    assert any(not bool(batch["attention_mask"].all()) for batch in batches)
    result = search(model, batches, keep=keep)
    reference, _ = load_checkpoint(DEMO_MODEL, dtype="float32")
    reference.set_experts_implementation("eager")
    for layer, block in enumerate(reference.model.layers):
        expected = brute_force_losses(block.mlp, inputs_of(reference, layer, batches), keep)
        assert_equals(result.losses[layer], result.plan.keep[layer], expected)


def test_a_layers_loss_is_what_its_pruned_output_differs_by(tiny_mixtral: MixtralFactory) -> None:
    model, batches = tiny_mixtral(num_hidden_layers=1), [{"input_ids": random_tokens(3, 20)}]
    result = search(model, batches, keep=4)
    outputs = []
    for variant in (eager(tiny_mixtral(num_hidden_layers=1)), moe_ext.prune(model, result.plan)):
        seen: list[Tensor] = []
        variant.model.layers[0].mlp.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        with torch.no_grad():
            variant(**batches[0])
        outputs.append(seen[0])
    assert result.layer_losses() == pytest.approx([float((outputs[0] - outputs[1]).norm())], rel=TOLERANCE)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "minimax", "qwen3_vl_moe_text"])
def test_a_familys_loss_is_what_its_pruned_output_differs_by(family: str) -> None:
    model, batches = families.build(family), [{"input_ids": random_tokens(3, 20)}]
    first = moe_blocks(model)[0]
    result = search(model, batches, keep=first.num_experts - 2, method="greedy")
    outputs = []
    for variant in (families.build(family), moe_ext.prune(model, result.plan)):
        seen: list[Tensor] = []
        block = moe_blocks(variant)[0]  # its inputs are not changed by pruning

        def add(module: nn.Module, args: Any, out: Any, seen: list[Tensor] = seen) -> None:
            seen.append(out[0] if isinstance(out, tuple) else out)

        block.experts.register_forward_hook(add)
        with torch.no_grad():
            variant(**batches[0])
        outputs.append(seen[0])
    assert result.layer_losses()[0] == pytest.approx(float((outputs[0] - outputs[1]).norm()), rel=TOLERANCE)


def test_padding_counts_in_no_loss(tiny_mixtral: MixtralFactory) -> None:
    tokens = random_tokens(1, 9)
    padded = {
        "input_ids": torch.cat([tokens, random_tokens(1, 4, seed=5)], dim=1),
        "attention_mask": torch.tensor([[1] * 9 + [0] * 4]),
    }
    nothing = {"input_ids": random_tokens(1, 3), "attention_mask": torch.zeros(1, 3).long()}
    got = search(tiny_mixtral(), [padded, nothing], keep=6)
    expected = search(tiny_mixtral(), [{"input_ids": tokens}], keep=6)
    for a, b in zip(got.losses, expected.losses, strict=True):
        torch.testing.assert_close(a.losses, b.losses, rtol=TOLERANCE, atol=0)


def test_batches_sum_their_norms(tiny_mixtral: MixtralFactory) -> None:
    batches = [{"input_ids": random_tokens(2, 11, seed=seed)} for seed in (1, 2)]
    both = search(tiny_mixtral(), batches, keep=6)
    alone = [search(tiny_mixtral(), [batch], keep=6) for batch in batches]
    for layer in range(3):
        total = alone[0].losses[layer].losses + alone[1].losses[layer].losses
        torch.testing.assert_close(both.losses[layer].losses, total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_in_16_bits_are_near_those_in_float32(tiny_mixtral: MixtralFactory, dtype: torch.dtype) -> None:
    model = tiny_mixtral(dtype=dtype, num_hidden_layers=1)
    got = search(model, padded_batches(), keep=4).losses[0].losses
    wide = tiny_mixtral(num_hidden_layers=1)
    wide.load_state_dict(model.state_dict())
    # A few tokens route otherwise when their logits are rounded; a loss is a norm over 66 tokens.
    torch.testing.assert_close(got, search(wide, padded_batches(), keep=4).losses[0].losses, rtol=0.05, atol=0)


# ---- ties


def test_equal_losses_drop_the_lexicographically_first_set(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral(num_hidden_layers=1)
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    result = search(model, padded_batches(), keep=5)
    assert set(result.losses[0].losses.tolist()) == {0.0}
    assert result.plan.removed(0) == (0, 1, 2)


def test_of_two_equal_experts_the_first_is_dropped(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral(num_hidden_layers=1)
    block = model.model.layers[0].mlp
    with torch.no_grad():
        for weight in block.parameters():
            weight[6] = weight[3]
    losses = losses_by_subset(search(model, padded_batches(), keep=7).losses[0], 7)
    without_3, without_6 = (tuple(e for e in range(8) if e != dropped) for dropped in (3, 6))
    assert losses[without_3] == pytest.approx(losses[without_6], rel=1e-12)
    keep = torch.ones(2, 8).bool()
    keep[0, 3] = keep[1, 6] = False
    found = LayerLosses(keep, torch.tensor([2.0, 2.0 * (1 - 1e-15)], dtype=torch.float64))
    assert found.best(7)[0] == without_3


@pytest.mark.parametrize("method", ["layerwise", "progressive", "greedy"])
def test_experts_that_no_token_reaches_go_first_and_cost_nothing(tiny_mixtral: MixtralFactory, method: str) -> None:
    model = tiny_mixtral()
    shifted = torch.zeros(8, dtype=torch.bool)
    shifted[[2, 5, 7]] = True
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out: (out[0].masked_fill(shifted, -1e4), *out[1:]))
        for layer in model.model.layers
    ]
    result = search(model, padded_batches(), keep=6, method=method)
    assert result.layer_losses() == [0.0] * 3
    assert [result.plan.removed(layer) for layer in range(3)] == [(2, 5)] * 3
    for hook in hooks:
        hook.remove()


# ---- greedy


@pytest.mark.parametrize(("num_experts", "top_k", "keep"), [(8, 2, 4), (10, 3, 5), (12, 2, 6), (12, 4, 8)])
def test_greedy_with_swaps_comes_near_the_exact_optimum(
    tiny_mixtral: MixtralFactory,
    record_property: Callable[[str, object], None],
    num_experts: int,
    top_k: int,
    keep: int,
) -> None:
    shape = {"num_local_experts": num_experts, "num_experts_per_tok": top_k, "num_hidden_layers": 4}
    model = tiny_mixtral(**shape)
    exact, greedy = (search(model, padded_batches(), keep=keep, method=m) for m in ("layerwise", "greedy"))
    gaps = [b / a - 1 for a, b in zip(exact.layer_losses(), greedy.layer_losses(), strict=True)]
    record_property("greedy_gap", gaps)
    assert all(-1e-12 <= gap <= 0.03 for gap in gaps), gaps
    assert sum(gap < 1e-12 for gap in gaps) >= 2, gaps
    for whole, part in zip(exact.losses, greedy.losses, strict=True):
        known = losses_by_subset(whole, keep)
        for subset, loss in losses_by_subset(part, keep).items():
            assert loss == pytest.approx(known[subset], rel=1e-12)


def test_no_swap_improves_what_greedy_found(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral(num_local_experts=10)
    result = search(model, padded_batches(), keep=5, method="greedy")
    exact = search(model, padded_batches(), keep=5)
    for layer, kept in enumerate(result.plan.keep):
        losses = losses_by_subset(exact.losses[layer], 5)
        for out, other in itertools.product(kept, result.plan.removed(layer)):
            swapped = tuple(sorted({*kept, other} - {out}))
            assert losses[swapped] >= losses[kept] * (1 - 1e-11)


def test_a_layer_with_too_many_subsets_is_searched_greedily_and_says_so(tiny_mixtral: MixtralFactory) -> None:
    exact = search(tiny_mixtral(), padded_batches(), keep=6, max_subsets=28)
    greedy = search(tiny_mixtral(), padded_batches(), keep=6, max_subsets=27)
    assert exact.is_exact()
    assert exact.plan.made_by["exact"] == [True] * 3
    assert not greedy.is_exact()
    assert greedy.plan.made_by["exact"] == [False] * 3
    assert greedy.plan.keep == search(tiny_mixtral(), padded_batches(), keep=6, method="greedy").plan.keep


@pytest.mark.parametrize("method", ["layerwise", "greedy"])
def test_what_does_not_fit_into_memory_changes_nothing(
    tiny_mixtral: MixtralFactory, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    expected = search(tiny_mixtral(), padded_batches(), keep=4, method=method)
    monkeypatch.setattr(layer_walk, "MEMORY", 4000)  # one batch's hidden states
    monkeypatch.setattr(layer_losses, "MEMORY", 5000)
    monkeypatch.setattr(expert_outputs, "GRAM_BYTES", 0)  # 16 tokens at a time
    got = search(tiny_mixtral(), padded_batches(), keep=4, method=method)
    assert got.plan.keep == expected.plan.keep
    for a, b in zip(got.losses, expected.losses, strict=True):
        assert torch.equal(a.keep, b.keep)
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-12, atol=0)


# ---- budgets


def test_a_list_keeps_its_number_in_every_layer(tiny_mixtral: MixtralFactory) -> None:
    result = search(tiny_mixtral(), padded_batches(), keep=[8, 3, 5])
    assert [len(kept) for kept in result.plan.keep] == [8, 3, 5]
    assert result.layer_losses()[0] == 0.0
    for layer, keep in enumerate([8, 3, 5]):
        assert result.plan.keep[layer] == search(tiny_mixtral(), padded_batches(), keep=keep).plan.keep[layer]


def test_a_ratio_is_the_share_removed(tiny_mixtral: MixtralFactory) -> None:
    result = search(tiny_mixtral(), padded_batches(), ratio=0.3)
    assert result.plan.keep == search(tiny_mixtral(), padded_batches(), keep=6).plan.keep
    assert result.plan.made_by["ratio"] == 0.3


@pytest.mark.parametrize("method", ["layerwise", "greedy"])
def test_a_models_budget_is_shared_out_by_loss(tiny_mixtral: MixtralFactory, method: str) -> None:
    model = tiny_mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(0.05)  # next to nothing is lost there
    result = search(model, padded_batches(), keep=5, budget="model", method=method)
    kept = [len(experts) for experts in result.plan.keep]
    assert sum(kept) == 15
    assert kept[1] == 2
    assert sum(result.layer_losses()) < sum(layer.best(5)[1] for layer in result.losses)
    assert result.losses[0].sizes() == [8, 7, 6, 5, 4, 3, 2]


def test_a_models_budget_goes_by_squared_errors_and_is_the_best_of_all_shares(tiny_mixtral: MixtralFactory) -> None:
    model, batches = tiny_mixtral(num_hidden_layers=2), padded_batches()
    result = search(model, batches, keep=5, budget="model")
    assert result.measure == "squares"
    assert search(model, batches, keep=5).measure == "norms"
    reference = eager(tiny_mixtral(num_hidden_layers=2))
    curves = []
    for layer, block in enumerate(reference.model.layers):
        inputs = [torch.cat(inputs_of(reference, layer, batches))]  # one norm over all tokens is the root of the sum
        squares = [
            {kept: norm**2 for kept, norm in brute_force_losses(block.mlp, inputs, size).items()}
            for size in range(9)
            if size >= 2
        ]
        curves.append([min(of_size.values()) for of_size in squares])
        kept = result.plan.keep[layer]
        assert_equals(result.losses[layer], kept, squares[len(kept) - 2])
    shares = {a: curves[0][a - 2] + curves[1][10 - a - 2] for a in range(2, 9)}
    assert len(result.plan.keep[0]) == min(shares, key=shares.__getitem__)
    assert sum(result.layer_losses()) == pytest.approx(min(shares.values()), rel=TOLERANCE)


# ---- resuming


class Interruption(Exception):  # noqa: N818  no error
    pass


def interrupt_before_layer(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    observe = layer_walk.LayerInputs.observe

    def interrupted(self: Any, block: int, seen: Any) -> None:
        if block == layer:
            raise Interruption
        observe(self, block, seen)

    monkeypatch.setattr(layer_walk.LayerInputs, "observe", interrupted)


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep": 5},
        {"keep": 5, "method": "progressive", "skip": torch.full((3, 1), 0.5)},
        {"keep": 5, "method": "greedy"},
        {"keep": 5, "budget": "model"},
    ],
)
def test_an_interrupted_search_goes_on_to_the_same_result(
    tiny_mixtral: MixtralFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    expected, path = search(tiny_mixtral(), padded_batches(), **arguments), tmp_path / "search.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_before_layer(2, patch)
        with pytest.raises(Interruption):
            search(tiny_mixtral(), padded_batches(), resume=path, **arguments)
    with pytest.raises(SearchFileError, match="the search is not finished"):
        SearchResult.load(path)
    rows: list[int] = []
    gram = ops.expert_gram

    def counting(x: Tensor, *weights: Any) -> Tensor:
        rows.append(len(x))
        return gram(x, *weights)

    monkeypatch.setattr(ops, "expert_gram", counting)
    result = search(tiny_mixtral(), padded_batches(), resume=path, **arguments)
    assert sum(rows) == 66  # one layer's tokens
    again = search(tiny_mixtral(), padded_batches(), resume=path, **arguments)
    assert sum(rows) == 66  # no layer was left
    for found in (result, again, SearchResult.load(path)):
        assert found.plan == expected.plan
        for a, b in zip(found.losses, expected.losses, strict=True):
            assert torch.equal(a.keep, b.keep)
            assert torch.equal(a.losses, b.losses)


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"keep": 6}, "keep"),
        ({"budget": "model"}, "budget, measure"),
        ({"method": "greedy"}, "method"),
        ({"batches": [{"input_ids": random_tokens(1, 5)}]}, "tokens, text"),
        ({"seed": 1}, "model"),
        ({"skip": torch.full((3, 1), 0.5)}, "skip"),
    ],
)
def test_the_file_of_another_search_is_refused(
    tiny_mixtral: MixtralFactory, tmp_path: Path, change: dict[str, Any], differing: str
) -> None:
    path = tmp_path / "search.safetensors"
    search(tiny_mixtral(), padded_batches(), keep=5, resume=path)
    before = path.read_bytes()
    batches, seed = change.pop("batches", padded_batches()), change.pop("seed", 0)
    with pytest.raises(ValueError, match=rf"resume: .* is of another search \({differing} differ\)"):
        search(tiny_mixtral(seed), batches, **{"keep": 5, "resume": path, **change})
    assert path.read_bytes() == before


def test_a_foreign_file_is_refused(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    path = tmp_path / "search.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(SearchFileError, match=r"search\.safetensors: truncated, or not a safetensors file"):
        search(tiny_mixtral(), padded_batches(), keep=5, resume=path)
    moe_ext.calibrate(tiny_mixtral(), padded_batches(), progress=False).save(path)
    with pytest.raises(
        SearchFileError, match=r"not a search's result: its metadata names format 'moe_ext\.expert_stat"
    ):
        search(tiny_mixtral(), padded_batches(), keep=5, resume=path)


# ---- results


def test_a_result_comes_back_from_its_file(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    result = search(tiny_mixtral(), padded_batches(), keep=6, dataset="random")
    result.save(tmp_path / "search.safetensors")
    loaded = SearchResult.load(tmp_path / "search.safetensors")
    assert loaded.plan == result.plan
    assert loaded.layer_losses() == result.layer_losses() == result.plan.made_by["losses"]
    assert loaded.plan.made_by["dataset"] == "random"
    assert loaded.plan.made_by["tokens"] == 66
    result.save(tmp_path / "search.json")
    parsed = json.loads((tmp_path / "search.json").read_text())
    assert moe_ext.PruningPlan.from_json(json.dumps(parsed["plan"])) == result.plan
    for layer, found in zip(parsed["layers"], result.losses, strict=True):
        assert layer["losses"] == found.losses.tolist()
        assert layer["keep"] == [row.nonzero().flatten().tolist() for row in found.keep]
        assert layer["exact"] is True
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.safetensors or \.json"):
        result.save(tmp_path / "search.txt")


def as_version_1(path: Path) -> None:
    """A search's file as it was before losses had a measure."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    asked, plan = json.loads(metadata["search"]), json.loads(metadata["plan"])
    del asked["measure"], plan["made_by"]["measure"]
    changed = {"format_version": "1", "search": json.dumps(asked), "plan": json.dumps(plan)}
    save_file(tensors, path, {**metadata, **changed})


def test_files_of_the_first_version_are_read_and_gone_on_with(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    path = tmp_path / "search.safetensors"
    result = search(tiny_mixtral(), padded_batches(), keep=6, resume=path)
    as_version_1(path)
    loaded = SearchResult.load(path)
    assert loaded.measure == "norms"
    assert loaded.plan.keep == result.plan.keep
    assert loaded.layer_losses() == result.layer_losses()
    assert search(tiny_mixtral(), padded_batches(), keep=6, resume=path).plan == result.plan
    search(tiny_mixtral(), padded_batches(), keep=6, budget="model", resume=tmp_path / "model.safetensors")
    as_version_1(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is of another search \(measure differ\)"):  # whose losses were norms
        search(tiny_mixtral(), padded_batches(), keep=6, budget="model", resume=tmp_path / "model.safetensors")


def test_a_measure_that_is_not_known_is_refused(tiny_mixtral: MixtralFactory) -> None:
    text = search(tiny_mixtral(), padded_batches(), keep=6).to_json().replace('"norms"', '"inches"')
    with pytest.raises(SearchFileError, match="made_by: measure: expected one of norms, squares, nats, got 'inches'"):
        SearchResult.from_json(text)


def test_a_truncated_result_is_refused(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    path = tmp_path / "search.safetensors"
    search(tiny_mixtral(), padded_batches(), keep=6).save(path)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SearchFileError, match=r"search\.safetensors: "):
            SearchResult.load(path)


def test_a_size_that_was_not_evaluated_is_named(tiny_mixtral: MixtralFactory) -> None:
    result = search(tiny_mixtral(), padded_batches(), keep=6)
    with pytest.raises(ValueError, match=r"size: no subset of 5 experts was evaluated; there are \[6\]"):
        result.losses[0].best(5)


# ---- the model, and bad input


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["layerwise", "progressive"])
def test_the_model_is_left_as_it_was(tiny_mixtral: MixtralFactory, patched: bool, training: bool, method: str) -> None:
    model = tiny_mixtral().train(training)
    if patched:
        moe_ext.patch(model)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        before = model(tokens).logits
    search(model, padded_batches(), keep=4, method=method)
    assert model.training == training
    assert is_patched(model) == patched
    assert not any("forward" in vars(module) for layer in model.model.layers for module in (layer, layer.mlp.experts))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)


def test_an_interrupted_search_restores_the_model(
    tiny_mixtral: MixtralFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_mixtral(), random_tokens(2, 9)
    with torch.no_grad():
        before = model(tokens).logits

    def fail(*arguments: object) -> Tensor:
        raise Interruption

    monkeypatch.setattr(ops, "expert_gram", fail)
    with pytest.raises(Interruption):
        search(model, padded_batches(), keep=4, method="progressive")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    assert not is_patched(model)


def test_a_skipping_model_is_refused(tiny_mixtral: MixtralFactory) -> None:
    model = moe_ext.patch(tiny_mixtral(), skip=torch.full((3, 1), 0.5))
    with pytest.raises(ValueError, match=r"the model skips experts; patch\(model, skip=None\) before searching"):
        search(model, padded_batches(), keep=4)


@pytest.mark.parametrize("device", DEVICES)
def test_activations_that_are_not_finite_name_the_layer(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral().to(device)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp gave activations .* not finite"):
        search(model, padded_batches(), keep=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "keep: expected exactly one of keep and ratio, got keep=None and ratio=None"),
        ({"keep": 4, "ratio": 0.5}, "keep: expected exactly one of keep and ratio"),
        ({"keep": 1}, r"keep: 1 keeps 1 of 8 experts; expected 2 to 8 \(top_k to all\)"),
        ({"keep": 9}, "keep: 9 keeps 9 of 8 experts"),
        ({"ratio": 0.9}, "ratio: 0.9 keeps 1 of 8 experts"),
        ({"ratio": 1.0}, r"ratio: expected a share in \[0, 1\), got 1.0"),
        ({"keep": [4, 4]}, "keep: expected one number for each of 3 layers, got 2"),
        ({"keep": [4, 4, 1]}, r"keep: \[4, 4, 1\] keeps 1 of 8 experts"),
        ({"keep": 4, "method": "best"}, "method and budget are 'best' and 'layer'; expected one of"),
        ({"keep": 4, "budget": "total"}, "method and budget are 'layerwise' and 'total'"),
        ({"keep": 4, "budget": "model", "method": "progressive"}, "budget: 'model' shares out by the losses of all"),
        ({"keep": 4, "skip": torch.zeros(2, 1)}, r"skip thresholds have shape \(2, 1\); expected \(3, 1\)"),
        ({"keep": 4, "batches": []}, "no token was counted"),
        ({"keep": 4, "batches": [{"tokens": torch.zeros(1, 3)}]}, "batch 0 is no mapping with 'input_ids'"),
    ],
)
def test_bad_arguments_are_refused(tiny_mixtral: MixtralFactory, arguments: dict[str, Any], message: str) -> None:
    model = tiny_mixtral()
    batches = arguments.pop("batches", padded_batches())
    with pytest.raises(ValueError, match=message):
        search(model, batches, **arguments)
    assert not is_patched(model)
