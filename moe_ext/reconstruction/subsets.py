"""Which subsets of a layer's experts a search looks at: all of them, or those that a greedy walk passes."""

from collections.abc import Callable, Iterable
from itertools import combinations
from math import comb

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]
"""(S, E) bool subsets to their (S,) float64 losses."""

IMPROVEMENT = 1e-12
"""Relative difference below which two losses count as equal: less is rounding."""


def all_subsets(num_experts: int, sizes: Iterable[int]) -> Tensor:
    """(S, E) bool: every subset of these sizes, size by size in the order given; of one size, by dropped experts in
    lexicographic order."""
    rows = []
    for size in sizes:
        dropped = num_experts - size
        subsets = torch.ones(comb(num_experts, dropped), num_experts, dtype=torch.bool)
        if dropped:
            drops = torch.tensor(list(combinations(range(num_experts), dropped)))
            subsets.scatter_(1, drops, False)
        rows.append(subsets)
    return torch.cat(rows) if rows else torch.ones(0, num_experts, dtype=torch.bool)


class GreedySearch:
    """Drops one expert after the other, always the one whose loss is lowest, and refines the sets of the wanted sizes
    by pairwise swaps until none lowers the loss. A heuristic: the sets need not be the best ones.

    Args:
        losses_of: evaluates subsets.
        num_experts: E.
        seen: called with the size and the lowest loss after each step.
        stay: experts that no set drops.

    Attributes:
        evaluated: every subset that was evaluated (its E bytes, 1 for a kept expert) with its loss.
    """

    def __init__(
        self, losses_of: Losses, num_experts: int, seen: Callable[[int, float], None], stay: Iterable[int] = ()
    ) -> None:
        self._losses_of = losses_of
        self._num_experts = num_experts
        self._seen = seen
        self._stay = frozenset(stay)
        self.evaluated: dict[bytes, float] = {}

    def run(self, sizes: Iterable[int]) -> None:
        """Walks from all experts to the smallest of ``sizes``; of each size the walk goes on from the refined set."""
        wanted = set(sizes)
        keep = torch.ones(self._num_experts, dtype=torch.bool)
        for size in range(self._num_experts - 1, min(wanted) - 1, -1):
            free = [expert for expert in keep.nonzero().flatten().tolist() if expert not in self._stay]
            keep, loss = self._best([_without(keep, expert) for expert in free])
            if size in wanted:
                keep, loss = self._refined(keep, loss)
            self._seen(size, loss)

    def _refined(self, keep: Tensor, loss: float) -> tuple[Tensor, float]:
        improved = True
        while improved:
            improved = False
            for expert in range(self._num_experts):  # each kept one in turn gives way to the best of those dropped
                if not keep[expert] or expert in self._stay:
                    continue
                smaller = _without(keep, expert)
                swaps = [_with(smaller, other) for other in (~keep).nonzero().flatten().tolist()]
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
