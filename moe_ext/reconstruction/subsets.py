"""Which subsets of a layer's experts a search looks at: all of them, or those that a greedy walk passes."""

from collections.abc import Callable, Iterable
from itertools import chain, combinations, product
from math import comb

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]
"""(S, E) bool subsets to their (S,) float64 losses."""

IMPROVEMENT = 1e-12
"""Relative difference below which two losses count as equal: less is rounding."""


def count_subsets(num_experts: int, size: int, groups: int = 1) -> int:
    """How many subsets of a size there are that keep as many experts of every group."""
    return int(comb(num_experts // groups, size // groups) ** groups) if size % groups == 0 else 0


def all_subsets(num_experts: int, sizes: Iterable[int], groups: int = 1) -> Tensor:
    """(S, E) bool: every subset of these sizes, size by size in the order given; of one size, by dropped experts in
    lexicographic order. Of contiguous groups of experts, those that keep as many of every group."""
    rows, of_group = [], num_experts // groups
    members = [range(group * of_group, (group + 1) * of_group) for group in range(groups)]
    for size in sizes:
        subsets = torch.ones(count_subsets(num_experts, size, groups), num_experts, dtype=torch.bool)
        if size < num_experts:
            drops = product(*(combinations(group, of_group - size // groups) for group in members))
            subsets.scatter_(1, torch.tensor([list(chain(*each)) for each in drops]), False)
        rows.append(subsets)
    return torch.cat(rows) if rows else torch.ones(0, num_experts, dtype=torch.bool)


class GreedySearch:
    """Drops one expert after the other, always the one whose loss is lowest, and refines the sets of the wanted sizes
    by pairwise swaps until none lowers the loss. A heuristic: the sets need not be the best ones. Of a layer whose
    groups of experts stay equal, one of every group goes at a time, each in turn the best beside the others, until none
    changes.

    Args:
        losses_of: evaluates subsets.
        num_experts: E.
        seen: called with the size and the lowest loss after each step.
        stay: experts that no set drops.
        groups: contiguous groups of experts, of which every set keeps as many.

    Attributes:
        evaluated: every subset that was evaluated (its E bytes, 1 for a kept expert) with its loss.
    """

    def __init__(
        self,
        losses_of: Losses,
        num_experts: int,
        seen: Callable[[int, float], None],
        stay: Iterable[int] = (),
        groups: int = 1,
    ) -> None:
        self._losses_of = losses_of
        self._num_experts = num_experts
        self._seen = seen
        self._stay = frozenset(stay)
        self._groups = groups
        self.evaluated: dict[bytes, float] = {}

    def run(self, sizes: Iterable[int]) -> None:
        """Walks from all experts to the smallest of ``sizes``; of each size the walk goes on from the refined set."""
        wanted = set(sizes)
        keep = torch.ones(self._num_experts, dtype=torch.bool)
        for size in range(self._num_experts - self._groups, min(wanted) - 1, -self._groups):
            keep, loss = self._smaller(keep)
            if size in wanted:
                keep, loss = self._refined(keep, loss)
            self._seen(size, loss)

    def _group_of(self, expert: int) -> int:
        return expert * self._groups // self._num_experts

    def _smaller(self, keep: Tensor) -> tuple[Tensor, float]:
        """A set without one expert of every group, and its loss."""
        free = [expert for expert in keep.nonzero().flatten().tolist() if expert not in self._stay]
        of_group = [[each for each in free if self._group_of(each) == group] for group in range(self._groups)]
        smaller, loss = keep.clone(), torch.inf
        gone = [members[0] for members in of_group]
        smaller[gone] = False
        while True:
            before = loss
            for group, members in enumerate(of_group):
                whole = _with(smaller, gone[group])
                best, of_best = self._best([_without(whole, expert) for expert in members])
                if of_best < loss * (1 - IMPROVEMENT):
                    smaller, loss = best, of_best
                    gone[group] = next(expert for expert in members if not best[expert])
            if self._groups == 1 or loss == before:
                return smaller, loss

    def _refined(self, keep: Tensor, loss: float) -> tuple[Tensor, float]:
        improved = True
        while improved:
            improved = False
            for expert in range(self._num_experts):  # each kept one in turn gives way to the best of those dropped
                if not keep[expert] or expert in self._stay:
                    continue
                smaller = _without(keep, expert)
                group = self._group_of(expert)
                others = [each for each in (~keep).nonzero().flatten().tolist() if self._group_of(each) == group]
                swaps = [_with(smaller, other) for other in others]
                best, best_loss = self._best(swaps)
                if best_loss < loss * (1 - IMPROVEMENT):
                    keep, loss, improved = best, best_loss, True
                    self._seen(int(keep.sum()), loss)
        return keep, loss

    def _best(self, candidates: list[Tensor]) -> tuple[Tensor, float]:
        """The first of the candidates with the lowest loss."""
        keys = [_key(candidate) for candidate in candidates]
        if fresh := [index for index, key in enumerate(keys) if key not in self.evaluated]:
            losses = self._losses_of(torch.stack([candidates[index] for index in fresh])).tolist()
            self.evaluated.update((keys[index], loss) for index, loss in zip(fresh, losses, strict=True))
        values = [self.evaluated[key] for key in keys]
        best = min(range(len(values)), key=values.__getitem__)
        return candidates[best], values[best]

    def subsets(self) -> tuple[Tensor, Tensor]:
        """(S, E) bool and (S,) float64: everything evaluated so far."""
        flat = torch.frombuffer(bytearray(b"".join(self.evaluated)), dtype=torch.uint8)
        losses = torch.tensor(list(self.evaluated.values()), dtype=torch.float64)
        return flat.reshape(-1, self._num_experts).bool(), losses


def _key(keep: Tensor) -> bytes:
    return bytes(keep.tolist())


def _without(keep: Tensor, expert: int) -> Tensor:
    smaller = keep.clone()
    smaller[expert] = False
    return smaller


def _with(keep: Tensor, expert: int) -> Tensor:
    larger = keep.clone()
    larger[expert] = True
    return larger
