"""How many experts every layer keeps: the same number, given numbers, or a total shared out by loss."""

from collections.abc import Sequence
from itertools import pairwise

from moe_ext.decision.plan import kept_after_removing


def counts_per_layer(
    keep: int | Sequence[int] | None, ratio: float | None, layers: int, num_experts: int, top_k: int
) -> list[int]:
    """Experts kept by each of the layers.

    Args:
        keep: a number for all layers, or one for each. Exactly one of keep and ratio is given.
        ratio: share of the experts removed in every layer, in [0, 1): ``floor(ratio * E + 0.5)`` of them.
        num_experts: E.
        top_k: K.

    Raises:
        ValueError: neither or both of keep and ratio, a list of another length than layers, or a number outside K..E.
    """
    if (keep is None) == (ratio is None):
        raise ValueError(f"keep: expected exactly one of keep and ratio, got keep={keep!r} and ratio={ratio!r}")
    if ratio is not None:
        counts = [kept_after_removing(ratio, num_experts)] * layers
    elif isinstance(keep, Sequence):
        counts = list(keep)
    else:
        assert keep is not None
        counts = [keep] * layers
    if len(counts) != layers:
        raise ValueError(f"keep: expected one number for each of {layers} layers, got {len(counts)}")
    for count in counts:
        if type(count) is not int or not top_k <= count <= num_experts:
            name, asked = ("keep", keep) if ratio is None else ("ratio", ratio)
            raise ValueError(
                f"{name}: {asked!r} keeps {count!r} of {num_experts} experts; "
                f"expected {top_k} to {num_experts} (top_k to all)"
            )
    return counts


def share_out(curves: Sequence[Sequence[float]], total: int, num_experts: int) -> list[int]:
    """Shares a total of kept experts out over the layers so that the sum of the losses is low.

    Experts are dropped one at a time where the loss grows least, on the lower convex hull of a layer's losses: a hull
    makes marginal losses rise, so that the greedy choice is the best one for the hulls. Equal marginal losses: the
    earlier layer first.

    Args:
        curves: for every layer its loss with 0, 1, ... experts dropped, as far as dropping may go.
        total: experts kept in all layers together; within what the curves allow.
        num_experts: E, of every layer.

    Returns:
        Experts kept by each layer, their sum ``total``.
    """
    marginals = [
        (slope, layer, step) for layer, curve in enumerate(curves) for step, slope in enumerate(hull_slopes(curve))
    ]
    counts = [num_experts] * len(curves)
    for _, layer, _ in sorted(marginals)[: num_experts * len(curves) - total]:
        counts[layer] -= 1
    assert sum(counts) == total
    return counts


def hull_slopes(curve: Sequence[float]) -> list[float]:
    """Slopes of the lower convex hull of the points (0, curve[0]), (1, curve[1]), ...: one a step, never falling."""
    hull: list[int] = []
    for point, value in enumerate(curve):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (curve[b] - curve[a]) * (point - a) < (value - curve[a]) * (b - a):
                break
            hull.pop()
        hull.append(point)
    slopes: list[float] = []
    for a, b in pairwise(hull):
        slopes += [(curve[b] - curve[a]) / (b - a)] * (b - a)
    return slopes
