"""HOPE removes the set whose pairs cost least: against brute force over all sets, and in plans."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ext.decision.pair_subsets
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.criteria import Scores, score
from moe_ext.decision.pair_subsets import costs_of, least_pairs
from moe_ext.decision.plan import plan
from moe_ext.models.layout import Layout


def products(experts: int, seed: int = 0, tokens: int = 12, top_k: int = 3) -> torch.Tensor:
    """F as routing gives it: of tokens that choose a few experts each."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(1)[:, : min(top_k, experts)]
    shares = torch.zeros_like(shares).scatter(1, chosen, shares.gather(1, chosen))
    return shares.T @ shares


def cost(pairs: torch.Tensor, gone: tuple[int, ...]) -> float:
    indicator = torch.zeros(len(pairs), dtype=torch.float64)
    indicator[list(gone)] = 1
    return float(indicator @ pairs @ indicator)


def allowed(experts: int, groups: int, removed: int, protected: list[int]) -> list[tuple[int, ...]]:
    size = experts // groups
    return [
        gone
        for gone in combinations(range(experts), removed * groups)
        if all(sum(e // size == group for e in gone) == removed for group in range(groups))
        and not set(gone) & set(protected)
    ]


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, int, int, list[int]]:
    """Experts, groups, experts that a group loses, protected ones."""
    groups = draw(st.integers(1, 3))
    size = draw(st.integers(1, 8 // groups + 1))
    removed = draw(st.integers(0, size))
    protected = []
    for group in range(groups):
        most = size - removed
        protected += draw(st.lists(st.integers(group * size, (group + 1) * size - 1), max_size=most, unique=True))
    return groups * size, groups, removed, protected


@settings(max_examples=60)
@given(shape=layers(), seed=st.integers(0, 1000))
def test_the_set_is_the_cheapest_of_all(shape: tuple[int, int, int, list[int]], seed: int) -> None:
    experts, groups, removed, protected = shape
    pairs, mask = products(experts, seed), torch.zeros(experts, dtype=torch.bool)
    mask[protected] = True
    got = least_pairs(pairs, mask, groups, removed)
    sets = allowed(experts, groups, removed, protected)
    assert got in sets
    least = min(cost(pairs, gone) for gone in sets)
    assert cost(pairs, got) == pytest.approx(least, rel=1e-9, abs=1e-12)
    if removed:
        torch.testing.assert_close(costs_of(pairs, torch.tensor([got])), torch.tensor([cost(pairs, got)]).double())


@settings(max_examples=60)
@given(shape=layers(), seed=st.integers(0, 1000))
def test_the_walk_ends_where_no_swap_helps(shape: tuple[int, int, int, list[int]], seed: int) -> None:
    experts, groups, removed, protected = shape
    pairs, mask = products(experts, seed), torch.zeros(experts, dtype=torch.bool)
    mask[protected] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_ext.decision.pair_subsets, "MOST_SETS", 0)
        got = least_pairs(pairs, mask, groups, removed)
    sets = allowed(experts, groups, removed, protected)
    assert got in sets
    reached = cost(pairs, got)
    for other in sets:
        if len(set(other) & set(got)) >= len(got) - 1:  # one swap away
            assert cost(pairs, other) >= reached * (1 - 1e-9) - 1e-12


def test_pairs_decide_where_single_scores_do_not() -> None:
    # Three experts cost 1 each, the first two of them for the same tokens.
    pairs = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1.1, 0], [0, 0, 0, 9]], dtype=torch.float64)
    nobody = torch.zeros(4, dtype=torch.bool)
    assert least_pairs(pairs, nobody, 1, 2) == (1, 2)  # 2.1 and not 4; of 0 and 1 the last


def test_of_equal_costs_the_last_set_goes() -> None:
    assert least_pairs(torch.zeros(6, 6).double(), torch.zeros(6, dtype=torch.bool), 1, 2) == (4, 5)
    protected = torch.tensor([False, False, False, False, True, False])
    assert least_pairs(torch.zeros(6, 6).double(), protected, 1, 2) == (3, 5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, nobody = products(9, 3), torch.zeros(9, dtype=torch.bool)
    expected = least_pairs(pairs, nobody, 1, 4)
    monkeypatch.setattr(moe_ext.decision.pair_subsets, "_CHUNK", 7)
    assert least_pairs(pairs, nobody, 1, 4) == expected


def test_large_layers_are_walked() -> None:
    pairs = products(256, tokens=600, top_k=8)
    gone = least_pairs(pairs, torch.zeros(256, dtype=torch.bool), 8, 16)
    assert len(gone) == 128
    singly = tuple(
        int(e)
        for group in pairs.diagonal().view(8, 32).argsort(1)[:, :16] + torch.arange(8)[:, None] * 32
        for e in group
    )
    assert cost(pairs, gone) < cost(pairs, singly)


def statistics(pairs: torch.Tensor, groups: int = 1) -> ExpertStatistics:
    names = tuple(f"layers.{i}" for i in range(len(pairs)))
    stats = ExpertStatistics.empty(
        Layout("mixtral", names, (pairs.shape[1],) * len(pairs), 2, groups), "softmax", "prose"
    )
    assert stats.output_pairs is not None
    stats.output_pairs.copy_(pairs)
    return stats


def test_score_and_plan_know_hope() -> None:
    pairs = torch.stack([products(8, 1), products(8, 2)])
    scores = score(statistics(pairs), "hope")
    assert torch.equal(scores.values, pairs.diagonal(dim1=1, dim2=2))
    made = plan(scores, keep=5)
    for layer in range(2):
        assert made.removed(layer) == least_pairs(pairs[layer], torch.zeros(8, dtype=torch.bool), 1, 3)
    assert (made.made_by["criterion"], made.made_by["exact"]) == ("hope", True)
    assert plan(scores, ratio=0.375).keep == made.keep
    for kept in plan(score(statistics(pairs, groups=2), "hope"), keep=4).keep:
        assert sum(expert < 4 for expert in kept) == 2


def test_what_hope_cannot_do_is_refused() -> None:
    stats = statistics(products(8)[None])
    scores = score(stats, "hope")
    with pytest.raises(ValueError, match="scope: 'hope' compares sets within a layer; expected layer, got 'model'"):
        plan(scores, keep=4, scope="model")
    stats.output_pairs = None
    with pytest.raises(ValueError, match="criterion 'hope' needs the products of pairs, which these"):
        score(stats, "hope")
    with pytest.raises(ValueError, match=r"pairs: is torch.float32 of shape \(1, 8, 8\); expected torch.float64"):
        Scores(scores.values, "hope", scores.layout, "", pairs=torch.zeros(1, 8, 8))
    assert scores.pairs is not None
    scores.pairs[0, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layer 'layers.0' has a NaN score for expert 3"):
        plan(scores, keep=4)
