"""Calibration: runs a model over text and fills :class:`ExpertStatistics`, norms fused into the experts' own pass.

An observer is attached to every experts module for the duration of the run. The moments come out of the
``experts_observed`` operator; ratios and coactivation are a few small tensor operations on the routing. Where the
operator cannot run, or sums of outputs are asked for, the observer evaluates the family's own code expert by expert.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_ext import ops
from moe_ext.architectures import (
    MoeBlock,
    device_of,
    eager_forward,
    family_of,
    input_device,
    model_type_of,
    moe_blocks,
    refuse_novices,
    text_config,
)
from moe_ext.digests import joined_digest, router_digest
from moe_ext.evaluation import evaluation_mode
from moe_ext.layer_inputs import LayerInputs, decoder_layers
from moe_ext.layers_on_disk import LayersOnDisk
from moe_ext.patching import active_thresholds, is_patched, patch, unpatch
from moe_ext.processes import add_up, share_of
from moe_ext.sequential import Options, Record
from moe_ext.statistics import RATIO_BINS, ExpertStatistics


class _Observer:
    """Accumulates one layer's statistics on the layer's device; called in place of the ``experts`` operator, or beside
    experts that run on transformers' implementation."""

    def __init__(self, block: MoeBlock, outputs: bool) -> None:
        device = device_of(block.experts, next(block.experts.parameters()))
        self.experts = block.experts
        self.num_experts, self.top_k = block.num_experts, block.top_k
        self.moments = torch.zeros(self.num_experts, 3, 3, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.ratio_histogram = torch.zeros(self.top_k - 1, RATIO_BINS, dtype=torch.int64, device=device)
        self.coactivation = torch.zeros(self.num_experts, self.num_experts, dtype=torch.int64, device=device)
        self.outputs = outputs
        self.output_sum: Tensor | None = None  # (E, H), from the first batch on if asked for
        self.counted: Tensor | None = None  # (T,) bool for the batch under way

    def __call__(
        self, x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
    ) -> Tensor:
        out = ops.experts_observed(x, gate_up, down, experts, weights, activation, self.moments, self.counted)
        if self.outputs:
            self._evaluate(x, experts, weights, moments=False)
        self._count(experts.long(), weights.float())
        return out

    def observe(self, x: Tensor, experts: Tensor, weights: Tensor) -> None:
        """The same statistics without the operator: x (T, H), experts (T, K), weights (T, K)."""
        self._evaluate(x, experts, weights, moments=True)
        self._count(experts.long(), weights.float())

    def _evaluate(self, x: Tensor, experts: Tensor, weights: Tensor, *, moments: bool) -> None:
        """Adds the counted slots' outputs to their sums, and their norms to the moments, with the model's own code.

        One expert after the other, each on its own rows with weight 1: exact for whatever that code computes. Slower
        than the operator, and it waits for a GPU.
        """
        if self.outputs and self.output_sum is None:
            self.output_sum = torch.zeros(self.num_experts, x.shape[1], dtype=torch.float64, device=x.device)
        counted = torch.ones_like(experts, dtype=torch.bool) if self.counted is None else self.counted[:, None]
        for expert in range(self.num_experts):
            tokens, slots = ((experts == expert) & counted).nonzero(as_tuple=True)  # (R,) each
            if len(tokens) == 0:
                continue
            alone = torch.full((len(tokens), 1), expert, dtype=experts.dtype, device=x.device)
            ones = torch.ones(len(tokens), 1, dtype=x.dtype, device=x.device)
            out = eager_forward(self.experts)(self.experts, x[tokens], alone, ones).double()  # (R, H)
            if self.output_sum is not None:
                self.output_sum[expert] += out.sum(0)
            if moments:
                gate, norm = weights[tokens, slots].double(), out.norm(dim=-1)
                for a in range(3):
                    for b in range(3):
                        self.moments[expert, a, b] += (gate**a * norm**b).sum()

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
def _observing(model: PreTrainedModel, outputs: bool, strict: bool) -> Iterator[list[_Observer]]:
    """A patched model in evaluation mode with an observer in every MoE layer; restored on the way out."""
    blocks = moe_blocks(model)
    if any(hasattr(block.experts, "_moe_ext_observer") for block in blocks):
        raise ValueError("the model is being calibrated already")
    was_patched = is_patched(model)
    if not was_patched:
        patch(model, skip=None, strict=strict)
    try:
        observers = [_Observer(block, outputs) for block in blocks]
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
    model: PreTrainedModel | str | os.PathLike[str],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    progress: bool = True,
    dataset: str = "",
    outputs: bool = False,
    strict: bool = True,
    shard: str = "",
    distributed: bool = False,
    **from_folder: Any,
) -> ExpertStatistics:
    """Statistics of a model's experts over text, in one forward pass per batch.

    Args:
        model: a model that :func:`moe_ext.patch` supports. Patched or not, it is left as it was. Or a checkpoint
            folder: its decoder layers are then in memory one at a time, each with all batches before the next, and the
            statistics are those of the loaded model, bit by bit.
        batches: mappings with ``input_ids`` (B, S) and optionally ``attention_mask`` (B, S); tokens whose mask is 0 are
            padding and count in nothing.
        progress: whether to show a progress bar.
        dataset: a label for the text, kept in the statistics.
        outputs: also sum every expert's outputs, for the criterion ``mone``. Slower: the experts run twice, the second
            time one by one in transformers' code.
        strict: as for :func:`moe_ext.patch`, if the model is not patched. With False, layers that the operators cannot
            run are observed through transformers' code, with one warning.
        shard: label of this run, kept in the statistics; files with the same one do not merge.
        distributed: whether the batches are shared among the processes of torch.distributed's default group, every
            N-th whole batch to each, and the sums added up; all of them return the same statistics.
        **from_folder: for a checkpoint folder only; see :class:`moe_ext.sequential.Options`.

    Returns:
        :class:`ExpertStatistics` on the CPU.

    Raises:
        TypeError: an option for folders with a model in memory.
        ValueError: a malformed batch, no counted token, a model that :func:`moe_ext.patch` refuses or that is skipping
            (its routing would bias the statistics), or activations that are not finite (the layer is named).
        MemoryError, OSError: hidden states for which there is no room, or a checkpoint that cannot be read.
    """
    if not isinstance(model, str | os.PathLike):
        if from_folder:
            raise TypeError(f"{next(iter(from_folder))}: is for a checkpoint folder; this model is in memory")
        stats = _start(model, dataset, outputs, shard)
        _run(model, share_of(batches) if distributed else batches, stats, progress, outputs, strict)
    else:
        options = Options(**from_folder)
        listed = list(share_of(batches) if distributed else batches)
        with LayersOnDisk(
            Path(model), dtype=options.dtype, device=options.device, read_ahead=options.read_ahead
        ) as layers:
            stats = _start(layers.model, dataset, outputs, shard)
            _run_layers(layers, listed, stats, options, progress, outputs, strict)
    if distributed:
        add_up(stats)
    if not bool((stats.tokens > 0).all()):
        raise ValueError(
            "no token was counted: 'batches' is empty, every token is padding, "
            "or set_experts_implementation was called on the patched model"
        )
    return stats


