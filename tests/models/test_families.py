"""Every family of ``moe_ext.models.families.FAMILIES``: patch, calibrate, prune, save and reload, skip.

The references are transformers' own eager model, float64 brute force over what its experts were given, and rules
written out in hooks. The table of docs/support.md rests on these tests, one a column.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

import moe_ext
from moe_ext.calibration.statistics import RATIO_BINS
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.families import FAMILIES
from moe_ext.runtime.patching import is_patched, layer_state
from tests.support.batches import random_tokens
from tests.support.families import (
    ALL,
    FIELDS,
    MODELS,
    STOCK_ONLY,
    build,
    experts_case_of,
    keep_of,
    logits_of,
    mask_routers,
    on_devices,
    on_experts,
    plan_for,
    reloaded,
)
from tests.support.reference import expert_output

pytestmark = pytest.mark.filterwarnings("ignore:.*left on transformers:UserWarning")


def patched(model: Any, name: str, **options: Any) -> Any:
    return moe_ext.patch(model, strict=name not in STOCK_ONLY, **options)


def batches() -> list[dict[str, Tensor]]:
    """One batch with padding on the right, one without."""
    ragged = {"input_ids": random_tokens(2, 11, seed=1), "attention_mask": torch.ones(2, 11, dtype=torch.int64)}
    ragged["attention_mask"][1, 6:] = 0
    return [ragged, {"input_ids": random_tokens(2, 9, seed=2)}]


def test_every_family_with_a_record_is_tested_here() -> None:
    assert set(FIELDS) == set(FAMILIES)


@pytest.mark.parametrize(("name", "device"), on_devices(ALL))
def test_patched_logits_equal_unpatched(name: str, device: str) -> None:
    model = build(name).to(device)
    model.set_experts_implementation("eager")
    tokens = random_tokens(2, 13)
    expected = logits_of(model, tokens)
    got = logits_of(patched(model, name), tokens)
    # The stock path rounds after every step of every layer: some 8 roundings a layer, up to 4 layers.
    torch.testing.assert_close(got, expected, rtol=0, atol=32 * 2.0**-22 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [*((*case, torch.bfloat16) for case in on_devices(ALL)), *((*case, torch.float16) for case in on_devices(MODELS))],
)
def test_patched_layers_equal_unpatched_in_half_precision(name: str, dtype: torch.dtype, device: str) -> None:
    """Layer by layer on the same inputs: between layers a rounding can change which experts are chosen. The stock
    layers run on the CPU: the simulated GPU lacks the float16 softmax of some of their routers."""
    model = build(name, dtype=dtype)
    model.set_experts_implementation("eager")
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).to(dtype)

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            found = [block.module(x.to(model.device)) for block in moe_blocks(model)]
        return [(out[0] if isinstance(out, tuple) else out).cpu() for out in found]

    expected = outputs()
    patched(model.to(device), name)
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for got, want in zip(outputs(), expected, strict=True):
        # Weights, h, f_e, products and the running sum of K of them are each rounded to the dtype by the stock path.
        torch.testing.assert_close(got, want, rtol=0, atol=12 * rounding * float(want.abs().max()))


@pytest.mark.parametrize("name", ALL)
def test_unpatch_restores_the_model_to_the_bit(name: str) -> None:
    model = build(name)
    implementation = model.get_experts_implementation()
    tokens = random_tokens(2, 9)
    expected, config = logits_of(model, tokens), model.config.to_dict()
    attributes = [set(vars(module)) for module in model.modules()]
    blocks = moe_blocks(model)
    moe_ext.unpatch(patched(model, name, skip=torch.full((len(blocks), blocks[0].top_k - 1), 0.7)))
    assert torch.equal(logits_of(model, tokens), expected)
    assert model.config.to_dict() == config
    assert model.get_experts_implementation() == implementation
    assert [set(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize("name", ALL)
def test_a_patched_and_skipping_block_compiles_without_graph_breaks(name: str) -> None:
    model = build(name)
    blocks = moe_blocks(model)
    patched(model, name, skip=torch.full((len(blocks), blocks[0].top_k - 1), 0.5))
    block = moe_blocks(model)[0].module
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        # The same operators in the same order; only torch's own decompositions may round otherwise.
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)


# ---- calibrate


def brute_force(model: Any) -> list[dict[str, Tensor]]:
    """Statistics of every layer, slot by slot, from what the stock eager model's experts are given."""
    blocks = moe_blocks(model)
    found: list[dict[str, Tensor]] = [
        {
            "moments": torch.zeros(block.num_experts, 3, 3, dtype=torch.float64),
            "output_sum": torch.zeros(block.num_experts, 32, dtype=torch.float64),
            "ratio_histogram": torch.zeros(block.top_k - 1, RATIO_BINS, dtype=torch.int64),
            "coactivation": torch.zeros(block.num_experts, block.num_experts, dtype=torch.int64),
            "output_pairs": torch.zeros(block.num_experts, block.num_experts, dtype=torch.float64),
        }
        for block in blocks
    ]
    counted: list[int] = []

    def watch(layer: int, module: Any, args: tuple[Tensor, ...]) -> None:
        x, experts, weights = (argument.cpu() for argument in args)
        sums = found[layer]
        for token, counts in enumerate(counted):
            if not counts:
                continue
            ranked = sorted(weights[token].tolist(), reverse=True)
            for rank, weight in enumerate(ranked[1:]):
                sums["ratio_histogram"][rank, min(int(weight / ranked[0] * RATIO_BINS), RATIO_BINS - 1)] += 1
            shares = torch.zeros(len(sums["moments"]), dtype=torch.float64)
            case = experts_case_of(module, x, experts, weights)
            for slot, expert in enumerate(experts[token].tolist()):
                out = expert_output(case, expert, token)
                gate, norm = float(weights[token, slot]), float(out.norm())
                sums["output_sum"][expert] += out
                shares[expert] = gate * norm
                for a in range(3):
                    for b in range(3):
                        sums["moments"][expert, a, b] += gate**a * norm**b
                for other in experts[token].tolist():
                    sums["coactivation"][expert, other] += 1
            sums["output_pairs"] += shares.outer(shares)

    model.set_experts_implementation("eager")
    on_experts(model, watch)
    for batch in batches():
        counted[:] = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().tolist()
        with torch.no_grad():
            model(**batch)
    return found


