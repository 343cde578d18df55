"""What watches a layer's experts during calibration.

An observer is attached to every experts module for the duration of the run. The moments and the pairs come out of the
``experts_observed`` operator; ratios and coactivation are a few small tensor operations on the routing. Where the
operator cannot run, or sums of outputs are asked for, the observer evaluates the family's own code expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext import ops
from moe_ext.calibration.channels import channel_errors, channel_norms, removal_orders
from moe_ext.calibration.routed_inputs import RoutedInputs
from moe_ext.calibration.statistics import RATIO_BINS, ExpertStatistics
from moe_ext.models.blocks import MoeBlock, device_of, tensors_of
from moe_ext.models.boundary import eager_forward, output_width
from moe_ext.runtime.formulas import experts_layer
from moe_ext.runtime.patching import is_patched, layer_state, patched

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SUMS = ("moments", "tokens", "ratio_histogram", "coactivation", "pairs", "channels", "output_sum")


class Observer:
    """Accumulates one layer's statistics on the layer's device; called in place of the ``experts`` operator, or beside
    experts that run on transformers' implementation."""

    def __init__(self, block: MoeBlock, outputs: bool, width: int | None, grams: bool) -> None:
        device = device_of(block.experts, next(iter(tensors_of(block.experts).values())))
        self.block = block
        self.experts = block.experts
        self.num_experts, self.top_k = block.num_experts, block.top_k
        self.moments = torch.zeros(self.num_experts, 3, 3, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.ratio_histogram = torch.zeros(self.top_k - 1, RATIO_BINS, dtype=torch.int64, device=device)
        self.coactivation = torch.zeros(self.num_experts, self.num_experts, dtype=torch.int64, device=device)
        self.pairs = torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64, device=device)
        self.channels = (
            None if width is None else torch.zeros(self.num_experts, width, dtype=torch.float64, device=device)
        )
        self.inputs = RoutedInputs() if grams else None
        self.outputs = outputs
        self.output_sum: Tensor | None = None  # (E, H), from the first batch on if asked for
        self.counted: Tensor | None = None  # (T,) bool for the batch under way
        self.domain: str | None = None  # of the batch under way; the sums above are of it
        self._others: dict[str, dict[str, Tensor | None]] = {}  # sums of the other domains

    def begin(self, domain: str | None, counted: Tensor | None) -> None:
        """What the next batch is of, and which of its tokens count."""
        self.counted = None if counted is None else counted.to(self.moments.device)
        if domain == self.domain:
            return
        sums = {name: getattr(self, name) for name in _SUMS}
        if self.domain is not None:
            self._others[self.domain] = sums
        if self.domain is not None and domain is not None:
            kept = self._others.pop(domain, None)
            sums = kept or {
                name: None if tensor is None or name == "output_sum" else torch.zeros_like(tensor)
                for name, tensor in sums.items()
            }
        self.domain = domain
        for name, tensor in sums.items():
            setattr(self, name, tensor)

    def sums(self) -> dict[str, Tensor]:
        """All sums so far by their names, those of a domain before ``" of "`` and the domain's name; themselves."""
        present = {name: getattr(self, name) for name in _SUMS}
        return {
            name if domain is None else f"{name} of {domain}": tensor
            for domain, sums in [*self._others.items(), (self.domain, present)]
            for name, tensor in sums.items()
            if tensor is not None
        }

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Goes on from what :meth:`sums` gave."""
        device = self.moments.device
        for name, tensor in sums.items():
            field, of, domain = name.partition(" of ")
            self.begin(domain if of else None, None)
            setattr(self, field, tensor.to(device))

    @property
    def domains(self) -> list[str]:
        """Of all batches so far, by name."""
        return sorted([*self._others, *([] if self.domain is None else [self.domain])])

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
        experts = self._chosen(x, experts, weights)
        observed = (self.moments, self.counted, self.channels, self.pairs)
        out = ops.experts_observed(x, gate_up, down, experts, weights, activation, *observed, **options)
        if self.inputs is not None:
            self.inputs.add(x, experts, weights, self.counted)
        if self.outputs:
            self._evaluate(x, experts, weights, moments=False)
        self._count(experts.long(), weights.float())
        return out

    def observe(self, x: Tensor, experts: Tensor, weights: Tensor) -> None:
        """The same statistics without the operator: x (T, H), experts (T, K), weights (T, K)."""
        experts = self._chosen(x, experts, weights)
        self._evaluate(x, experts, weights, moments=True)
        self._count(experts.long(), weights.float())

    def _chosen(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The experts (T, K) that count: E where a weight is 0, which some routers give to a choice of no expert.

        Raises:
            ValueError: the router chooses another number of experts than its module says, or the tokens are not those
                of the whole batch, of which it is known which are padding.
        """
        if experts.shape[1] != self.top_k:
            raise ValueError(f"{self.block.name} gives a token {experts.shape[1]} experts; expected {self.top_k}")
        if self.counted is not None and len(self.counted) != len(x):
            if bool(self.counted.all()):
                self.counted = None
                return self._chosen(x, experts, weights)
            raise ValueError(
                f"{self.block.name} has {len(x)} of a batch's {len(self.counted)} tokens, and which of them are "
                "padding is not known: give this model batches without padding"
            )
        return experts.masked_fill(weights == 0, self.num_experts)

    def _evaluate(self, x: Tensor, experts: Tensor, weights: Tensor, *, moments: bool) -> None:
        """Adds the counted slots' outputs to their sums, and norms to moments and pairs, with the model's own code.

        One expert after the other, each on its own rows with weight 1: exact for whatever that code computes. Slower
        than the operator, and it waits for a GPU.
        """
        if self.outputs and self.output_sum is None:
            self.output_sum = torch.zeros(
                self.num_experts, output_width(self.experts), dtype=torch.float64, device=x.device
            )
        counted = torch.ones_like(experts, dtype=torch.bool) if self.counted is None else self.counted[:, None]
        shares = torch.zeros(x.shape[0], self.num_experts, dtype=torch.float64, device=x.device)  # g ||f||
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
                shares[tokens, expert] = gate * norm
        if moments:
            self.pairs += shares.T @ shares

    def _count(self, experts: Tensor, weights: Tensor) -> None:
        """experts, weights: (T, K). Sizes depend on shapes only, so that a GPU is not waited for."""
        ones = torch.ones(experts.shape[0], dtype=torch.int64, device=experts.device)
        counted = ones if self.counted is None else self.counted.long()  # (T,) 1 for tokens that count
        self.tokens += counted.sum()
        ranked = weights.abs().sort(dim=-1, descending=True).values
        ratios = (ranked[:, 1:] / ranked[:, :1]).nan_to_num(0.0)  # a NaN is reported once the moments are read
        bins = (ratios * RATIO_BINS).long().clamp(0, RATIO_BINS - 1)  # (T, K - 1)
        ranks = torch.arange(self.top_k - 1, device=bins.device) * RATIO_BINS
        _add_counts(self.ratio_histogram, bins + ranks, counted[:, None] * (ranked[:, 1:] != 0))
        chosen = experts < self.num_experts  # (T, K)
        experts = experts.where(chosen, 0)
        pairs = experts.unsqueeze(2) * self.num_experts + experts.unsqueeze(1)  # (T, K, K)
        _add_counts(self.coactivation, pairs, counted[:, None, None] * (chosen.unsqueeze(2) & chosen.unsqueeze(1)))


