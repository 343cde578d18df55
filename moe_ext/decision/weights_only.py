"""Scores from weights alone: ``aimer`` (arXiv 2603.18492), which needs no calibration."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from moe_ext.decision.criteria import Scores
from moe_ext.models.blocks import prunable_blocks, refuse_offloaded, refuse_shared_out
from moe_ext.models.layout import layout_of
from moe_ext.models.packed_experts import refuse_packed
from moe_ext.models.wrapped import unwrapped


def aimer(model: PreTrainedModel) -> Scores:
    """Scores from an expert's weights alone, without calibration (arXiv 2603.18492).

    The paper's score is the mean absolute value of an expert's weights over their root mean square, and the highest are
    removed first. Here as everywhere the lowest is removed first: the value is the reciprocal, root mean square over
    mean absolute value, which orders experts the other way round. An expert whose weights are all 0 scores 0.

    Args:
        model: a model with MoE layers; its experts' weights and biases all count.

    Returns:
        Scores with (L, E) float64 values, 0 beyond a layer's number of experts.

    Raises:
        TypeError, ValueError: as :func:`moe_ext.models.blocks.prunable_blocks`; weights that are not plain or not in
            memory, or not finite (the layer and expert are named).
    """
    model = unwrapped(model)
    blocks = prunable_blocks(model)
    refuse_offloaded(blocks, "score")
    refuse_shared_out(blocks, "score")
    for block in blocks:
        refuse_packed(block.name, block.experts, "score")
    layout = layout_of(model, blocks)
    values = torch.zeros(len(blocks), layout.num_experts, dtype=torch.float64)
    with torch.no_grad():
        for layer, block in enumerate(blocks):
            parts = block.expert_parts()
            for expert in range(block.num_experts):
                weights = [part.of_expert(expert) for part in parts]
                count = sum(weight.numel() for weight in weights)
                absolute, euclidean = (
                    torch.stack([torch.linalg.vector_norm(weight, order, dtype=torch.float64) for weight in weights])
                    for order in (1, 2)
                )
                if mean := float(absolute.sum()) / count:
                    values[layer, expert] = math.sqrt(float(euclidean.square().sum()) / count) / mean
                if not math.isfinite(values[layer, expert]):
                    raise ValueError(f"{block.name}: expert {expert} has weights that are not finite")
    return Scores(values, "aimer", layout, dataset="")
