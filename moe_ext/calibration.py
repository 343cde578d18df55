"""Calibration: runs a model over text and fills :class:`ExpertStatistics`, norms fused into the experts' own pass.

An observer is attached to every experts module for the duration of the run. The moments come out of the
``experts_observed`` operator; ratios and coactivation are a few small tensor operations on the routing.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_ext import ops
from moe_ext.architectures import MoeBlock, family_of, moe_blocks
from moe_ext.evaluation import evaluation_mode
from moe_ext.patching import active_thresholds, is_patched, patch, unpatch
from moe_ext.statistics import RATIO_BINS, ExpertStatistics


class _Observer:
    """Accumulates one layer's statistics on the layer's device; called in place of the ``experts`` operator."""

    def __init__(self, block: MoeBlock) -> None:
        device = next(block.experts.parameters()).device
        self.num_experts, self.top_k = block.num_experts, block.top_k
        self.moments = torch.zeros(self.num_experts, 3, 3, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.ratio_histogram = torch.zeros(self.top_k - 1, RATIO_BINS, dtype=torch.int64, device=device)
        self.coactivation = torch.zeros(self.num_experts, self.num_experts, dtype=torch.int64, device=device)
        self.counted: Tensor | None = None  # (T,) bool for the batch under way

    def __call__(
        self, x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
    ) -> Tensor:
        out = ops.experts_observed(x, gate_up, down, experts, weights, activation, self.moments, self.counted)
        self._count(experts.long(), weights.float())
        return out

    def _count(self, experts: Tensor, weights: Tensor) -> None:
        """experts, weights: (T, K). Sizes depend on shapes only, so that a GPU is not waited for."""
        ones = torch.ones(experts.shape[0], dtype=torch.int64, device=experts.device)
        counted = ones if self.counted is None else self.counted.long()  # (T,) 1 for tokens that count
        self.tokens += counted.sum()
        ranked = weights.sort(dim=-1, descending=True).values
        ratios = (ranked[:, 1:] / ranked[:, :1]).nan_to_num(0.0)  # a NaN is reported once the moments are read
        bins = (ratios * RATIO_BINS).long().clamp(0, RATIO_BINS - 1)  # (T, K - 1)
        ranks = torch.arange(self.top_k - 1, device=bins.device) * RATIO_BINS
        _add_counts(self.ratio_histogram, bins + ranks, counted[:, None])
        pairs = experts.unsqueeze(2) * self.num_experts + experts.unsqueeze(1)  # (T, K, K)
        _add_counts(self.coactivation, pairs, counted[:, None, None])


def _add_counts(histogram: Tensor, bins: Tensor, counts: Tensor) -> None:
    """histogram[bin] += count for every element of bins, in place; counts broadcast to the shape of bins."""
    histogram.view(-1).scatter_add_(0, bins.flatten(), counts.expand_as(bins).flatten())


@contextmanager
def _observing(model: PreTrainedModel) -> Iterator[list[_Observer]]:
    """A patched model in evaluation mode with an observer in every MoE layer; restored on the way out."""
    blocks = moe_blocks(model)
    if any(hasattr(block.experts, "_moe_ext_observer") for block in blocks):
        raise ValueError("the model is being calibrated already")
    was_patched = is_patched(model)
    if not was_patched:
        patch(model, skip=None)
    try:
        observers = [_Observer(block) for block in blocks]
        for block, observer in zip(blocks, observers, strict=True):
            block.experts._moe_ext_observer = observer  # type: ignore[assignment]
        with evaluation_mode(model):
            yield observers
    finally:
        for block in blocks:
            vars(block.experts).pop("_moe_ext_observer", None)
        if not was_patched:
            unpatch(model)


def check_batch(index: int, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The batch's counted tokens (B * S,) bool, or None if it has no attention mask; ValueError for a malformed one."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"batch {index} is no mapping with 'input_ids'")
    shape = tuple(getattr(batch["input_ids"], "shape", ()))
    if len(shape) != 2:
        raise ValueError(f"batch {index}: 'input_ids' has shape {shape}; expected (sequences, tokens)")
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"batch {index}: {name!r} is {type(value).__name__}; expected a tensor")
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    if tuple(mask.shape) != shape:
        raise ValueError(f"batch {index}: 'attention_mask' has shape {tuple(mask.shape)}; expected {shape}")
    return mask.reshape(-1).bool()


def calibrate(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = True, dataset: str = ""
) -> ExpertStatistics:
    """Statistics of a model's experts over text, in one forward pass per batch.

    Args:
        model: a model that :func:`moe_ext.patch` supports. Patched or not, it is left as it was.
        batches: mappings with ``input_ids`` (B, S) and optionally ``attention_mask`` (B, S); tokens whose mask is 0 are
            padding and count in nothing.
        progress: whether to show a progress bar.
        dataset: a label for the text, kept in the statistics.

    Returns:
        :class:`ExpertStatistics` on the CPU.

    Raises:
        ValueError: a malformed batch, no counted token, a model that is skipping (its routing would bias the
            statistics), or activations that are not finite (the layer is named).
    """
    if active_thresholds(model) is not None:
        raise ValueError(
            "the model skips experts, which would bias its statistics; patch(model, skip=None) before calibrating"
        )
    blocks = moe_blocks(model)
    stats = ExpertStatistics.zeros(
        model_type=model.config.model_type,
        layers=tuple(block.name for block in blocks),
        num_experts=blocks[0].num_experts,
        top_k=blocks[0].top_k,
        gate=family_of(model).gate,
        dataset=dataset,
    )
    with torch.no_grad(), _observing(model) as observers:
        for index, batch in enumerate(tqdm(batches, desc="calibrate", unit="batch", disable=not progress)):
            counted = check_batch(index, batch)
            for observer in observers:
                observer.counted = None if counted is None else counted.to(observer.moments.device)
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            # The decoder without the language model head: statistics need no logits.
            model.base_model(**inputs, use_cache=False)
    for layer, observer in enumerate(observers):
        stats.moments[layer] = observer.moments
        stats.tokens[layer] = observer.tokens
        stats.ratio_histogram[layer] = observer.ratio_histogram
        stats.coactivation[layer] = observer.coactivation
        if not bool(stats.moments[layer].isfinite().all()):
            raise ValueError(f"layer {stats.layers[layer]} gave activations or routing weights that are not finite")
    if not bool((stats.tokens > 0).all()):
        raise ValueError(
            "no token was counted: 'batches' is empty, every token is padding, "
            "or set_experts_implementation was called on the patched model"
        )
    return stats
