"""expert_gram and subset_errors against float64 brute force."""

import itertools
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_ext import ops
from tests.support.operators import BAD_EXPERTS, RUNNABLE_VARIANTS, assert_gram_equals_brute_force, gram_of
from tests.support.reference import (
    ACTIVATIONS,
    DEVICES,
    DTYPES,
    experts_case,
    route_reference,
)


@st.composite
def layer_shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Half of them as the tensor cores take them."""
    size = st.integers(1, 17).map(lambda eights: 8 * eights) if draw(st.booleans()) else st.integers(1, 70)
    return {
        "tokens": draw(st.sampled_from([0, 1, 2, 5, 16, 17, 33, 70])),
        "num_experts": draw(st.integers(1, 9)),
        "top_k": 1,
        "hidden": draw(size),
        "intermediate": draw(size),
        "seed": draw(st.integers(0, 1000)),
    }


@pytest.mark.parametrize("device", DEVICES)
@given(shape=layer_shapes(), dtype=st.sampled_from(DTYPES), activation=st.sampled_from(ACTIVATIONS))
def test_gram_equals_float64_brute_force(
    device: str, shape: dict[str, Any], dtype: torch.dtype, activation: str
) -> None:
    assert_gram_equals_brute_force(experts_case(**shape, dtype=dtype, activation=activation), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "num_experts", "hidden", "intermediate"), [(3, 5, 1100, 8), (9, 33, 40, 16)])
def test_gram_of_more_columns_and_experts_than_a_tile(
    device: str, dtype: torch.dtype, tokens: int, num_experts: int, hidden: int, intermediate: int
) -> None:
    assert_gram_equals_brute_force(experts_case(tokens, num_experts, 1, hidden, intermediate, dtype=dtype), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_more_tokens_than_a_part_equals_brute_force(device: str, dtype: torch.dtype) -> None:
    assert_gram_equals_brute_force(experts_case(2100, 3, 1, 16, 24, dtype=dtype), device)  # parts have 2048 at most


@pytest.mark.parametrize("variant", RUNNABLE_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_every_cpu_variant_equals_brute_force(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EXT_ISA", variant)
    assert_gram_equals_brute_force(experts_case(19, 5, 1, 75, 43, dtype=dtype), "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_experts_have_equal_products(device: str, dtype: torch.dtype) -> None:
    case = experts_case(21, 3, 1, 72, 40, dtype=dtype)
    case.gate_up[2], case.down[2] = case.gate_up[0], case.down[0]
    gram = gram_of(case.to(device))
    assert torch.equal(gram[:, 0, 0], gram[:, 2, 2])
    assert torch.equal(gram[:, 0, 0], gram[:, 0, 2])
    assert torch.equal(gram[:, 0, 1], gram[:, 2, 1])


def test_gram_has_the_same_bits_for_any_number_of_threads() -> None:
    case = experts_case(150, 6, 1, 160, 96, dtype=torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gram_of(case))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [6, 24])
def test_nan_reaches_the_gram_of_its_own_token_only(device: str, tokens: int) -> None:
    case = experts_case(tokens, 3, 1, 40, 24)
    expected = gram_of(case.to(device))
    case.x[4, 7] = torch.nan
    got = gram_of(case.to(device))
    clean = [row for row in range(tokens) if row != 4]
    assert torch.equal(got[clean], expected[clean])
    assert bool(got[4].isnan().all())


@pytest.mark.parametrize("device", DEVICES)
def test_gram_takes_strided_activations(device: str) -> None:
    case = experts_case(9, 4, 1, 32, 24).to(device)
    assert torch.equal(gram_of(replace(case, x=case.x.T.contiguous().T)), gram_of(case))


LAYER_ARGUMENTS = {"x", "gate_up", "down", "activation"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("change", "message"), [bad for bad in BAD_EXPERTS if set(bad[0]) <= LAYER_ARGUMENTS])
def test_gram_refuses_bad_input(device: str, change: dict[str, Any], message: str) -> None:
    case = replace(experts_case(5, 4, 2, 16, 24), **change).to(device)
    with pytest.raises(RuntimeError, match="expert_gram: " + message):
        gram_of(case)


def test_gram_refuses_an_input_that_requires_gradients() -> None:
    case = experts_case(3, 2, 1, 8, 8)
    case.down.requires_grad_()
    with pytest.raises(RuntimeError, match="expert_gram: an input requires gradients"):
        gram_of(case)
    with torch.no_grad():
        gram_of(case)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck_of_gram(device: str, dtype: torch.dtype, check: str) -> None:
    case = experts_case(5, 4, 2, 16, 24, dtype=dtype).to(device)
    arguments = (case.x, case.gate_up, case.down, "silu")
    torch.library.opcheck(torch.ops.moe_ext.expert_gram, arguments, test_utils=check)


@pytest.mark.parametrize("device", DEVICES)
def test_gram_can_compile_without_graph_breaks(device: str) -> None:
    case = experts_case(6, 4, 2, 16, 24).to(device)

    def layer(x: Tensor) -> Tensor:
        return ops.expert_gram(x, case.gate_up, case.down, "silu")

    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(case.x)
    assert torch.equal(got.cpu(), layer(case.x).cpu())


# ---- subset_errors


def random_ranking(
    tokens: int, num_experts: int, depth: int, seed: int = 0
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Expert outputs (T, E, 5), logits (T, E), and the operator's distances, ranks and scores of them."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(tokens, num_experts, 5, dtype=torch.float64, generator=generator)
    logits = torch.randn(tokens, num_experts, dtype=torch.float64, generator=generator)
    ranks = logits.argsort(dim=1, descending=True)[:, :depth]
    ranked = outputs.gather(1, ranks.unsqueeze(2).expand(-1, -1, 5))  # (T, N, 5)
    pairs = list(itertools.combinations(range(depth), 2))
    distances = torch.zeros(tokens, len(pairs), dtype=torch.float64)
    for index, (i, j) in enumerate(pairs):
        distances[:, index] = (ranked[:, i] - ranked[:, j]).square().sum(-1)
    return outputs, logits, (distances, ranks, logits.gather(1, ranks).exp())


def brute_force_error(
    outputs: Tensor, logits: Tensor, keep: Tensor, top_k: int, thresholds: Tensor | None = None
) -> float:
    """Routes twice, in plain Python, and combines the outputs."""
    masked = logits.masked_fill(~keep, -torch.inf)
    total = torch.zeros((), dtype=torch.float64)
    results = []
    for routed, skips in ((logits, None), (masked, thresholds)):
        weights, experts = route_reference(routed, top_k, skips, renormalise=True)
        dense = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.float64)
        dense.scatter_(1, torch.tensor(experts), torch.tensor(weights, dtype=torch.float64))
        results.append((dense[:, :-1, None] * outputs).sum(1))  # (T, 5)
    total = (results[0] - results[1]).square().sum()
    return float(total)


@given(
    num_experts=st.integers(1, 8),
    data=st.data(),
    tokens=st.sampled_from([0, 1, 7, 30]),
    skipping=st.booleans(),
    seed=st.integers(0, 999),
)
def test_subset_errors_equal_brute_force(
    num_experts: int, data: st.DataObject, tokens: int, skipping: bool, seed: int
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    dropped = data.draw(st.integers(0, num_experts - top_k))
    depth = data.draw(st.integers(top_k + dropped, num_experts))
    outputs, logits, ranking = random_ranking(tokens, num_experts, depth, seed)
    keep = torch.ones(0, num_experts, dtype=torch.bool)
    for drop in itertools.combinations(range(num_experts), dropped):
        row = torch.ones(1, num_experts, dtype=torch.bool)
        row[0, list(drop)] = False
        keep = torch.cat([keep, row])
    thresholds = torch.linspace(0.2, 0.9, top_k - 1) if skipping else None
    got = ops.subset_errors(*ranking, keep, top_k, thresholds)
    expected = [brute_force_error(outputs, logits, subset, top_k, thresholds) for subset in keep]
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-24 * max(tokens, 1)
    )


def test_subset_errors_compile_without_graph_breaks() -> None:
    generator = torch.Generator().manual_seed(0)
    distances, scores = (torch.rand(5, n, dtype=torch.float64, generator=generator) for n in (6, 4))
    ranks = torch.stack([torch.randperm(4, generator=generator) for _ in range(5)])
    keep = torch.tensor([[True, True, True, False], [False, True, True, True]])

    def errors(distances: torch.Tensor) -> torch.Tensor:
        return ops.subset_errors(distances, ranks, scores, keep, 2) * 2

    got = torch.compile(errors, fullgraph=True, backend="aot_eager")(distances)
    assert torch.equal(got, errors(distances))
    assert bool((got > 0).all())


def test_subset_errors_have_the_same_bits_for_any_number_of_threads_and_other_subsets() -> None:
    _, _, ranking = random_ranking(3000, 9, 9)
    # So many that what a token can come to use is worked out first; of three, it is not.
    drops = [drop for dropped in range(5) for drop in itertools.combinations(range(9), dropped)]
    keep = torch.ones(len(drops), 9, dtype=torch.bool)
    for row, drop in zip(keep, drops, strict=True):
        row[list(drop)] = False
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.subset_errors(*ranking, keep, 3)
        torch.set_num_threads(4)
        assert torch.equal(ops.subset_errors(*ranking, keep, 3), expected)
        assert torch.equal(ops.subset_errors(*ranking, keep[50:53], 3), expected[50:53])
    finally:
        torch.set_num_threads(threads)


def test_a_subset_that_changes_no_weight_has_no_error() -> None:
    _, logits, ranking = random_ranking(20, 5, 5)
    unused = int(logits.mean(0).argmin())
    chosen = logits.clone()
    chosen[:, unused] = -50.0
    order = chosen.argsort(dim=1, descending=True)
    keep = torch.ones(1, 5, dtype=torch.bool)
    keep[0, unused] = False
    assert ops.subset_errors(ranking[0], order, chosen.gather(1, order).exp(), keep, 2).tolist() == [0.0]


def test_equal_experts_can_replace_each_other_without_error() -> None:
    _, _, (distances, ranks, scores) = random_ranking(20, 4, 4)
    keep = torch.tensor([[True, False, False, True]])
    assert ops.subset_errors(torch.zeros_like(distances), ranks, scores, keep, 2).tolist() == [0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": torch.zeros(3)}, r"'ranks' has shape \(3,\); expected 2 dimensions \(T, N\)"),
        ({"ranks": torch.zeros(3, 4)}, "'ranks' has dtype float32; expected int64"),
        ({"ranks": torch.full((3, 4), 5)}, "'ranks' holds 5 at token 0, rank 0; expected 0 to 4"),
        ({"ranks": torch.full((3, 4), -1)}, "'ranks' holds -1 at token 0, rank 0"),
        ({"distances": torch.zeros(3, 5).double()}, r"'distances' has shape \(3, 5\); expected \(3, 6\)"),
        ({"distances": torch.zeros(3, 6)}, "'distances' has dtype float32; expected float64"),
        ({"scores": torch.zeros(3, 5).double()}, r"'scores' has shape \(3, 5\); expected \(3, 4\)"),
        ({"scores": torch.zeros(3, 4)}, "'scores' has dtype float32; expected float64"),
        ({"keep": torch.ones(5).bool()}, r"'keep' has shape \(5,\); expected 2 dimensions \(S, E\)"),
        ({"keep": torch.ones(2, 5)}, "'keep' has dtype float32; expected bool"),
        ({"keep": torch.tensor([[True] * 5, [True, True, False, False, False]])}, "'keep' drops 3 experts in subset 1"),
        ({"keep": torch.ones(2, 3).bool()}, "'ranks' has N = 4 ranks a token; expected at most 3"),
        ({"top_k": 0}, "'top_k' is 0; expected 1 to 4"),
        ({"top_k": 5}, "'top_k' is 5; expected 1 to 4"),
        ({"thresholds": torch.zeros(2)}, r"'thresholds' has shape \(2,\); expected \(1,\) = \(top_k - 1,\)"),
        ({"thresholds": torch.zeros(1).double()}, "'thresholds' has dtype float64; expected float32"),
    ],
)
def test_subset_errors_refuses_bad_input(change: dict[str, Any], message: str) -> None:
    _, _, (distances, ranks, scores) = random_ranking(3, 5, 4)
    arguments: dict[str, Any] = {
        "distances": distances,
        "ranks": ranks,
        "scores": scores,
        "keep": torch.ones(2, 5, dtype=torch.bool),
        "top_k": 2,
    }
    arguments |= change
    with pytest.raises(RuntimeError, match="subset_errors: " + message):
        ops.subset_errors(**arguments)
    if "holds" in message or "drops" in message:
        return  # values, of which a fake kernel knows nothing
    meta: dict[str, Any] = {
        name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    with pytest.raises(RuntimeError, match="subset_errors: " + message):
        ops.subset_errors(**meta)


@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck_of_subset_errors(check: str) -> None:
    _, _, ranking = random_ranking(6, 5, 4)
    keep = torch.tensor([[True] * 5, [True, False, True, False, True]])
    for thresholds in (None, torch.tensor([0.5])):
        arguments = (*ranking, keep, 2, thresholds)
        torch.library.opcheck(torch.ops.moe_ext.subset_errors, arguments, test_utils=check)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_subset_errors_takes_no_none_for_distances(device: str) -> None:  # found by tests/fuzz/operators.py
    ranks, keep = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.ones(1, 1, dtype=torch.bool, device=device)
    scores, none = torch.ones(1, 1, dtype=torch.float64, device=device), cast(Tensor, None)
    with pytest.raises(TypeError, match="subset_errors: 'distances' is of type NoneType; expected Tensor"):
        ops.subset_errors(none, ranks, scores, keep, 1)
