"""search(loss="fisher") against its definition: float64 autograd, and the layer run once a subset."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_ext
from moe_ext import SearchResult, ops
from moe_ext.models.blocks import moe_blocks
from moe_ext.reconstruction import expert_outputs
from moe_ext.reconstruction import losses as layer_losses
from moe_ext.reconstruction.result import SearchFileError
from moe_ext.runtime import backward_walk
from moe_ext.runtime.backward_walk import OutputGradients
from moe_ext.runtime.head_gradients import Labels
from tests.reconstruction.test_search import eager, layer_output, losses_by_subset
from tests.runtime.test_backward_walk import autograd, counted_in, next_tokens
from tests.support import families
from tests.support.batches import padded_batches, random_tokens
from tests.support.mixtral import MixtralFactory
from tests.support.reference import DEVICES

Batches = list[dict[str, Tensor]]

# Gradients of a float32 model err by some 1e-6 of the largest in a layer, which a small loss's root takes over.
TOLERANCE = 2e-4


def search(model: Any, batches: Batches, **arguments: Any) -> SearchResult:
    return moe_ext.search(model, batches, loss="fisher", progress=False, **arguments)


def assert_same(got: SearchResult, expected: SearchResult) -> None:
    assert got.plan == expected.plan
    for ours, theirs in zip(got.losses, expected.losses, strict=True):
        assert torch.equal(ours.keep, theirs.keep)
        assert torch.equal(ours.losses, theirs.losses)


# ---- the losses


def brute_force_losses(
    block: nn.Module, inputs: Tensor, gradients: Tensor, size: int, thresholds: Tensor | None = None
) -> dict[tuple[int, ...], float]:
    """Half the mean over tokens of <g_t, F_R(x_t) - F(x_t)>^2, the float64 layer run once a subset."""
    experts = int(block.experts.num_experts)  # type: ignore[union-attr, arg-type]
    losses = {}
    with torch.no_grad():
        full = layer_output(block, inputs, torch.ones(experts, dtype=torch.bool))
        for dropped in itertools.combinations(range(experts), experts - size):
            keep = torch.ones(experts, dtype=torch.bool)
            keep[list(dropped)] = False
            change = layer_output(block, inputs, keep, thresholds) - full
            losses[tuple(keep.nonzero().flatten().tolist())] = float((change * gradients).sum(1).square().mean() / 2)
    return losses


def inputs_and_gradients(model: Any, batches: Batches) -> list[tuple[Tensor, Tensor]]:
    """For every layer x and g (T, H) float64 of all tokens that are no padding, for the labels of the text."""
    per_batch = []
    for batch, counted in zip(batches, counted_in(batches), strict=True):
        mask = torch.ones(batch["input_ids"].numel(), dtype=torch.bool) if counted is None else counted
        found = autograd(model, batch, *next_tokens(batch))
        per_batch.append([(x.flatten(0, -2)[mask].double(), g.flatten(0, -2)[mask].double()) for x, g in found])
    return [tuple(map(torch.cat, zip(*of_layer, strict=True))) for of_layer in zip(*per_batch, strict=True)]  # type: ignore[misc]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("skipping", [False, True])
def test_losses_equal_their_definition(tiny_mixtral: MixtralFactory, device: str, top_k: int, skipping: bool) -> None:
    shape = {"num_local_experts": 6, "num_experts_per_tok": top_k, "num_hidden_layers": 2}
    skip = torch.full((2, top_k - 1), 0.6) if skipping else None
    batches = padded_batches()
    result = search(tiny_mixtral(**shape).to(device), batches, keep=4, labels="text", skip=skip)
    assert result.is_exact()
    reference = eager(tiny_mixtral(**shape))
    for layer, (x, gradients) in enumerate(inputs_and_gradients(reference, batches)):
        assert len(x) == result.plan.made_by["tokens"] == 66
        block = eager(tiny_mixtral(**shape)).double().model.layers[layer].mlp
        for size in range(top_k, 7):
            expected = brute_force_losses(block, x, gradients, size, None if skip is None else skip[layer])
            got = losses_by_subset(result.losses[layer], size)
            scale = max(expected.values())
            assert list(got) == list(expected)
            assert list(got.values()) == pytest.approx(list(expected.values()), rel=TOLERANCE, abs=TOLERANCE * scale)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "minimax"])
def test_a_familys_loss_is_what_its_pruned_outputs_projections_differ_by(family: str) -> None:
    model, batches = families.build(family), [{"input_ids": random_tokens(3, 20)}]
    keep = moe_blocks(model)[0].num_experts - 2
    result = search(model, batches, keep=keep, budget="layer", method="greedy")
    seen: list[Tensor] = []
    with OutputGradients(model, moe_blocks(model), batches, [None], Labels()) as walk:
        walk.observe(0, lambda batch, x, logits, gradient: seen.append(gradient))
    outputs = []
    for variant in (families.build(family), moe_ext.prune(model, result.plan)):
        found: list[Tensor] = []
        # The first layer's inputs are not changed by pruning.
        moe_blocks(variant)[0].experts.register_forward_hook(lambda module, args, out, found=found: found.append(out))
        with torch.no_grad():
            variant(**batches[0])
        outputs.append(found[0].reshape(-1, found[0].shape[-1]))
    expected = float(((outputs[0] - outputs[1]) * seen[0]).double().sum(1).square().mean() / 2)
    assert result.layer_losses()[0] == pytest.approx(expected, rel=1e-3)
    assert expected > 0


def test_the_loss_predicts_the_divergence_of_a_slightly_changed_model(tiny_mixtral: MixtralFactory) -> None:
    """In nats: where experts are nearly alike, dropping some moves the predictions by what the loss says."""
    model = tiny_mixtral(num_hidden_layers=2, num_local_experts=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                noise = torch.randn(weight.shape, generator=generator) * float(weight.std())
                weight.copy_(weight[:1] + 0.05 * noise)
    batches = [{"input_ids": random_tokens(16, 40, seed=seed)} for seed in range(4)]
    result = search(model, batches, keep=2, budget="layer", labels="kl")
    with torch.no_grad():
        before = torch.cat([model(**batch).logits for batch in batches]).log_softmax(-1)
        pruned = moe_ext.prune(model, result.plan)
        after = torch.cat([pruned(**batch).logits for batch in batches]).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0 < divergence < 0.02
    assert result.predicted() == pytest.approx(divergence, rel=0.3)


def test_padding_counts_in_no_loss(tiny_mixtral: MixtralFactory) -> None:
    tokens = random_tokens(1, 9)
    padded = {
        "input_ids": torch.cat([tokens, random_tokens(1, 4, seed=5)], dim=1),
        "attention_mask": torch.tensor([[1] * 9 + [0] * 4]),
    }
    nothing = {"input_ids": random_tokens(1, 3), "attention_mask": torch.zeros(1, 3).long()}
    got = search(tiny_mixtral(), [padded, nothing], keep=6, labels="text")
    expected = search(tiny_mixtral(), [{"input_ids": tokens}], keep=6, labels="text")
    for a, b in zip(got.losses, expected.losses, strict=True):
        torch.testing.assert_close(a.losses, b.losses, rtol=TOLERANCE, atol=TOLERANCE * float(b.losses.max()))


def test_the_last_token_of_a_packed_text_has_no_label_in_the_next(tiny_mixtral: MixtralFactory) -> None:
    first, second = random_tokens(1, 6, seed=1), random_tokens(1, 9, seed=2)
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    packed = {"input_ids": torch.cat([first, second], 1), "position_ids": positions}
    got = search(tiny_mixtral(), [packed], keep=6, labels="text")
    expected = search(tiny_mixtral(), [{"input_ids": first}, {"input_ids": second}], keep=6, labels="text")
    for one, other in zip(got.losses, expected.losses, strict=True):
        assert torch.equal(one.keep, other.keep)
        torch.testing.assert_close(one.losses, other.losses, rtol=TOLERANCE, atol=TOLERANCE * float(other.losses.max()))


def test_experts_that_no_token_reaches_go_first_and_cost_nothing(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    shifted = torch.zeros(8, dtype=torch.bool)
    shifted[[2, 5]] = True
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out: (out[0].masked_fill(shifted, -100.0), *out[1:]))
        for layer in model.model.layers
    ]
    result = search(model, padded_batches(), keep=6)
    assert result.predicted() == 0.0
    assert [result.plan.removed(layer) for layer in range(3)] == [(2, 5)] * 3
    for hook in hooks:
        hook.remove()


# ---- the budget


def test_the_budget_is_the_models_and_the_best_of_all_shares(tiny_mixtral: MixtralFactory) -> None:
    result = search(tiny_mixtral(), padded_batches(), keep=5)
    assert result.measure == "nats"
    shares = [c for c in itertools.product(range(2, 9), repeat=3) if sum(c) == 15]
    best = min(shares, key=result.predicted)
    assert result.predicted() == pytest.approx(result.predicted(best), rel=1e-12)
    assert result.plan.made_by["predicted"]["model"] == result.predicted()
    assert result.plan.made_by["predicted"]["layer"] == result.predicted([5, 5, 5]) > result.predicted()
    assert (result.plan.made_by["loss"], result.plan.made_by["labels"], result.plan.made_by["seed"]) == (
        "fisher", "model", 0,
    )  # fmt: skip


def test_equal_counts_say_what_they_cost_beside_a_shared_budget(tiny_mixtral: MixtralFactory) -> None:
    equal = search(tiny_mixtral(), padded_batches(), keep=5, budget="layer")
    shared = search(tiny_mixtral(), padded_batches(), keep=5)
    assert [len(kept) for kept in equal.plan.keep] == [5, 5, 5]
    assert equal.plan.made_by["predicted"] == shared.plan.made_by["predicted"]
    assert equal.predicted() == equal.plan.made_by["predicted"]["layer"]
    given = search(tiny_mixtral(), padded_batches(), keep=[8, 3, 4])
    assert given.plan.keep == shared.plan.keep
    assert given.plan.made_by["predicted"]["layer"] == shared.predicted([8, 3, 4])


def test_equal_counts_search_one_size_alone_where_the_others_are_many(tiny_mixtral: MixtralFactory) -> None:
    shared = search(tiny_mixtral(), padded_batches(), keep=5, method="greedy")
    equal = search(tiny_mixtral(), padded_batches(), keep=5, method="greedy", budget="layer")
    assert list(shared.plan.made_by["predicted"]) == ["layer", "model"]
    assert equal.plan.made_by["predicted"] == {"layer": equal.predicted()}
    assert [layer.sizes() for layer in equal.losses] == [[7, 6, 5]] * 3  # what the walk passes


def test_norms_do_not_add_up(tiny_mixtral: MixtralFactory) -> None:
    result = moe_ext.search(tiny_mixtral(), padded_batches(), keep=6, progress=False)
    with pytest.raises(ValueError, match="norms of different layers do not add up"):
        result.predicted()
    squares = moe_ext.search(tiny_mixtral(), padded_batches(), keep=6, budget="model", progress=False)
    assert squares.predicted() == squares.plan.made_by["predicted"]["model"] <= squares.predicted([6, 6, 6])
    with pytest.raises(ValueError, match="counts: expected one number for each of 3 layers, got 2"):
        squares.predicted([6, 6])


# ---- ways to the same result


def test_greedy_comes_near_the_exact_optimum(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral(num_local_experts=10)
    exact, greedy = (search(model, padded_batches(), keep=5, budget="layer", max_subsets=most) for most in (50_000, 10))
    assert exact.is_exact()
    assert not greedy.is_exact()
    for whole, part in zip(exact.losses, greedy.losses, strict=True):
        for size in part.sizes():
            known = losses_by_subset(whole, size)
            for subset, loss in losses_by_subset(part, size).items():
                assert loss == pytest.approx(known[subset], rel=1e-9, abs=1e-18)
    assert exact.predicted() * (1 - 1e-12) <= greedy.predicted() <= 1.2 * exact.predicted()


def test_what_does_not_fit_into_memory_changes_nothing(
    tiny_mixtral: MixtralFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search(tiny_mixtral(), padded_batches(), keep=4, method="greedy")
    monkeypatch.setattr(layer_losses, "MEMORY", 3000)
    monkeypatch.setattr(expert_outputs, "GRAM_BYTES", 0)  # 16 tokens at a time
    monkeypatch.setattr("moe_ext.reconstruction.search.MEMORY", 4000)
    got = search(tiny_mixtral(), padded_batches(), keep=4, method="greedy")
    assert got.plan.keep == expected.plan.keep
    for a, b in zip(got.losses, expected.losses, strict=True):
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scratch", [False, True])
def test_a_folder_gives_what_the_loaded_model_gives(
    tiny_mixtral: MixtralFactory, tmp_path: Path, tied: bool, scratch: bool
) -> None:
    source = tmp_path / "source"
    tiny_mixtral(dtype=torch.bfloat16, tie_word_embeddings=tied).save_pretrained(source, max_shard_size=20_000)
    model = moe_ext.from_pretrained(source)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    expected = search(model, padded_batches(), keep=5)
    (tmp_path / "scratch").mkdir()
    options = {"scratch": tmp_path / "scratch"} if scratch else {}
    assert_same(search(source, padded_batches(), keep=5, **options), expected)
    assert list((tmp_path / "scratch").iterdir()) == []


class Interruption(Exception):  # noqa: N818  no error
    pass


@pytest.mark.parametrize("folder", [False, True])
def test_an_interrupted_search_goes_on_to_the_same_result(
    tiny_mixtral: MixtralFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    model: Any = tiny_mixtral()
    if folder:
        model.save_pretrained(tmp_path / "source")
        model = tmp_path / "source"
    path, observe = tmp_path / "search.safetensors", OutputGradients.observe
    expected = search(model, padded_batches(), keep=5)

    def interrupted(self: Any, block: int, seen: Any) -> None:
        if block == 1:
            raise Interruption
        observe(self, block, seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputGradients, "observe", interrupted)
        with pytest.raises(Interruption):
            search(model, padded_batches(), keep=5, resume=path)
    with pytest.raises(SearchFileError, match="the search is not finished"):
        SearchResult.load(path)
    rows: list[int] = []
    projection = ops.expert_projection

    def counting(x: Tensor, *others: Any) -> Tensor:
        rows.append(len(x))
        return projection(x, *others)

    monkeypatch.setattr(ops, "expert_projection", counting)
    assert_same(search(model, padded_batches(), keep=5, resume=path), expected)
    assert sum(rows) == 2 * 66  # two layers' tokens
    monkeypatch.setattr(backward_walk, "run_base", None)  # nothing is left to run
    assert_same(search(model, padded_batches(), keep=5, resume=path), expected)
    assert_same(SearchResult.load(path), expected)


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"seed": 1}, "seed"),
        ({"labels": "kl"}, "labels"),
        ({"budget": "layer"}, "budget"),
        ({"loss": "reconstruction"}, "loss, budget, measure"),
    ],
)
def test_the_file_of_another_search_is_refused(
    tiny_mixtral: MixtralFactory, tmp_path: Path, change: dict[str, Any], differing: str
) -> None:
    path = tmp_path / "search.safetensors"
    search(tiny_mixtral(), padded_batches(), keep=5, resume=path)
    arguments = {"keep": 5, "resume": path, "loss": "fisher", "progress": False, **change}
    with pytest.raises(ValueError, match=rf"is of another search \({differing} differ\)"):
        moe_ext.search(tiny_mixtral(), padded_batches(), **arguments)


def test_a_result_comes_back_from_its_files(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    result = search(tiny_mixtral(), padded_batches(), keep=6, labels="kl", seed=7)
    for name in ("search.json", "search.safetensors"):
        result.save(tmp_path / name)
        loaded = SearchResult.load(tmp_path / name)
        assert_same(loaded, result)
        assert (loaded.measure, loaded.predicted()) == ("nats", result.predicted())
        made_by = loaded.plan.made_by
        assert (made_by["loss"], made_by["labels"], made_by["seed"]) == ("fisher", "kl", 7)


# ---- the model, and bad input


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_is_left_as_it_was(tiny_mixtral: MixtralFactory, patched: bool) -> None:
    model = tiny_mixtral().train(not patched)
    if patched:
        moe_ext.patch(model)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        before = model(tokens).logits
    search(model, padded_batches(), keep=4)
    assert model.training == (not patched)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)


def test_gradients_that_are_not_finite_name_the_layer(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer model\.layers\.2\.mlp gave activations, router logits or gradients"):
        search(model, padded_batches(), keep=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "hessian"}, "loss: expected one of reconstruction, fisher, got 'hessian'"),
        ({"loss": "fisher", "labels": "teacher"}, "labels: expected one of model, text, kl, got 'teacher'"),
        ({"loss": "fisher", "seed": -1}, r"seed: expected an integer from 0 to 2\^63 - 1, got -1"),
        ({"labels": "text"}, "labels: goes with loss='fisher', got 'text' with loss='reconstruction'"),
        ({"seed": 0}, "seed: goes with loss='fisher', got 0"),
        ({"loss": "fisher", "method": "progressive"}, "method: 'progressive' judges layers on what pruned layers give"),
        ({"loss": "fisher", "batches": []}, "no token was counted"),
    ],
)
def test_bad_arguments_are_refused(tiny_mixtral: MixtralFactory, arguments: dict[str, Any], message: str) -> None:
    batches = arguments.pop("batches", padded_batches())
    with pytest.raises(ValueError, match=message):
        moe_ext.search(tiny_mixtral(), batches, keep=4, progress=False, **arguments)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="loss: 'fisher' is of predicted tokens"):
        search(families.build("mixtral").model, padded_batches(), keep=6)


def test_hidden_states_without_room_are_refused_before_anything_runs(
    tiny_mixtral: MixtralFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_mixtral().save_pretrained(tmp_path / "source")
    with pytest.raises(FileNotFoundError, match="scratch: the folder"):
        search(tmp_path / "source", padded_batches(), keep=6, scratch=tmp_path / "none")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(MemoryError, match="give a scratch folder, or less text"):
        search(tmp_path / "source", padded_batches(), keep=6)
