"""Rank agreement is scipy's Spearman correlation, averaged over the layers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from moe_ext.decision.agreement import rank_agreement
from moe_ext.decision.criteria import Scores
from tests.support.scores import scored


@given(data=st.data())
def test_agreement_is_the_mean_of_scipys_spearman_correlations(data: st.DataObject) -> None:
    experts, layers = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 4), min_size=experts, max_size=experts).filter(lambda row: len(set(row)) > 1)
    one, other = (data.draw(st.lists(row, min_size=layers, max_size=layers)) for _ in range(2))
    got = rank_agreement([scored(one), scored(other)])
    expected = sum(spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)) / layers
    assert got[0, 1].item() == pytest.approx(expected, abs=1e-12)  # a dozen float64 operations on numbers up to 7
    assert got[0, 1] == got[1, 0]
    assert got[0, 0].item() == pytest.approx(1)


def test_a_layer_without_an_order_is_left_out() -> None:
    got = rank_agreement([scored([[1, 2, 3], [5, 5, 5]]), scored([[3, 2, 1], [1, 2, 3]])])
    assert got[0, 1].item() == pytest.approx(-1)


def test_no_layer_with_an_order_has_no_agreement() -> None:
    assert math.isnan(rank_agreement([scored([[5, 5]]), scored([[1, 2]])])[0, 1].item())


def test_scores_beyond_a_layers_experts_do_not_count() -> None:
    counts = (3, 2)
    got = rank_agreement(
        [scored([[1, 2, 3], [1, 2, 0]], experts=counts), scored([[1, 2, 3], [1, 2, 9]], experts=counts)]
    )
    assert got[0, 1].item() == pytest.approx(1)


@pytest.mark.parametrize("scores", [[], [scored([[1, 2]]), scored([[1, 2, 3]])]])
def test_scores_that_do_not_compare_are_refused(scores: list[Scores]) -> None:
    with pytest.raises(ValueError, match=r"scores: (expected one or more|the criteria are for different layers)"):
        rank_agreement(scores)
