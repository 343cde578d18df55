"""What a search needs of all experts' outputs: scalar products with each other, or with a gradient.

By the operators where they run the layer's experts; elsewhere by the family's own code, one expert after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ext import ops
from moe_ext.models.blocks import MoeBlock
from moe_ext.models.boundary import eager_forward
from moe_ext.runtime.formulas import experts_layer
from moe_ext.runtime.patching import layer_state

GRAM_BYTES = 32 << 20
"""Bytes of Gram matrices that exist at a time."""


def tokens_at_a_time(block: MoeBlock, hidden: int) -> int:
    """How many tokens' Gram matrices, and where the family's own code runs outputs, exist at a time."""
    width = max(block.num_experts, hidden) if layer_state(block).stock else block.num_experts
    return max(16, GRAM_BYTES // (8 * block.num_experts * width))


def gram_of(block: MoeBlock, x: Tensor) -> Tensor:
    """(T, E, E) float64 scalar products of a patched layer's experts' outputs for x (T, H), symmetric to the bit."""
    if layer_state(block).stock:
        outputs = _outputs(block, x)
        gram = outputs @ outputs.transpose(1, 2)
        return torch.triu(gram) + torch.triu(gram, diagonal=1).transpose(1, 2)
    layer = experts_layer(block.experts)
    weights, options = (layer.gate_up, layer.down), layer.options()
    return ops.expert_gram(layer.taken(x), *weights, layer.activation, **options)


def projections_of(block: MoeBlock, x: Tensor, gradient: Tensor) -> Tensor:
    """(T, E) float64 scalar products of a patched layer's experts' outputs for x (T, H) with a gradient (T, H)."""
    if layer_state(block).stock:
        step = tokens_at_a_time(block, x.shape[1])
        parts = zip(x.split(step), gradient.double().split(step), strict=True)
        return torch.cat([(_outputs(block, part) @ of_part.unsqueeze(2)).squeeze(2) for part, of_part in parts])
    layer = experts_layer(block.experts)
    weights, options = (layer.gate_up, layer.down), layer.options()
    return ops.expert_projection(layer.taken(x), *weights, gradient, layer.activation, **options)


def _outputs(block: MoeBlock, x: Tensor) -> Tensor:
    """(T, E, H) float64 outputs of all experts, by the family's own code."""
    run, ones = eager_forward(block.experts), torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    places = [torch.full((len(x), 1), expert, device=x.device) for expert in range(block.num_experts)]
    with torch.no_grad():
        return torch.stack([run(block.experts, x, place, ones) for place in places], dim=1).double()
