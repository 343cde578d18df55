"""A layer's experts, watched while the layer runs: what they are given, and what the layer makes of what they give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ext import ops
from moe_ext.calibration.routed_inputs import RoutedInputs
from moe_ext.models.blocks import MoeBlock
from moe_ext.runtime.layer_walk import LayerInputs
from moe_ext.runtime.patching import layer_state

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Watch:
    """Called in the place of a layer's experts: keeps what they are given, and gives a multiple of what they would."""

    def __init__(self, inputs: RoutedInputs | None, factor: int) -> None:
        self.inputs, self.factor = inputs, factor
        self.counted: Tensor | None = None
        self.output: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        experts: Tensor,
        weights: Tensor,
        activation: str,
        **options: Unpack[ops.LayerOptions],
    ) -> Tensor:
        if self.inputs is not None:
            self.inputs.add(x, experts, weights, self.counted)
        if self.factor == 0:
            return torch.zeros_like(x)
        self.output = ops.experts(x, gate_up, down, experts, weights, activation, **options)
        return self.factor * self.output


@contextmanager
def watching(block: MoeBlock, watch: Watch) -> Iterator[None]:
    state = layer_state(block)
    before, state.observer = state.observer, watch
    try:
        yield
    finally:
        state.observer = before


def scale_of_experts(block: MoeBlock, inputs: LayerInputs, dtype: torch.dtype) -> float:
    """What the decoder layer multiplies its experts' outputs by before it adds them to the rest.

    Raises:
        ValueError: it does something else with them.
    """
    outputs, given = [], torch.empty(0)
    for factor in (0, 1, 2):
        with watching(block, watch := Watch(None, factor)):
            inputs.stay(after=lambda _, output: outputs.append(output.double().flatten(0, 1)), batches=1)
        if watch.output is not None:
            given = watch.output.double()
    first, second = outputs[1] - outputs[0], outputs[2] - outputs[1]
    # Medians over tokens: hidden states of some are so large that rounding them drowns what experts add.
    size = given.square().sum(1).clamp(min=1e-300)
    scale = float(((first * given).sum(1) / size).median())
    tolerance = 0.01 if dtype == torch.float32 else 0.2  # of what rounding the others does
    for change in (first, second):
        error = float(((change - scale * given).square().sum(1) / size).sqrt().median())
        if not error <= tolerance * abs(scale):
            raise ValueError(
                f"refit: {block.name}: its decoder layer does not just add the experts' outputs to the hidden "
                "states, so that nothing says what they should be; refit channels, or prune this family without"
            )
    return scale
