"""Dynamic expert skipping (arXiv 2402.14800, section 3.3) at work: the rule, and how often it applies.

A token's expert of rank j >= 2 is skipped when ``w_j < threshold[j - 2] * w_1``. The kept weights are scaled so that
they sum to what all K summed to; for K = 2 with renormalised weights this is the paper's rule. Or they are left as they
were, or the K weights take the share that they have among the K2 largest (:data:`GateScale`).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.models.blocks import base_of, moe_blocks
from moe_ext.models.wrapped import unwrapped


def skip_weak(
    weights: Tensor, experts: Tensor, thresholds: Tensor, num_experts: int, *, rescale: bool = True
) -> tuple[Tensor, Tensor]:
    """Applies the skip rule to routed slots, differentiably in the weights.

    Ranks are those of the weights' magnitudes, whatever order the slots are in: a router that selects by corrected
    scores or within groups does not sort them. Slots keep their places.

    Args:
        weights: (T, K).
        experts: (T, K) integer.
        thresholds: (K - 1,).
        num_experts: E, the index that marks a skipped slot.
        rescale: whether the kept weights are scaled to sum to what all K summed to, in magnitude.

    Returns:
        weights (T, K) with 0 and experts (T, K) with E in skipped slots.

    Raises:
        ValueError: the shapes differ, or the experts are not integers: a router with another kind of output.
    """
    if weights.shape != experts.shape or experts.is_floating_point():
        raise ValueError(
            f"the router gave weights {tuple(weights.shape)} and experts {tuple(experts.shape)} of {experts.dtype}; "
            "skipping needs (T, K) and (T, K) integers"
        )
    # Thresholds are finer than half precision.
    precise = weights.to(torch.promote_types(weights.dtype, torch.float32))
    # Thresholds and weights made under inference_mode must not enter the backward graph.
    # By magnitude: some families' weights may be negative.
    ranked, order = precise.detach().abs().sort(dim=-1, descending=True, stable=True)
    weak = torch.zeros_like(ranked, dtype=torch.bool)
    weak[:, 1:] = ranked[:, 1:] < thresholds.to(ranked) * ranked[:, :1]
    skipped = torch.zeros_like(weak).scatter(-1, order, weak)
    kept = precise.masked_fill(skipped, 0.0)
    if not rescale:
        return kept.to(weights.dtype), experts.masked_fill(skipped, num_experts)
    total = kept.abs().sum(-1, keepdim=True)
    # A sigmoid router may give a token weights of 0 only: they stay 0.
    scale = precise.abs().sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
    return (kept * scale).to(weights.dtype), experts.masked_fill(skipped, num_experts)


def share_of_largest(logits: Tensor, top_k: int, among: int) -> Tensor:
    """What the K largest of a token's softmax values sum to over what the largest ``among`` of them do, differentiably.

    Args:
        logits: (T, E).
        top_k: K.
        among: K2, from K to E.

    Returns:
        (T, 1) float32, or float64 of such logits.
    """
    largest = logits.to(torch.promote_types(logits.dtype, torch.float32)).topk(among, dim=-1).values
    return (largest[:, :top_k].logsumexp(-1, keepdim=True) - largest.logsumexp(-1, keepdim=True)).exp()


@dataclass
class SkipCount:
    """Slots that a model routed and skipped, per MoE layer; filled by :func:`count_skips`."""

    layers: list[str]
    skipped: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Share of a layer's slots that were skipped, in layer order; 0 for a layer that saw no token."""
        return [skipped / slots if slots else 0.0 for skipped, slots in zip(self.skipped, self.slots, strict=True)]

    def rate(self) -> float:
        """Share of all slots that were skipped."""
        return sum(self.skipped) / sum(self.slots) if sum(self.slots) else 0.0


@contextmanager
def count_skips(model: PreTrainedModel) -> Iterator[SkipCount]:
    """Counts routed and skipped slots of every forward inside the ``with`` block; padding is not counted.

    Padding is what the ``attention_mask`` of any forward of the model or its decoder marks: a 2-dimensional mask with
    0, a 4-dimensional one, as ``generate`` makes for a static cache, where a token may not attend to itself. Under
    continuous batching (``generate_batch``) it is what follows the packed sequences. The counts are read on the host,
    for which a compiled model (``torch.compile``) breaks its graph; a captured CUDA graph is refused, and one that was
    captured before counts nothing: ``ContinuousBatchingConfig(use_cuda_graph=False)``.

    Raises:
        ValueError: in the forward, if its attention mask has another form, or it is captured as a CUDA graph.
    """
    model = unwrapped(model)
    blocks = moe_blocks(model)
    count = SkipCount([block.name for block in blocks], [0] * len(blocks), [0] * len(blocks))
    mask: Tensor | None = None  # of the forward under way
    past = 0
    packed: int | None = None  # tokens of the forward under way, where it packs sequences without padding between them
    signature = inspect.signature(base_of(model).forward)

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal mask, past, packed
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError("count_skips reads counts on the host, which a CUDA graph cannot: run without graphs")
        arguments = signature.bind_partial(*args, **kwargs).arguments
        mask = arguments.get("attention_mask")
        # The cache's name from transformers 5.24 on, and before.
        cache = arguments.get("cache", arguments.get("past_key_values"))
        queries = kwargs.get("cu_seq_lens_q")
        packed = None if queries is None else int(queries[-1])
        if (
            packed is not None
        ):  # continuous batching: sequences one after the other, told apart by the mask; then padding
            mask, past = None, 0
            return
        if isinstance(mask, dict):  # a model with several kinds of attention
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() in (2, 4)):
            raise ValueError(_UNKNOWN_MASK)
        past = 0 if cache is None else int(cache.get_seq_length())

    def after(layer: int, num_experts: int) -> Any:
        def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            experts = output[2]  # (T, K)
            if packed is not None:
                experts = experts[:packed]
            elif mask is not None:
                experts = experts[_present(mask, past, experts.shape[0]).to(experts.device)]
            count.skipped[layer] += int((experts == num_experts).sum())
            count.slots[layer] += experts.numel()

        return hook

    handles = [base_of(model).register_forward_pre_hook(before, with_kwargs=True)]
    for layer, block in enumerate(blocks):
        handles.append(block.router.register_forward_hook(after(layer, block.num_routed)))
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


_UNKNOWN_MASK = (
    "count_skips cannot tell padding from this attention mask; expected (sequences, tokens), or "
    "(sequences, 1, tokens, tokens in the cache)"
)


def _present(mask: Tensor, past: int, tokens: int) -> Tensor:
    """(T,) bool: the tokens of a forward that are not padding.

    Args:
        mask: (B, past and present tokens), or (B, 1, present tokens, cache) bool or additive.
        past: tokens in the cache before the forward.
        tokens: T = B times present tokens.

    Raises:
        ValueError: the mask has another form.
    """
    if mask.dim() == 2:
        return mask[:, -(tokens // mask.shape[0]) :].reshape(-1).bool()
    batch, _, present, cache = mask.shape
    if batch * present != tokens or past + present > cache:
        raise ValueError(_UNKNOWN_MASK)
    own = mask[:, 0, :, past:].diagonal(dim1=1, dim2=2)
    return (own if own.dtype == torch.bool else own == 0).reshape(-1)
