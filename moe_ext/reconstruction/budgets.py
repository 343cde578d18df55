"""How many experts every layer keeps: the same number, given numbers, or a total shared out by loss."""

from collections.abc import Sequence

import torch

from moe_ext.decision.plan import kept_after_removing
from moe_ext.models.layout import Layout
from moe_ext.reconstruction.subsets import IMPROVEMENT


def allowed_sizes(layout: Layout, stay: Sequence[int] = ()) -> list[int]:
    """Numbers of experts that a layer may keep, descending from all to what its router needs.

    Args:
        stay: experts that it has to keep.
    """
    of_group = layout.num_experts // layout.groups
    held = [sum(expert // of_group == group for expert in stay) for group in range(layout.groups)]
    fewest = max(-(-layout.fewest // layout.groups), *held)
    return [layout.groups * size for size in range(of_group, fewest - 1, -1)]


def counts_per_layer(
    keep: int | Sequence[int] | None,
    ratio: float | None,
    layers: int,
    num_experts: int,
    top_k: int,
    groups: int = 1,
    fewest: int = 0,
) -> list[int]:
    """Experts kept by each of the layers.

    Args:
        keep: a number for all layers, or one for each. Exactly one of keep and ratio is given.
        ratio: share of the experts removed in every layer, in [0, 1): ``floor(ratio * E + 0.5)`` of them; with groups
            of every group.
        num_experts: E.
        top_k: K.
        groups: of experts, of which a layer keeps as many each.
        fewest: experts that the router needs; K if less.

    Raises:
        ValueError: neither or both of keep and ratio, a list of another length than layers, a number outside K..E or
            with which the router could not choose, or one that the groups do not share equally.
    """
    if (keep is None) == (ratio is None):
        raise ValueError(f"keep: expected exactly one of keep and ratio, got keep={keep!r} and ratio={ratio!r}")
    if ratio is not None:
        counts = [kept_after_removing(ratio, num_experts // groups) * groups] * layers
    elif isinstance(keep, Sequence):
        counts = list(keep)
    else:
        assert keep is not None
        counts = [keep] * layers
    if len(counts) != layers:
        raise ValueError(f"keep: expected one number for each of {layers} layers, got {len(counts)}")
    least = max(top_k, fewest)
    for count in counts:
        name, asked = ("keep", keep) if ratio is None else ("ratio", ratio)
        if type(count) is not int or not least <= count <= num_experts:
            raise ValueError(
                f"{name}: {asked!r} keeps {count!r} of {num_experts} experts; "
                f"expected {least} to {num_experts} ({'top_k' if least == top_k else 'what the router needs'} to all)"
            )
        if count % groups:
            raise ValueError(f"{name}: {asked!r} keeps {count} experts, which {groups} groups do not share equally")
    return counts


def share_out(curves: Sequence[Sequence[float]], total: int, num_experts: int) -> list[int]:
    """Shares a total of kept experts out over the layers so that the sum of the losses is the least that there is.

    Dynamic programming over the layers: the least loss of the layers from one on, for every number of experts that they
    drop together. Equal sums (but for rounding): the earlier layers drop more.

    Args:
        curves: for every layer its loss with 0, 1, ... experts dropped, as far as dropping may go; infinite where it
            may not drop that many.
        total: experts kept in all layers together; within what the curves allow.
        num_experts: E, of every layer.

    Returns:
        Experts kept by each layer, their sum ``total``.
    """
    drops = num_experts * len(curves) - total
    least = [torch.full((drops + 1,), torch.inf, dtype=torch.float64)]  # of no layers: they drop nothing
    least[0][0] = 0.0
    for curve in reversed(curves):
        of_rest = least[0]
        sums = torch.full_like(of_rest, torch.inf)
        for dropped, loss in enumerate(curve[: drops + 1]):
            torch.minimum(sums[dropped:], of_rest[: drops + 1 - dropped] + loss, out=sums[dropped:])
        least.insert(0, sums)
    counts = []
    for curve, best, of_rest in zip(curves, least, least[1:], strict=False):
        most = float(best[drops]) * (1 + IMPROVEMENT)
        dropped = max(
            dropped for dropped, loss in enumerate(curve[: drops + 1]) if loss + float(of_rest[drops - dropped]) <= most
        )
        counts.append(num_experts - dropped)
        drops -= dropped
    assert drops == 0
    return counts
