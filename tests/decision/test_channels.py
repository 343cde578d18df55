"""Which channels are kept, against brute force over the definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_ext.calibration.channels import channel_errors
from moe_ext.calibration.removal_order import damped, removal_order
from moe_ext.decision.channels import kept_by_score
from moe_ext.pruning.refit import refitted_down
from moe_ext.runtime.formulas import ExpertsLayer, Formula


def random_expert(tokens: int, channels: int, hidden: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weighted activations g h (T, I) with channels that are much alike, and a down projection (H, I)."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, max(1, channels // 2), generator=generator, dtype=torch.float64)
    mixed = causes @ torch.randn(causes.shape[1], channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    return mixed + 0.3 * noise, torch.randn(hidden, channels, generator=generator, dtype=torch.float64)


def squared_error(h: Tensor, down: Tensor, kept: Tensor, fitted: Tensor) -> float:
    return float((h @ down.T - h[:, kept] @ fitted.T).square().sum())


def test_a_channels_error_is_what_the_output_loses_with_it() -> None:
    h, down = random_expert(20, 6, 5)
    errors = channel_errors(h.square().sum(0)[None], ExpertsLayer(Formula(), torch.zeros(1, 12, 3), down[None]))
    for channel in range(6):
        others = torch.arange(6) != channel
        assert float(errors[0, channel]) == pytest.approx(squared_error(h, down, others, down[:, others]))


def test_the_highest_scores_are_kept_and_of_equal_ones_the_lower_channel() -> None:
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert kept_by_score(scores, 2).tolist() == [[0, 2], [0, 1]]
    assert kept_by_score(scores, 4).tolist() == [[0, 1, 2, 3]] * 2
    with pytest.raises(ValueError, match="keep: expected 1 to 4 channels, got 5"):
        kept_by_score(scores, 5)
    scores[1, 2] = float("nan")
    with pytest.raises(ValueError, match="expert 1 has a NaN score"):
        kept_by_score(scores, 2)


@given(blocks=st.integers(1, 6), size=st.integers(1, 5), experts=st.integers(1, 3), seed=st.integers(0, 1000))
def test_blocks_with_the_highest_sums_are_kept_whole(blocks: int, size: int, experts: int, seed: int) -> None:
    scores = torch.randint(0, 4, (experts, blocks * size), generator=torch.Generator().manual_seed(seed)).double()
    for keep in range(1, blocks + 1):
        for row, kept in zip(scores.tolist(), kept_by_score(scores, keep * size, size).tolist(), strict=True):
            sums = [sum(row[size * block : size * (block + 1)]) for block in range(blocks)]
            best = sorted(index for _, index in sorted((-total, index) for index, total in enumerate(sums))[:keep])
            assert kept == [block * size + place for block in best for place in range(size)]


@pytest.mark.parametrize(("keep", "block"), [(4, 3), (3, 2), (4, 0), (4, -2), (6, 4)])
def test_blocks_that_do_not_divide_are_refused(keep: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"block: expected a divisor of {keep} and 8 channels, got {block}"):
        kept_by_score(torch.ones(2, 8), keep, block)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("channels", [1, 7, 12])
def test_obs_removes_one_by_one_what_a_ridge_fit_misses_least(channels: int, seed: int) -> None:
    h, down = random_expert(30, channels, 4, seed)
    gram = damped(h.T @ h, 0.01)
    # A ridge fit is least squares on tokens of which each channel alone has some, too.
    tokens = torch.linalg.cholesky(gram).T
    kept, gone = list(range(channels)), list[int]()
    while kept:

        def without(channel: int) -> float:
            left = [other for other in kept if other != channel]
            fitted = torch.linalg.lstsq(tokens[:, left], tokens @ down.T).solution
            return float((tokens @ down.T - tokens[:, left] @ fitted).square().sum())

        gone.append(min(kept, key=without))
        kept.remove(gone[-1])
    assert removal_order(h.T @ h, down).tolist() == gone


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_refit_is_least_squares(dtype: torch.dtype) -> None:
    h, down = random_expert(40, 8, 5)
    down = down.to(dtype)
    kept = torch.tensor([0, 2, 3, 6])
    expected = torch.linalg.lstsq(h[:, kept], h @ down.T.double()).solution.T
    got = refitted_down(h.T @ h, down, kept, damping=0.0)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=1e-9 if dtype == torch.float64 else 1e-2, atol=1e-2)
    damped_fit = refitted_down(h.T @ h, down.double(), kept)
    plain = down.double()[:, kept]
    errors = [squared_error(h, down.double(), kept, fit) for fit in (expected, damped_fit, plain)]
    assert errors[0] <= errors[1] < errors[2]


def test_a_refit_of_all_channels_changes_nothing() -> None:
    h, down = random_expert(40, 8, 5)
    assert torch.equal(refitted_down(h.T @ h, down, torch.arange(8)), down)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_sums_that_say_nothing_are_refused(value: float) -> None:
    gram = torch.full((3, 3), value, dtype=torch.float64)
    with pytest.raises(ValueError, match="gram: expected finite sums with a positive diagonal"):
        removal_order(gram, torch.ones(2, 3))
    with pytest.raises(ValueError, match="gram: expected finite sums with a positive diagonal"):
        refitted_down(gram, torch.ones(2, 3), torch.tensor([0, 1]))