def _start(model: PreTrainedModel, dataset: str, outputs: bool, shard: str) -> ExpertStatistics:
    """Statistics of no text, for a model that can be calibrated; ValueError for another."""
    if active_thresholds(model) is not None:
        raise ValueError(
            "the model skips experts, which would bias its statistics; patch(model, skip=None) before calibrating"
        )
    blocks = moe_blocks(model)
    refuse_novices(blocks, "calibrate")
    stats = ExpertStatistics.zeros(
        model_type=model_type_of(model),
        layers=tuple(block.name for block in blocks),
        num_experts=tuple(block.num_experts for block in blocks),
        top_k=blocks[0].top_k,
        gate=family_of(model).gate,
        dataset=dataset,
        groups=blocks[0].groups,
        fewest=blocks[0].fewest_experts,
        hidden_size=text_config(model).hidden_size if outputs else None,
    )
    stats.shards = (shard,) if shard else ()
    return stats


def _run(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    stats: ExpertStatistics,
    progress: bool,
    outputs: bool,
    strict: bool,
) -> None:
    """Fills the statistics of a model in memory."""
    with torch.no_grad(), _observing(model, outputs, strict) as observers:
        for index, batch in enumerate(tqdm(batches, desc="calibrate", unit="batch", disable=not progress)):
            counted = check_batch(index, batch)
            for observer in observers:
                observer.counted = None if counted is None else counted.to(observer.moments.device)
            inputs = {name: tensor.to(input_device(model)) for name, tensor in batch.items()}
            # The decoder without the language model head: statistics need no logits.
            model.base_model(**inputs, use_cache=False)
    digests = [router_digest(block) for block in moe_blocks(model)]
    for layer, observer in enumerate(observers):
        _take(stats, layer, observer)
    stats.model_digest = joined_digest(digests)


def _run_layers(
    layers: LayersOnDisk,
    batches: list[Mapping[str, Tensor]],
    stats: ExpertStatistics,
    options: Options,
    progress: bool,
    outputs: bool,
    strict: bool,
) -> None:
    """Fills the statistics of a model one decoder layer at a time."""
    model = layers.model
    blocks = moe_blocks(model)
    _, _, of_block = decoder_layers(model, blocks)
    counted = [check_batch(index, batch) for index, batch in enumerate(batches)]
    record = Record(layers, batches, stats, options, outputs, show=progress)
    done = len(record.digests) == len(blocks)
    left = range(record.position, record.position if done else of_block[-1] + 1)
    bar = tqdm(total=len(left) * len(batches), desc="calibrate", unit="batch", disable=not progress)
    with (
        bar,
        torch.no_grad(),
        _observing(model, outputs, strict) as observers,
        LayerInputs(model, blocks, batches, states=record.states, need=layers.need, position=record.position) as inputs,
    ):
        for layer in left:
            bar.set_description(f"calibrate layer {layer}")
            index = of_block.index(layer) if layer in of_block else None
            observer = None if index is None or index in record.digests else observers[index]
            if index is not None and observer is None:
                del blocks[index].experts._moe_ext_observer  # its sums are there from before the interruption

            def before(batch: int, observer: _Observer | None = observer) -> None:
                mask = counted[batch]
                if observer is not None:
                    observer.counted = None if mask is None else mask.to(observer.moments.device)
                bar.update()

            inputs.advance(before)
            if observer is not None and index is not None:
                _take(stats, index, observer)
                record.digests[index] = router_digest(blocks[index])
            record.write(layer + 1)
    stats.model_digest = joined_digest([record.digests[index] for index in range(len(blocks))])
    record.finish()


def _take(stats: ExpertStatistics, layer: int, observer: _Observer) -> None:
    """One layer's sums into the statistics; ValueError if they are not finite."""
    count = observer.num_experts
    stats.moments[layer, :count] = observer.moments
    stats.tokens[layer] = observer.tokens
    stats.ratio_histogram[layer] = observer.ratio_histogram
    stats.coactivation[layer, :count, :count] = observer.coactivation
    if stats.output_sum is not None and observer.output_sum is not None:
        stats.output_sum[layer, :count] = observer.output_sum
    if not bool(stats.moments[layer].isfinite().all()):
        raise ValueError(f"layer {stats.layers[layer]} gave activations or routing weights that are not finite")
