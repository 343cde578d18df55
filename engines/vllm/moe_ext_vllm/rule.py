"""The skip rule (arXiv 2402.14800, section 3.3), and what a skipped slot carries to a kernel.

A token's expert of rank j >= 2 is skipped when ``w_j < threshold[j - 2] * w_1``.
"""

from enum import Enum

import torch
from torch import Tensor


class Carried(Enum):
    """The expert index of a skipped slot, whose weight is 0."""

    PAST_THE_LAST = "E"
    """What moe_ext's kernels know as no expert."""
    MINUS_ONE = "-1"
    """What triton_kernels' routing knows as none."""
    STRONGEST = "the token's strongest expert"
    """For kernels that know no mark: an expert that the token has anyway, so that no other's weights are read."""


def skip_weak(
    weights: Tensor, experts: Tensor, thresholds: Tensor, num_experts: int, carried: Carried, rescale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Applies the rule to routed slots; ranks are those of the weights, whatever order the slots are in.

    Args:
        weights: (T, K).
        experts: (T, K) integer.
        thresholds: (K - 1,) float32.
        num_experts: E.
        carried: what stands in the place of a skipped slot's expert.
        rescale: whether the kept weights are scaled to sum to what all K summed to.

    Returns:
        weights (T, K) with 0 in skipped slots, experts (T, K), and the skipped slots (T, K) bool.
    """
    precise = weights.to(torch.float32)  # thresholds are finer than half precision
    ranked, order = precise.sort(dim=-1, descending=True, stable=True)
    below = ranked[:, 1:] < thresholds * ranked[:, :1]
    weak = torch.cat([torch.zeros_like(ranked[:, :1], dtype=torch.bool), below], dim=-1)
    skipped = torch.zeros_like(weak).scatter(-1, order, weak)
    kept = precise.masked_fill(skipped, 0.0)
    if rescale:
        total = kept.sum(-1, keepdim=True)
        # A sigmoid router may give a token weights of 0 only: they stay 0.
        kept = kept * (precise.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0))
    if carried is Carried.STRONGEST:
        experts = torch.where(skipped, experts.gather(-1, order[:, :1]), experts)
    else:
        experts = experts.masked_fill(skipped, num_experts if carried is Carried.PAST_THE_LAST else -1)
    return kept.to(weights.dtype), experts, skipped


def share_of_largest(logits: Tensor, top_k: int, among: int) -> Tensor:
    """(T, 1) float32: what the K largest of a token's softmax values sum to over what the largest ``among`` do.

    Args:
        logits: (T, E).
        among: K2, from K to E.
    """
    largest = logits.to(torch.float32).topk(among, dim=-1).values
    return (largest[:, :top_k].logsumexp(-1, keepdim=True) - largest.logsumexp(-1, keepdim=True)).exp()