@pytest.mark.parametrize(("name", "device"), on_devices(MODELS))
def test_calibrate_equals_float64_brute_force(name: str, device: str) -> None:
    model = build(name).to(device)
    stats = moe_ext.calibrate(model, batches(), progress=False, outputs=True, strict=name not in STOCK_ONLY)
    assert not is_patched(model)
    for layer, expected in enumerate(brute_force(build(name))):
        # float32 through up to 4 layers, summed in another order than the eager model's.
        torch.testing.assert_close(stats.moments[layer], expected["moments"], rtol=1e-4, atol=1e-6)
        assert stats.output_pairs is not None
        torch.testing.assert_close(stats.output_pairs[layer], expected["output_pairs"], rtol=1e-4, atol=1e-6)
        scale = float(expected["output_sum"].abs().max())
        assert stats.output_sum is not None
        torch.testing.assert_close(stats.output_sum[layer], expected["output_sum"], rtol=1e-4, atol=1e-5 * scale)
        assert torch.equal(stats.coactivation[layer], expected["coactivation"])
        moved = stats.ratio_histogram[layer].cumsum(-1) - expected["ratio_histogram"].cumsum(-1)
        assert int(moved.abs().max()) <= 1  # a ratio at the edge of a bin
        assert not bool(moved[..., -1].any())
    assert stats.tokens.tolist() == [11 + 6 + 18] * stats.num_layers


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("mixtral", "softmax over the selected logits"),
        ("qwen2_moe", "softmax over all logits"),
        ("deepseek_v2", "softmax scores, as the family's router gives them"),
        ("deepseek_v3", "sigmoid scores, renormalised, as the family's router gives them"),
        ("phimoe", "weights as the family's router gives them"),
    ],
)
def test_statistics_say_what_the_routing_weight_is(name: str, gate: str) -> None:
    assert moe_ext.calibrate(build(name), batches(), progress=False).gate == gate


