"""Dynamic expert skipping (arXiv 2402.14800, section 3.3): thresholds, their place in the config, the rule, its rate.

A token's expert of rank j >= 2 is skipped when ``w_j < threshold[j - 2] * w_1``. The kept weights are scaled so that
they sum to what all K summed to. For K = 2 with renormalised weights this is the paper's rule.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.architectures import moe_blocks
from moe_ext.statistics import ExpertStatistics

CONFIG_KEY = "moe_ext"
THRESHOLDS_KEY = "skip_thresholds"


def skip_thresholds(stats: ExpertStatistics, quantile: float = 0.5) -> Tensor:
    """Per-layer thresholds for dynamic expert skipping (arXiv 2402.14800, section 3.3).

    Args:
        stats: statistics with a ratio histogram, from :func:`moe_ext.calibrate`.
        quantile: share of calibration tokens whose ratio ``w_j / w_1`` lies below the threshold, which is the share of
            rank-j slots that will be skipped on such text; 0.5 is the paper's median, 0 skips nothing.

    Returns:
        (L, K - 1) float32 in [0, 1], exact to one histogram bin (1/1024).

    Raises:
        ValueError: quantile outside [0, 1], top_k below 2, or a layer without tokens (the layer is named).
    """
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile is {quantile}; expected 0 to 1")
    if stats.top_k < 2:
        raise ValueError("skipping needs at least 2 experts a token; these statistics have top_k = 1")
    histogram = stats.ratio_histogram.double()  # (L, K - 1, bins)
    total = histogram.sum(-1)  # (L, K - 1)
    for name, counts in zip(stats.layers, total, strict=True):
        if bool((counts == 0).any()):
            raise ValueError(f"layer {name} has no calibration tokens; calibrate on text that reaches it")
    wanted = quantile * total
    upto = histogram.cumsum(-1)
    # First bin at which the cumulative count reaches the wanted one, then linear inside the bin.
    bins = (upto < wanted.unsqueeze(-1)).sum(-1, keepdim=True).clamp(max=histogram.shape[-1] - 1)
    inside = histogram.gather(-1, bins).squeeze(-1)
    before = upto.gather(-1, bins).squeeze(-1) - inside
    share = torch.where(inside > 0, (wanted - before) / inside, 0.0)
    return ((bins.squeeze(-1) + share) / histogram.shape[-1]).float()


def check_thresholds(thresholds: Tensor | Sequence[Sequence[float]], layers: int, top_k: int) -> Tensor:
    """Thresholds as a (L, K - 1) float32 tensor on the CPU.

    Raises:
        ValueError: wrong shape, or a value that is not a finite number in [0, 1].
    """
    checked = torch.as_tensor(thresholds, dtype=torch.float32, device="cpu").detach().clone()
    if tuple(checked.shape) != (layers, top_k - 1):
        raise ValueError(
            f"skip thresholds have shape {tuple(checked.shape)}; "
            f"expected {(layers, top_k - 1)} = (MoE layers, top_k - 1)"
        )
    if not bool(((checked >= 0) & (checked <= 1)).all()):
        raise ValueError("skip thresholds must be numbers from 0 to 1")
    return checked


def thresholds_in_config(config: Any, layers: int, top_k: int) -> Tensor | None:
    """Thresholds stored in a model's config: ours under ``moe_ext``, or the ``betas`` of NAEE's published code.

    Returns:
        (L, K - 1) float32, or None if the config has none.

    Raises:
        ValueError: what is stored does not fit the model.
    """
    ours = getattr(config, CONFIG_KEY, None)
    if ours is not None:
        if not isinstance(ours, dict):
            raise ValueError(f"config.{CONFIG_KEY} is {ours!r}; expected a dict")
        if THRESHOLDS_KEY in ours:
            return check_thresholds(ours[THRESHOLDS_KEY], layers, top_k)
    betas = getattr(config, "betas", None)
    if betas is None:
        return None
    if not isinstance(betas, dict) or {str(key) for key in betas} != {str(layer) for layer in range(layers)}:
        raise ValueError(f"config.betas is {betas!r}; expected a dict with the keys '0' to '{layers - 1}'")
    by_layer = {int(key): float(value) for key, value in betas.items()}
    return check_thresholds([[by_layer[layer]] for layer in range(layers)], layers, top_k)


def section_with(thresholds: Tensor, section: dict[str, Any] | None) -> dict[str, Any]:
    """A config's ``moe_ext`` section with thresholds (L, K - 1) in it, whatever else it holds kept."""
    return {**(section or {}), THRESHOLDS_KEY: thresholds.tolist()}


def skip_weak(weights: Tensor, experts: Tensor, thresholds: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Applies the skip rule to routed slots, differentiably in the weights.

    Ranks are those of the weights, whatever order the slots are in: a router that selects by corrected scores or within
    groups does not sort them. Slots keep their places.

    Args:
        weights: (T, K).
        experts: (T, K) integer.
        thresholds: (K - 1,).
        num_experts: E, the index that marks a skipped slot.

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
    ranked, order = precise.detach().sort(dim=-1, descending=True, stable=True)
    weak = torch.zeros_like(ranked, dtype=torch.bool)
    weak[:, 1:] = ranked[:, 1:] < thresholds.to(ranked) * ranked[:, :1]
    skipped = torch.zeros_like(weak).scatter(-1, order, weak)
    kept = precise.masked_fill(skipped, 0.0)
    total = kept.sum(-1, keepdim=True)
    # A sigmoid router may give a token weights of 0 only: they stay 0.
    scale = precise.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
    return (kept * scale).to(weights.dtype), experts.masked_fill(skipped, num_experts)


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
    0, a 4-dimensional one, as ``generate`` makes for a static cache, where a token may not attend to itself. The counts
    are read on the host, for which a compiled model (``torch.compile``) breaks its graph.

    Raises:
        ValueError: in the forward, if its attention mask has another form.
    """
    blocks = moe_blocks(model)
    count = SkipCount([block.name for block in blocks], [0] * len(blocks), [0] * len(blocks))
    mask: Tensor | None = None  # of the forward under way
    past = 0
    signature = inspect.signature(model.base_model.forward)

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal mask, past
        arguments = signature.bind_partial(*args, **kwargs).arguments
        mask = arguments.get("attention_mask")
        cache = arguments.get(
            "cache", arguments.get("past_key_values")
        )  # its name from transformers 5.24 on, and before
        if isinstance(mask, dict):  # a model with several kinds of attention
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() in (2, 4)):
            raise ValueError(_UNKNOWN_MASK)
        past = 0 if cache is None else int(cache.get_seq_length())

    def after(layer: int, num_experts: int) -> Any:
        def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            experts = output[2]  # (T, K)
            if mask is not None:
                experts = experts[_present(mask, past, experts.shape[0]).to(experts.device)]
            count.skipped[layer] += int((experts == num_experts).sum())
            count.slots[layer] += experts.numel()

        return hook

    handles = [model.base_model.register_forward_pre_hook(before, with_kwargs=True)]
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