def _add_counts(histogram: Tensor, bins: Tensor, counts: Tensor) -> None:
    """histogram[bin] += count for every element of bins, in place; counts broadcast to the shape of bins."""
    histogram.view(-1).scatter_add_(0, bins.flatten(), counts.expand_as(bins).flatten())


@contextmanager
def observing(
    model: PreTrainedModel, blocks: list[MoeBlock], outputs: bool, strict: bool, width: int | None, grams: bool
) -> Iterator[list[Observer]]:
    """A patched model in evaluation mode with an observer in every MoE layer; restored on the way out.

    Args:
        width: I, to observe channels, too.
        grams: whether to keep the experts' inputs until :func:`take` has made their Gram matrices.
    """
    if is_patched(model) and any(layer_state(block).observer is not None for block in blocks):
        raise ValueError("the model is being calibrated already")
    with patched(model, blocks, strict=strict):
        states = [layer_state(block) for block in blocks]
        try:
            observers = [Observer(block, outputs, width, grams) for block in blocks]
            for state, observer in zip(states, observers, strict=True):
                state.observer = observer
            yield observers
        finally:
            for state in states:
                if state.observer is not None and state.observer.inputs is not None:
                    state.observer.inputs.close()
                state.observer = None


def take(
    stats: ExpertStatistics, layer: int, observer: Observer, total: Callable[[Tensor], Tensor] = lambda mine: mine
) -> None:
    """One layer's sums into the statistics, those of domains into theirs; ValueError if they are not finite.

    Args:
        total: adds Gram matrices up over the processes.
    """
    if observer.domains or stats.domains:
        for domain in observer.domains:
            observer.begin(domain, None)
            _take_sums(stats.of_domain(domain), layer, observer)
        stats.add_up_domains(layer)
        if stats.channel_norms is not None:
            stats.channel_norms[layer, : observer.num_experts] = channel_norms(experts_layer(observer.experts))
    else:
        _take_sums(stats, layer, observer)
    if stats.channel_order is not None and observer.inputs is not None:
        orders = removal_orders(observer.block, observer.inputs, total)
        stats.channel_order[layer, : observer.num_experts] = orders
        observer.inputs.close()


def _take_sums(stats: ExpertStatistics, layer: int, observer: Observer) -> None:
    count = observer.num_experts
    stats.moments[layer, :count] = observer.moments
    stats.tokens[layer] = observer.tokens
    stats.ratio_histogram[layer, : observer.top_k - 1] = observer.ratio_histogram
    stats.coactivation[layer, :count, :count] = observer.coactivation
    if stats.output_pairs is not None:
        stats.output_pairs[layer, :count, :count] = observer.pairs
    if stats.output_sum is not None and observer.output_sum is not None:
        stats.output_sum[layer, :count] = observer.output_sum
    if stats.channel_errors is not None and stats.channel_norms is not None and observer.channels is not None:
        stats.channel_errors[layer, :count] = channel_errors(observer.channels, experts_layer(observer.experts))
        stats.channel_norms[layer, :count] = channel_norms(experts_layer(observer.experts))
    finite = stats.channel_errors is None or bool(stats.channel_errors[layer].isfinite().all())
    if not finite or not bool(stats.moments[layer].isfinite().all()):
        raise ValueError(f"layer {stats.layers[layer]} gave activations or routing weights that are not finite")
