"""How many experts every layer keeps, against exhaustive search."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.reconstruction.budgets import counts_per_layer, hull_slopes, share_out

LOSSES = st.floats(0, 100, allow_nan=False).map(lambda loss: round(loss, 3))


@given(curve=st.lists(LOSSES, min_size=1, max_size=8))
def test_the_hull_is_the_highest_convex_curve_below_the_points(curve: list[float]) -> None:
    slopes = hull_slopes(curve)
    assert len(slopes) == len(curve) - 1
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(slopes))
    hull = list(itertools.accumulate(slopes, initial=curve[0]))
    assert all(height <= value + 1e-9 for height, value in zip(hull, curve, strict=True))
    # Every point of a lower hull is on a line between two of the given points, or is one.
    for point, height in enumerate(hull):
        lines = [
            curve[a] + (curve[b] - curve[a]) * (point - a) / (b - a)
            for a, b in itertools.combinations(range(len(curve)), 2)
            if a <= point <= b
        ]
        assert height == pytest.approx(min([curve[point], *lines]), abs=1e-9)


@given(data=st.data(), layers=st.integers(1, 4), droppable=st.integers(0, 4))
def test_sharing_out_convex_losses_is_optimal(data: st.DataObject, layers: int, droppable: int) -> None:
    # Convex: losses whose differences rise.
    curves = [
        list(
            itertools.accumulate(sorted(data.draw(st.lists(LOSSES, min_size=droppable, max_size=droppable))), initial=0)
        )
        for _ in range(layers)
    ]
    num_experts = droppable + 2
    total = data.draw(st.integers(2 * layers, num_experts * layers))
    counts = share_out(curves, total, num_experts)
    assert sum(counts) == total
    assert all(2 <= count <= num_experts for count in counts)

    def loss_of(kept: tuple[int, ...]) -> float:
        return sum(curve[num_experts - count] for curve, count in zip(curves, kept, strict=True))

    possible = [c for c in itertools.product(range(2, num_experts + 1), repeat=layers) if sum(c) == total]
    assert loss_of(tuple(counts)) == pytest.approx(min(map(loss_of, possible)), abs=1e-9)


def test_equal_marginal_losses_drop_in_the_earlier_layer_first() -> None:
    assert share_out([[0, 1, 2], [0, 1, 2]], 6, 4) == [2, 4]


def test_a_step_that_only_pays_with_the_next_one_is_taken() -> None:
    # Dropping two of the second layer costs 3, two of the first 4: the hull sees beyond the dear first step.
    assert share_out([[0, 2, 4], [0, 2.9, 3]], 6, 4) == [4, 2]


def test_ratios_and_lists_become_counts() -> None:
    assert counts_per_layer(None, 0.25, 3, 8, 2) == [6, 6, 6]
    assert counts_per_layer((8, 2), None, 2, 8, 2) == [8, 2]
    with pytest.raises(ValueError, match=r"keep: \[8, 2\.0\] keeps 2\.0 of 8 experts"):
        counts_per_layer([8, 2.0], None, 2, 8, 2)  # type: ignore[list-item]
