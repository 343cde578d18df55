"""Losses of one layer's expert subsets for any router: it routes among the experts of every subset, by its formula
where that is known, otherwise by the family's own code (:mod:`moe_ext.models.sliced_router`); and the experts' products
say what that changes.

With d the difference of two vectors of routing weights, s their difference's sum, n the squared norms of the experts'
outputs and D their squared distances, ``||sum_e d_e f_e||^2 = s sum_e d_e n_e - 1/2 d^T D d``. Weights that sum to one
have s = 0; where outputs are equal D is 0 to the bit, as it is in :func:`moe_ext.ops.subset_errors`. With a gradient
the error is ``(sum_e d_e a_e)^2``.

Cost: the router once a subset over a batch's tokens, and E^2 multiply-adds a token and subset. All in float64 on the
host but the router itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ext.models.blocks import MoeBlock
from moe_ext.models.router_formula import known_router
from moe_ext.models.sliced_router import SlicedRouter
from moe_ext.reconstruction import expert_outputs
from moe_ext.reconstruction.measures import Measure, loss_of_batch
from moe_ext.reconstruction.router_formula import routed_among
from moe_ext.runtime.skipping import skip_weak
from moe_ext.storage.spilled_tensors import SpillingList

MEMORY = 128 << 20
"""Bytes of tokens that a layer keeps in memory to evaluate subsets later; more go to a temporary file."""

DIFFERENCE_BYTES = 32 << 20
"""Bytes of differences of routing weights that exist at a time."""


class RouterCall(NamedTuple):
    """The arguments with which a layer's router was called on a batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Batch(NamedTuple):
    call: RouterCall  # stored tensors as _Stored
    counted: Tensor | None
    parts: list[tuple[int, ...]]  # indices of what is stored of some tokens


class _Stored(NamedTuple):
    place: int
    device: torch.device