# ---- prune


@pytest.mark.parametrize(("name", "device"), on_devices(ALL))
def test_a_pruned_model_equals_the_stock_model_with_a_masked_router(name: str, device: str) -> None:
    pruned, masked = build(name).to(device), build(name).to(device)
    keep = keep_of(pruned, name)
    moe_ext.prune(pruned, plan_for(pruned, keep))
    mask_routers(masked, keep)
    tokens = random_tokens(2, 13)
    expected = logits_of(masked, tokens)
    assert not torch.allclose(expected, logits_of(build(name).to(device), tokens), atol=0.05)  # pruning matters here
    torch.testing.assert_close(logits_of(pruned, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_stock_transformers_reloads_a_pruned_model_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(name, dtype=dtype)
    moe_ext.prune(model, plan_for(model, keep_of(model, name)))
    model.save_pretrained(tmp_path)
    loaded = reloaded(type(model).from_pretrained, tmp_path, dtype=dtype)
    tokens = random_tokens(2, 13)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    # What a pruned model says about itself is what a loaded one does.
    for got, expected in zip(model.modules(), loaded.modules(), strict=True):
        for field in ("num_experts", "out_features"):
            assert getattr(got, field, None) == getattr(expected, field, None), type(got)


@pytest.mark.parametrize("name", ALL)
def test_a_pruned_model_is_calibrated_and_pruned_again(name: str) -> None:
    model = build(name)
    moe_ext.prune(patched(model, name), plan_for(model, keep_of(model, name)))
    stats = moe_ext.calibrate(model, batches(), progress=False)
    assert stats.num_experts == moe_blocks(model)[0].num_experts
    fewest = max(block.fewest_experts for block in moe_blocks(model))
    moe_ext.prune(model, moe_ext.plan(moe_ext.score(stats, "man"), keep=fewest))
    assert {block.num_experts for block in moe_blocks(model)} == {fewest}
    assert bool(logits_of(model, random_tokens(1, 5)).isfinite().all())


# ---- skip


def skip_by_the_rule(model: Any, thresholds: Tensor) -> list[int]:
    """The rule, token by token, on what the stock experts are given. A skipped slot gets weight 0 and keeps an expert
    that exists: gpt-oss' eager code knows no sentinel. Returns a list that will hold the number of skipped slots."""
    skipped = [0]

    def rule(layer: int, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, experts, weights = args
        weak = torch.zeros_like(weights, dtype=torch.bool)
        for token, row in enumerate(weights.tolist()):
            order = sorted(range(len(row)), key=lambda slot: -row[slot])
            for rank, slot in enumerate(order[1:]):
                weak[token, slot] = row[slot] < float(thresholds[layer, rank]) * row[order[0]]
        skipped[0] += int(weak.sum())
        kept = torch.where(weak, 0.0, weights)
        return x, experts, kept * (weights.sum(-1) / kept.sum(-1))[:, None]

    model.set_experts_implementation("eager")
    on_experts(model, rule)
    return skipped


@pytest.mark.parametrize(("name", "device"), on_devices(ALL))
def test_skipping_equals_the_rule_on_the_stock_model(name: str, device: str) -> None:
    model, stock = build(name).to(device), build(name).to(device)
    stats = moe_ext.calibrate(model, batches(), progress=False, strict=name not in STOCK_ONLY)
    thresholds = moe_ext.skip_thresholds(stats, 0.4)
    skipped = skip_by_the_rule(stock, thresholds)
    tokens = random_tokens(2, 13)
    patched(model, name, skip=thresholds)
    with moe_ext.count_skips(model) as count:
        got = logits_of(model, tokens)
    torch.testing.assert_close(got, logits_of(stock, tokens), rtol=1e-4, atol=1e-4)
    assert sum(count.skipped) == skipped[0]
    assert 0.1 < count.rate() < 0.5


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "jamba", "ernie4_5_moe"])
def test_gradients_of_a_skipping_model_equal_the_rule_on_the_stock_model(name: str) -> None:
    model, stock = build(name), build(name)
    blocks = moe_blocks(model)
    thresholds = torch.full((len(blocks), blocks[0].top_k - 1), 0.6)
    skip_by_the_rule(stock, thresholds)
    patched(model, name, skip=thresholds)
    tokens = random_tokens(2, 7)
    for one in (model, stock):
        one(tokens, labels=tokens).loss.backward()
    for (parameter, expected), (_, got) in zip(stock.named_parameters(), model.named_parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None), parameter
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=parameter)


