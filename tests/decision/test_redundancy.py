"""Coactivation overlap and lift, on a hand-made case and by counting tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.redundancy import ExpertPair, overlap, redundant_pairs


def observed(tokens: list[tuple[int, ...]], experts: int, top_k: int = 2) -> ExpertStatistics:
    """Statistics of one layer that routed every token to the given experts."""
    stats = ExpertStatistics.zeros("mixtral", ("layers.0",), experts, top_k, "g")
    for chosen in tokens:
        stats.tokens[0] += 1
        for one in chosen:
            for other in chosen:
                stats.coactivation[0, one, other] += 1
    return stats


def test_pairs_by_hand() -> None:
    # 6 tokens; experts 0 and 1 share 3 of the 4 that either sees, 2 and 3 both of theirs, 0 and 4 one of four.
    stats = observed([(0, 1), (0, 1), (1, 0), (2, 3), (3, 2), (0, 4)], experts=5)
    assert redundant_pairs(stats, most=2) == [
        ExpertPair("layers.0", 2, 3, together=2, overlap=1.0, lift=2 * 6 / (2 * 2)),
        ExpertPair("layers.0", 0, 1, together=3, overlap=3 / 4, lift=3 * 6 / (4 * 3)),
    ]
    assert len(redundant_pairs(stats, most=100)) == 3  # the rest share no token


@given(data=st.data())
def test_overlap_is_the_share_of_tokens_that_both_saw(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 6))
    token = st.sets(st.integers(0, experts - 1), min_size=2, max_size=2).map(lambda chosen: tuple(sorted(chosen)))
    tokens = data.draw(st.lists(token, max_size=8))
    got = overlap(observed(tokens, experts))[0]
    for one in range(experts):
        for other in range(experts):
            both = sum(one in chosen and other in chosen for chosen in tokens)
            either = sum(one in chosen or other in chosen for chosen in tokens)
            assert got[one, other].item() == (both / either if one != other and either else 0.0)
    assert torch.equal(got, got.T)


@pytest.mark.parametrize(
    ("top_k", "most", "message"),
    [(2, 0, "most: expected 1 or more pairs, got 0"), (1, 1, "coactivation needs at least 2 experts a token")],
)
def test_reports_that_cannot_be_made_are_refused(top_k: int, most: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        redundant_pairs(observed([], 3, top_k), most)
