"""What a layer's experts were given over the calibration text, kept so that their Gram matrices are made one expert at
a time: those of all experts of a wide model do not fit into memory together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from moe_ext.storage.spilled_tensors import SpillingList

MEMORY = 128 << 20
"""Bytes that a layer's inputs take in memory; more go to a temporary file."""

ROWS = 1024
"""Tokens of one product in float32; the products are summed in float64."""

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


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

    def gram(self, expert: int, gate_up: Tensor, activation: str) -> tuple[Tensor, int]:
        """``sum g^2 h h^T`` of an expert, and the tokens that it is summed over.

        Args:
            gate_up: (2I, H), the expert's.
            activation: the operators' name.

        Returns:
            (I, I) float64 on the weights' device, zero where no token came.
        """
        width, tokens = gate_up.shape[0] // 2, 0
        gram = torch.zeros(width, width, dtype=torch.float64, device=gate_up.device)
        for x, weights in self.of_expert(expert, gate_up.device):
            h = weights[:, None] * hidden(x, gate_up, activation)
            gram += h.T @ h
            tokens += len(x)
        return gram, tokens


def _joined(parts: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    x, weights = zip(*parts, strict=True)
    return torch.cat(x).to(device), torch.cat(weights).to(device)


def hidden(x: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """``h = act(gate x) * (up x)`` of one expert, (R, I) float32; the products are in the weights' dtype.

    Args:
        x: (R, H).
        gate_up: (2I, H).
        activation: the operators' name.
    """
    gate, up = F.linear(x.to(gate_up.dtype), gate_up).float().chunk(2, dim=-1)
    h: Tensor = ACT2FN[_ACTIVATIONS[activation]](gate) * up
    return h