# ---- what the operators cannot run


def test_experts_that_the_operators_cannot_run_are_refused() -> None:
    model = build("mixtral", hidden_act="relu")
    message = r"model\.layers\.0\.mlp: MixtralExperts: its gating function \(activation ReLU\).*With strict=False such"
    with pytest.raises(ValueError, match=message):
        moe_ext.patch(model)
    with pytest.raises(ValueError, match=message):
        moe_ext.calibrate(model, batches(), progress=False)
    assert not is_patched(model)


def test_what_is_left_on_transformers_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moe_ext.patch(build("mixtral", hidden_act="relu"), strict=False)
    said = [str(warning.message) for warning in caught if "left on transformers" in str(warning.message)]
    assert len(said) == 1
    assert said[0].endswith("(and 2 more such layers): left on transformers' 'grouped_mm' experts")


@pytest.mark.parametrize("skip", [None, torch.full((3, 1), 0.5)], ids=["all", "skipping"])
def test_what_is_left_on_transformers_keeps_its_implementation(skip: Tensor | None) -> None:
    model = moe_ext.patch(build("mixtral", hidden_act="relu"), skip=skip, strict=False)
    assert {layer_state(block).fallback for block in moe_blocks(model)} == {"grouped_mm"}


def test_a_router_that_takes_keywords_is_given_them() -> None:
    model = build("flex_olmo")
    router = model.model.layers[0].mlp.gate
    router.__class__ = type(
        "Scaled",
        (type(router),),
        {"forward": lambda self, x, *, factor: super(type(self), self).forward(x * factor)},
    )
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = router(x, factor=0.5)
    moe_ext.patch(model)
    for got, want in zip(router(x, factor=0.5), expected, strict=True):
        assert torch.equal(got, want)


def test_layers_that_the_operators_can_run_do_not_follow_one_that_they_cannot() -> None:
    model = build("mixtral")
    model.model.layers[1].mlp.experts.is_transposed = True
    moe_ext.patch(model, strict=False)
    assert [layer_state(block).stock for block in moe_blocks(model)] == [False, True, False]


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_a_correction_bias_that_orders_experts_differently_leaves_ranks_to_the_weights(name: str) -> None:
    model = build(name)
    unsorted = []
    on_experts(model, lambda layer, module, args: unsorted.append(bool((args[2].diff(dim=-1) > 0).any())))
    logits_of(model, random_tokens(2, 13))
    assert any(unsorted)  # what the tests above rely on


# ---- a different number of experts in every layer


