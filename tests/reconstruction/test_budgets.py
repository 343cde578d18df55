"""How many experts every layer keeps, against exhaustive search."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.reconstruction.budgets import counts_per_layer, share_out

LOSSES = st.floats(0, 100, allow_nan=False).map(lambda loss: round(loss, 3))


@given(data=st.data(), layers=st.integers(1, 4), droppable=st.integers(0, 5), rising=st.booleans())
def test_the_shares_have_the_least_loss_of_all(data: st.DataObject, layers: int, droppable: int, rising: bool) -> None:
    drawn = st.lists(LOSSES, min_size=droppable + 1, max_size=droppable + 1)
    curves = [data.draw(drawn.map(sorted) if rising else drawn) for _ in range(layers)]
    num_experts = droppable + 2
    total = data.draw(st.integers(2 * layers, num_experts * layers))
    counts = share_out(curves, total, num_experts)
    assert sum(counts) == total
    assert all(2 <= count <= num_experts for count in counts)

    def loss_of(kept: tuple[int, ...]) -> float:
        return sum(curve[num_experts - count] for curve, count in zip(curves, kept, strict=True))

    possible = [c for c in itertools.product(range(2, num_experts + 1), repeat=layers) if sum(c) == total]
    assert loss_of(tuple(counts)) == pytest.approx(min(map(loss_of, possible)), abs=1e-9)


def test_equal_losses_drop_in_the_earlier_layer() -> None:
    assert share_out([[0, 1, 2], [0, 1, 2]], 6, 4) == [2, 4]
    assert share_out([[0, 0.1, 0.2, 0.3]] * 3, 7, 4) == [1, 2, 4]  # 0.1 + 0.2 is not 0.3 to the last bit


def test_a_dear_step_between_cheap_ones_is_not_split() -> None:
    # The hull of the first layer is below its points: a greedy choice along it would drop one expert there, for 5.
    assert share_out([[0, 5, 6], [0, 4, 9]], 7, 4) == [4, 3]
    assert share_out([[0, 5, 6], [0, 4, 9]], 6, 4) == [2, 4]


def test_layers_with_many_experts_are_shared_out_exactly_too() -> None:
    curves = [[float(scale * dropped**2) for dropped in range(121)] for scale in (1, 4, 2)]
    counts = share_out(curves, 3 * 128 - 70, 128)
    assert [128 - count for count in counts] == [40, 10, 20]  # where the last steps cost the same


def test_a_step_that_only_pays_with_the_next_one_is_taken() -> None:
    # Dropping two of the second layer costs 3, two of the first 4.
    assert share_out([[0, 2, 4], [0, 2.9, 3]], 6, 4) == [4, 2]


def test_ratios_and_lists_become_counts() -> None:
    assert counts_per_layer(None, 0.25, 3, 8, 2) == [6, 6, 6]
    assert counts_per_layer((8, 2), None, 2, 8, 2) == [8, 2]
    with pytest.raises(ValueError, match=r"keep: \[8, 2\.0\] keeps 2\.0 of 8 experts"):
        counts_per_layer([8, 2.0], None, 2, 8, 2)  # type: ignore[list-item]
