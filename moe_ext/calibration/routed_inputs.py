"""What a layer's experts were given over the calibration text, kept so that their Gram matrices are made one expert at
a time: those of all experts of a wide model do not fit into memory together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_ext.runtime.formulas import ExpertsLayer
from moe_ext.storage.spilled_tensors import SpillingList

MEMORY = 128 << 20
"""Bytes that a layer's inputs take in memory; more go to a temporary file."""

ROWS = 1024
"""Tokens of one product in float32; the products are summed in float64."""


class RoutedInputs:
    """The counted tokens of a layer, batch by batch: a context manager that gives their memory back."""

    def __init__(self) -> None:
        self._list = SpillingList(MEMORY)

    def __enter__(self) -> RoutedInputs:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        self._list.close()

    def __len__(self) -> int:
        """Batches."""
        return len(self._list) // 3

    def add(self, x: Tensor, experts: Tensor, weights: Tensor, counted: Tensor | None) -> None:
        """A batch: x (T, H), experts (T, K) with E where a slot is skipped, weights (T, K), counted (T,) bool."""
        for tensor in (x, experts.long(), weights.float()):
            self._list.append(tensor if counted is None else tensor[counted])

    def batch(self, index: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, H), experts (T, K) int64 and weights (T, K) float32 of a batch's counted tokens."""
        x, experts, weights = (self._list[3 * index + i].to(device) for i in range(3))
        return x, experts, weights

    def of_expert(self, expert: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The tokens routed to an expert, some at a time: x (R, H) and weights (R,), R up to ``ROWS``."""
        waiting: list[tuple[Tensor, Tensor]] = []
        rows = 0
        for index in range(len(self)):
            x, experts, weights = self.batch(index, torch.device("cpu"))
            tokens, slots = (experts == expert).nonzero(as_tuple=True)
            for part, place in zip(tokens.split(ROWS), slots.split(ROWS), strict=True):
                if rows + len(part) > ROWS:
                    yield _joined(waiting, device)
                    waiting, rows = [], 0
                waiting.append((x[part], weights[part, place]))
                rows += len(part)
        if rows:
            yield _joined(waiting, device)

    def gram(self, expert: int, layer: ExpertsLayer) -> tuple[Tensor, int]:
        """``sum g^2 h h^T`` of an expert, and the tokens that it is summed over.

        Returns:
            (I, I) float64 on the weights' device, zero where no token came.
        """
        device, width, tokens = layer.down.device, layer.outputs(expert).shape[1], 0
        gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        for x, weights in self.of_expert(expert, device):
            h = weights[:, None] * layer.hidden(expert, x)
            gram += h.T @ h
            tokens += len(x)
        return gram, tokens


def _joined(parts: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    x, weights = zip(*parts, strict=True)
    return torch.cat(x).to(device), torch.cat(weights).to(device)