def config_of(folder: Path) -> dict[str, Any]:
    """A saved config without the dtypes, which loading adds to the parts of a multimodal one."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        part.pop("dtype", None)
    return config


@pytest.mark.parametrize("name", ALL)
def test_layers_with_different_numbers_of_experts_reload_to_the_bit(name: str, tmp_path: Path) -> None:
    model = build(name)
    keep = keep_of(model, name, fewer=2 if moe_blocks(model)[0].groups == 2 else 1)
    assert len({len(kept) for kept in keep}) == 2
    masked = build(name)
    mask_routers(masked, keep)
    moe_ext.prune(model, plan_for(model, keep))
    tokens = random_tokens(2, 13)
    expected = logits_of(model, tokens)
    torch.testing.assert_close(expected, logits_of(masked, tokens), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = reloaded(moe_ext.from_pretrained, tmp_path, auto_class=type(model))
    assert torch.equal(logits_of(loaded, tokens), expected)
    assert [block.num_experts for block in moe_blocks(loaded)] == [len(kept) for kept in keep]
    assert getattr(loaded, "num_experts", None) == getattr(model, "num_experts", None)  # the head's copy
    # One config for all layers, so that transformers' switches reach them; patch relies on it.
    assert len({id(block.experts.config) for block in moe_blocks(loaded)}) == 1
    torch.testing.assert_close(logits_of(patched(loaded, name), tokens), expected, rtol=1e-4, atol=1e-4)
    moe_ext.unpatch(loaded).save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_stock_transformers_refuses_layers_with_different_numbers_of_experts(name: str, tmp_path: Path) -> None:
    model = build(name)
    keep = keep_of(model, name, fewer=2 if moe_blocks(model)[0].groups == 2 else 1)
    moe_ext.prune(model, plan_for(model, keep)).save_pretrained(tmp_path)
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError, match="is a per-layer attribute and may vary"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_model_with_uneven_layers_is_calibrated_skips_and_generates(name: str, tmp_path: Path) -> None:
    model = build(name)
    keep = keep_of(model, name, fewer=2 if moe_blocks(model)[0].groups == 2 else 1)
    moe_ext.prune(patched(model, name), plan_for(model, keep))
    stats = moe_ext.calibrate(model, batches(), progress=False, outputs=True)
    assert stats.experts == tuple(len(kept) for kept in keep)
    assert stats.output_sum is not None
    for sums, kept in zip(stats.output_sum, keep, strict=True):
        assert bool(sums[: len(kept)].any())
        assert not bool(sums[len(kept) :].any())
    stats.save(tmp_path / "stats.safetensors")
    thresholds = moe_ext.skip_thresholds(moe_ext.ExpertStatistics.load(tmp_path / "stats.safetensors"), 0.4)
    patched(model, name, skip=thresholds)
    with moe_ext.count_skips(model) as count:
        logits_of(model, random_tokens(2, 13))
    assert 0.1 < count.rate() < 0.6
    tokens = random_tokens(1, 4)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert model.generate(tokens, **options).shape == (1, 9)
    with pytest.raises(ValueError, match="plan from statistics of the unpruned model"):
        moe_ext.plan(moe_ext.score(stats, "man"), keep=moe_blocks(model)[0].fewest_experts)


def test_making_uneven_layers_even_again_leaves_no_trace_in_the_config() -> None:
    model = build("mixtral")
    model.config.per_layer_config = {1: {"rms_norm_eps": 1e-3}}  # someone else's override stays
    keep = ((0, 1, 2), (0, 1, 2, 3), (0, 1, 2))
    moe_ext.prune(model, plan_for(model, keep))
    assert model.config.to_dict()["per_layer_config"] == {
        "0": {"num_local_experts": 3},
        "1": {"rms_norm_eps": 1e-3},
        "2": {"num_local_experts": 3},
    }
    once = build("mixtral")
    moe_ext.prune(once, plan_for(once, ((0, 1, 2),) * 3))
    assert "per_layer_config" not in once.config.to_dict()


# ---- router side effects and bad input


def test_correction_biases_follow_their_experts() -> None:
    for name, path in (("deepseek_v3", "e_score_correction_bias"), ("ernie4_5_moe", "moe_statics")):
        model, before = build(name), build(name)
        keep = keep_of(model, name)
        moe_ext.prune(model, plan_for(model, keep))
        for block, old, kept in zip(moe_blocks(model), moe_blocks(before), keep, strict=True):
            (key,) = (key for key in block.router.state_dict() if key.startswith(path))
            got, expected = block.router.state_dict()[key], old.router.state_dict()[key][..., list(kept)]
            assert torch.equal(got, expected)
            assert key in dict(
                block.router.named_buffers() if name == "deepseek_v3" else block.router.named_parameters()
            )


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v2", "ernie4_5_moe"])
def test_shared_experts_and_dense_layers_are_left_alone(name: str) -> None:
    model = build(name)
    routed = {
        f"{block.name}.{part}.{key}"
        for block in moe_blocks(model)
        for part, module in block.module.named_children()
        if module in (block.router, block.experts)
        for key in module.state_dict()
    }
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in model.state_dict().items()}
    moe_ext.prune(model, plan_for(model, keep_of(model, name)))
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key in after.keys() - routed:
        assert after[key].data_ptr() == before[key][0]
        assert torch.equal(after[key], before[key][1])
    assert any("shared" in key for key in after.keys() - routed)


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        (
            "deepseek_v3",
            (0, 1, 2, 3, 6, 7, 8),
            r"layers\.1\.mlp: the plan keeps \[4, 3\] experts of 2 groups \(config f",
        ),
        ("deepseek_v3", (0, 1, 6, 7), r"keeps 4 experts; the family's router needs 6 \(3 in each of 2 groups\)"),
        ("glm4_moe", (0, 1, 2, 3), r"keeps \[4, 0\] experts of 2 groups \(config field n_group\)"),
    ],
)
def test_a_plan_that_the_router_cannot_follow_changes_nothing(name: str, keep: tuple[int, ...], message: str) -> None:
    model = build(name)
    plan = plan_for(model, (keep,) * len(moe_blocks(model)))
    before = {key: id(parameter) for key, parameter in model.named_parameters()}
    config = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        moe_ext.prune(model, plan)
    assert {key: id(parameter) for key, parameter in model.named_parameters()} == before
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("name", "changes", "fewest"),
    [
        ("mixtral", {}, 2),
        ("deepseek_v2", {"topk_group": 1}, 6),  # all 3 from one of 2 groups
        ("deepseek_v2", {"topk_group": 2}, 4),  # 3 from both, 2 each
        ("deepseek_v2", {"topk_method": "greedy"}, 3),
        ("deepseek_v3", {"n_group": 4, "topk_group": 3}, 8),  # one from each of three, but groups are ranked by two
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}, 3),
    ],
)
def test_a_model_runs_with_the_fewest_experts_that_its_router_needs(
    name: str, changes: dict[str, Any], fewest: int
) -> None:
    model = build(name, **changes)
    assert {block.fewest_experts for block in moe_blocks(model)} == {fewest}
    chosen: list[Tensor] = []
    stats = moe_ext.calibrate(model, batches(), progress=False)
    assert (stats.fewest, stats.groups) == (fewest, moe_blocks(model)[0].groups)
    with pytest.raises(ValueError, match=f"expected {fewest} to"):
        moe_ext.plan(moe_ext.score(stats, "man"), keep=fewest - 1)
    moe_ext.prune(model, moe_ext.plan(moe_ext.score(stats, "man"), keep=fewest))
    on_experts(model, lambda layer, module, args: chosen.append(args[1]))
    assert bool(logits_of(model, random_tokens(1, 9)).isfinite().all())
    assert all(len(set(token)) == len(token) for slots in chosen for token in slots.tolist())


def test_experts_with_a_gating_function_of_their_own_are_refused() -> None:
    model = build("flex_olmo")
    experts = model.model.layers[1].mlp.experts
    experts.__class__ = type("Clamped", (type(experts),), {"_apply_gate": lambda self, gate_up: gate_up})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp: Clamped: its gating function .* no formula that"):
        moe_ext.patch(model)


def test_experts_that_have_not_the_weights_they_say_are_refused() -> None:
    model = build("flex_olmo")
    model.model.layers[1].mlp.experts.has_gate = False
    with pytest.raises(ValueError, match=r"layers\.1\.mlp: .* parameters .*; expected plain .*'up_proj'"):
        moe_ext.patch(model)


def test_one_expert_of_jamba_which_stock_transformers_builds_without_a_router_is_refused() -> None:
    model = build("jamba", num_experts_per_tok=1)
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward: the plan keeps 1 experts; the .* router needs 2"):
        moe_ext.prune(model, plan_for(model, ((0,), (0,))))


@pytest.mark.parametrize("name", ["mixtral", "flex_olmo"])
def test_a_config_without_the_field_is_named(name: str) -> None:
    model = build(name)
    plan = plan_for(model, keep_of(model, name))
    stored = "num_local_experts" if name == "mixtral" else "num_experts"
    del vars(model.config)[stored]
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp\.experts: no field of the '.*' config is found to hold its 8 exp"
    ):
        moe_ext.prune(model, plan)
    assert moe_blocks(model)[0].num_experts == 8


def test_a_count_that_the_config_holds_twice_is_updated_twice() -> None:
    model = build("phimoe")
    model.config.num_experts = 8  # no alias in this family
    model.config.moe_num_experts = 3  # something else
    moe_ext.prune(model, plan_for(model, keep_of(model, "phimoe")))
    stored = {name: getattr(model.config, name) for name in ("num_local_experts", "num_experts", "moe_num_experts")}
    assert stored == {"num_local_experts": 5, "num_experts": 5, "moe_num_experts": 3}


def test_what_counts_no_experts_in_a_router_is_left_alone() -> None:
    model = build("flex_olmo")
    router = model.model.layers[0].mlp.gate
    router.down = torch.nn.Linear(32, 6)
    router.scale = torch.nn.Parameter(torch.ones(32))
    moe_ext.prune(model, plan_for(model, keep_of(model, "flex_olmo")))
    assert router.down.weight.shape == (6, 32)
    assert router.scale.shape == (32,)


def test_a_plan_of_another_family_is_refused() -> None:
    model, other = build("olmoe"), build("qwen3_moe")
    with pytest.raises(ValueError, match="the plan is for model type 'qwen3_moe'; this model is 'olmoe'"):
        moe_ext.prune(model, plan_for(other, keep_of(other, "qwen3_moe")))


def test_greedy_deepseek_v2_has_no_groups() -> None:
    model = build("deepseek_v2", topk_method="greedy")
    assert moe_blocks(model)[0].groups == 1
    moe_ext.prune(model, plan_for(model, ((0, 1, 2, 3, 6),) * 2))
    assert logits_of(model, random_tokens(1, 5)).isfinite().all()


def test_a_router_that_cannot_be_told_is_refused() -> None:
    model = build("flex_olmo")
    del model.model.layers[0].mlp.gate.top_k
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: FlexOlmoSparseMoeBlock has 0 modules beside its experts"):
        moe_blocks(model)


def test_as_many_experts_as_the_hidden_size_are_no_riddle() -> None:
    model = build("flex_olmo", num_experts=32)
    before = model.model.layers[0].mlp.gate.weight.clone()
    moe_ext.prune(model, plan_for(model, ((0, 1, 2),) * 3))
    assert torch.equal(model.model.layers[0].mlp.gate.weight, before[:3])


def test_several_kinds_of_moe_blocks_in_a_family_are_all_found() -> None:
    model = build("flex_olmo")
    block = model.model.layers[1].mlp
    block.__class__ = type("AnotherBlock", (type(block),), {})
    assert [type(each.module).__name__ for each in moe_blocks(model)][1] == "AnotherBlock"


def test_the_text_model_of_qwen3_vl_moe_alone(tmp_path: Path) -> None:
    text = build("qwen3_vl_moe_text").model.language_model
    tokens = random_tokens(2, 9)

    def states(model: Any) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(tokens).last_hidden_state
        return out

    expected = states(text)
    torch.testing.assert_close(states(moe_ext.patch(text)), expected, rtol=1e-4, atol=1e-4)
    stats = moe_ext.calibrate(text, batches(), progress=False)
    moe_ext.unpatch(moe_ext.prune(text, moe_ext.plan(moe_ext.score(stats, "man"), keep=5)))
    text.save_pretrained(tmp_path)
    assert torch.equal(states(reloaded(type(text).from_pretrained, tmp_path)), states(text))
