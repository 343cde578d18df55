"""The set of experts whose removal costs least when pairs cost together: least ``p^T F p`` (arXiv 2609.18916)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations, islice, product
from math import comb

import torch
from torch import Tensor

MOST_SETS = 50_000
"""Sets of a layer up to which all of them are evaluated."""

_CHUNK = 4096
_ROUNDING = 1e-12
"""Relative difference below which two costs count as equal."""


def costs_of(pairs: Tensor, sets: Tensor) -> Tensor:
    """(S,) ``p^T F p`` of sets (S, r) of indices, under pairs F (E, E) float64."""
    return pairs[sets[:, :, None], sets[:, None, :]].sum((1, 2))


def is_exact(protected: Tensor, groups: int, removed: int) -> bool:
    """Whether :func:`least_pairs` evaluates every set."""
    sets = 1
    for free in (~protected).view(groups, -1).sum(1).tolist():
        sets *= comb(int(free), removed)
    return sets <= MOST_SETS


def least_pairs(pairs: Tensor, protected: Tensor, groups: int, removed: int) -> tuple[int, ...]:
    """The experts to remove from a layer, so many of every group, whose ``p^T F p`` is least.

    Of up to ``MOST_SETS`` sets it is the least of all; of equal costs the set that comes last in lexicographic order.
    Of more it is what a greedy walk finds, one expert after the other and then swaps of two until none lowers the cost.

    Args:
        pairs: F (E, E) float64, symmetric, with no negative element.
        protected: (E,) bool, experts that stay, at most E / groups - removed of a group.
        groups: expert groups of equal size, contiguous.
        removed: experts that every group loses.

    Returns:
        Ascending indices.
    """
    size = len(pairs) // groups
    free = [[e for e in range(g * size, (g + 1) * size) if not protected[e]] for g in range(groups)]
    if removed == 0:
        return ()
    if is_exact(protected, groups, removed):
        return _least_of_all(pairs, free, removed)
    return _least_of_walk(pairs, free, removed)


def _least_of_all(pairs: Tensor, free: list[list[int]], removed: int) -> tuple[int, ...]:
    sets: Iterator[tuple[int, ...]] = (
        tuple(chain(*parts)) for parts in product(*(combinations(members, removed) for members in free))
    )
    best: tuple[int, ...] = ()
    least = float("inf")
    while chunk := list(islice(sets, _CHUNK)):
        costs = costs_of(pairs, torch.tensor(chunk))
        lowest = min(least, float(costs.min()))
        equal = (costs <= lowest * (1 + _ROUNDING)).nonzero().flatten().tolist()
        if equal:
            best, least = chunk[equal[-1]], lowest
    return best


def _least_of_walk(pairs: Tensor, free: list[list[int]], removed: int) -> tuple[int, ...]:
    group_of = torch.full((len(pairs),), -1)
    for group, members in enumerate(free):
        group_of[members] = group
    gone = torch.zeros(len(pairs), dtype=torch.bool)
    diagonal = pairs.diagonal()
    for _ in range(removed * len(free)):
        with_set = pairs[:, gone].sum(1)
        full = torch.tensor([int((gone & (group_of == group)).sum()) == removed for group in range(len(free))])
        open_to = (group_of >= 0) & ~gone
        open_to &= ~full[group_of.clamp(min=0)]
        gone[_last_lowest(diagonal + 2 * with_set, open_to)] = True
    cost = float(pairs[gone][:, gone].sum())
    while True:
        inside, outside = gone.nonzero().flatten(), (~gone & (group_of >= 0)).nonzero().flatten()
        if len(outside) == 0:
            break
        with_set = pairs[:, gone].sum(1)
        # What the cost changes by when one comes back and another goes.
        change = (diagonal[outside] + 2 * with_set[outside])[None] - 2 * pairs[inside][:, outside]
        change = change + (diagonal[inside] - 2 * with_set[inside])[:, None]
        change = change.masked_fill(group_of[inside][:, None] != group_of[outside], float("inf"))
        place = int(change.argmin())
        if not float(change.flatten()[place]) < -_ROUNDING * cost:
            break
        gone[inside[place // len(outside)]] = False
        gone[outside[place % len(outside)]] = True
        cost = float(pairs[gone][:, gone].sum())
    return tuple(gone.nonzero().flatten().tolist())


def _last_lowest(costs: Tensor, allowed: Tensor) -> int:
    """The highest of the allowed indices with the least cost."""
    costs = costs.masked_fill(~allowed, float("inf"))
    return int((costs == costs.min()).nonzero().flatten()[-1])