class RoutedErrors:
    """One layer's tokens, batch by batch, as :class:`moe_ext.reconstruction.losses.LayerErrors` has them.

    Args:
        block: the layer.
        keep: (S, E) bool, the subsets known beforehand.
        thresholds: (K - 1,) float32 skip thresholds of the pruned layer, or None.
        measure: what the losses measure.
        tokens: tokens of all batches, of all processes.
        store: whether :meth:`losses_of` will be asked.
    """

    def __init__(
        self,
        block: MoeBlock,
        keep: Tensor,
        thresholds: Tensor | None,
        *,
        measure: Measure = "norms",
        tokens: int = 0,
        store: bool,
    ) -> None:
        self.keep, self.thresholds, self.measure, self.tokens = keep, thresholds, measure, tokens
        self.losses = torch.zeros(len(keep), dtype=torch.float64)
        self._block, self._store = block, store
        self._known = known_router(block)
        self._router: SlicedRouter | None = None
        self._stored = SpillingList(MEMORY)
        self._batches: list[_Batch] = []

    def add_batch(
        self, x: Tensor, call: RouterCall, counted: Tensor | None, gradient: Tensor | None, logits: Tensor
    ) -> None:
        """One calibration batch.

        Args:
            x: (T, H), what the experts are given; without the tokens that do not count.
            call: of the router, on all tokens.
            counted: (T',) bool of all tokens, or None.
            gradient: (T, H) for the experts' combined output, for "nats".
            logits: (T, E) that the router returned, without the tokens that do not count.
        """
        if self._known is not None:
            correction = self._known.correction(self._block.router, call.args[1:], call.kwargs)
            # In the place of the call, whose tokens are all of them, what follows from it.
            call, counted = (
                RouterCall((logits.float().cpu(), None if correction is None else correction.cpu()), {}),
                None,
            )
        elif self._router is None:
            self._router = SlicedRouter(self._block)
        parts = [tuple(map(self._append, part)) for part in self._products(x, gradient)]
        args = tuple(map(self._keep_argument, call.args))
        kept = {name: self._keep_argument(value) for name, value in call.kwargs.items()}
        batch = _Batch(RouterCall(args, kept), counted, parts)
        self.losses += loss_of_batch(self.measure, self._errors(batch, self.keep), self.tokens)
        if self._store:
            self._batches.append(batch)
        else:
            self._stored.close()
            self._stored = SpillingList(MEMORY)

    def losses_of(self, keep: Tensor) -> Tensor:
        """(S,) float64 losses of subsets ``keep`` (S, E) bool over the batches so far."""
        assert self._store
        losses = torch.zeros(len(keep), dtype=torch.float64)
        for batch in self._batches:
            losses += loss_of_batch(self.measure, self._errors(batch, keep), self.tokens)
        return losses

    def close(self) -> None:
        """Gives the memory of the tokens back."""
        self._stored.close()

    def _products(self, x: Tensor, gradient: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
        """Of some tokens at a time: projections (T, E), or -1/2 D (T, E, E) and n (T, E)."""
        if gradient is not None:
            yield (expert_outputs.projections_of(self._block, x, gradient),)
            return
        for part in x.split(expert_outputs.tokens_at_a_time(self._block, x.shape[1])):
            gram = expert_outputs.gram_of(self._block, part)
            squares = gram.diagonal(dim1=1, dim2=2).clone()  # (T, E)
            yield gram - (squares[:, :, None] + squares[:, None, :]) / 2, squares

    def _append(self, tensor: Tensor) -> int:
        self._stored.append(tensor.cpu())
        return len(self._stored) - 1

    def _keep_argument(self, value: Any) -> Any:
        """An argument of the router, its tensors where all tokens' are; those of the model stay the model's."""
        if not isinstance(value, Tensor) or (self._router is not None and self._router.is_of_block(value)):
            return value
        return _Stored(self._append(value.detach()), value.device)

    def _argument(self, value: Any) -> Any:
        return self._stored[value.place].to(value.device) if isinstance(value, _Stored) else value

    def _errors(self, batch: _Batch, keep: Tensor) -> Tensor:
        """(S,) sums of the batch's tokens' squared errors."""
        errors = torch.zeros(len(keep), dtype=torch.float64)
        if not batch.parts or len(keep) == 0:
            return errors
        args = tuple(map(self._argument, batch.call.args))
        kwargs = {name: self._argument(value) for name, value in batch.call.kwargs.items()}
        num_experts = keep.shape[1]
        full = self._weights(range(num_experts), args, kwargs, batch.counted, None)  # (T, E)
        step = max(1, DIFFERENCE_BYTES // (8 * max(1, full.numel())))
        for first in range(0, len(keep), step):
            subsets = [row.nonzero().flatten().tolist() for row in keep[first : first + step]]
            routed = [self._weights(kept, args, kwargs, batch.counted, self.thresholds) for kept in subsets]
            difference = torch.stack(routed, dim=1) - full[:, None]  # (T, S, E)
            start = 0
            for part in batch.parts:
                products = [self._stored[index] for index in part]
                end = start + len(products[0])
                errors[first : first + step] += _sums(difference[start:end], products)
                start = end
        return errors

    def _weights(
        self,
        kept: Sequence[int],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        counted: Tensor | None,
        thresholds: Tensor | None,
    ) -> Tensor:
        """(T, E) float64 weights of all experts where the layer has those that are kept only; 0 for the others."""
        num_experts = self._block.num_experts
        if self._known is not None:
            logits, correction = args
            given = (logits, correction, kept, self._block.top_k, thresholds)
            weights, experts = routed_among(self._known.formula, *given)
        else:
            assert self._router is not None
            weights, experts, _ = self._router.route(kept, args, kwargs)
            if thresholds is not None:
                weights, experts = skip_weak(weights, experts, thresholds.to(weights.device), num_experts)
        weights, experts = weights.cpu().double(), experts.cpu()
        if counted is not None:
            weights, experts = weights[counted.cpu()], experts[counted.cpu()]
        dense = torch.zeros(len(weights), num_experts + 1, dtype=torch.float64)
        return dense.scatter_add_(1, experts, weights)[:, :num_experts]


def _sums(difference: Tensor, products: Sequence[Tensor]) -> Tensor:
    """(S,) sums over tokens of squared errors.

    Args:
        difference: (T, S, E) of routing weights.
        products: as :meth:`RoutedErrors._products` makes them.
    """
    if len(products) == 1:
        return (difference @ products[0].unsqueeze(2)).squeeze(2).square().sum(0)
    negative, squares = products
    pairs = ((difference @ negative) * difference).sum((0, 2))
    norms = (difference @ squares.unsqueeze(2)).squeeze(2)  # (T, S)
    return pairs + (difference.sum(2) * norms).sum(0)
