"""Losses of one layer's expert subsets: reconstruction losses (arXiv 2402.14800, section 3.2) from Gram matrices, or
what the model's own loss is predicted to rise by, from projections on its gradient.

The loss of keeping subset R is a sum of ``||F(x) - F_R(x)||`` (:mod:`moe_ext.reconstruction.measures`). One pass of all
experts over all tokens gives every token's Gram matrix; of it the pairs of those N experts are kept that the token can
come to use: its N = K + (experts dropped at most) highest ranks. All subsets are then work on these, in float64, on the
host.

With a gradient g for a token's output, the loss is ``(sum_e d_e a_e)^2`` for the difference d of two weight vectors and
``a_e = <g, f_e(x)>``: N numbers a token, where Gram matrices have N^2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ext import ops
from moe_ext.models.blocks import MoeBlock
from moe_ext.models.router_formula import RouterFormula
from moe_ext.reconstruction import expert_outputs
from moe_ext.reconstruction.measures import Measure, loss_of_batch
from moe_ext.reconstruction.router_formula import ranked_scores
from moe_ext.storage.spilled_tensors import SpillingList

MEMORY = 128 << 20
"""Bytes of tokens that a layer keeps in memory to evaluate subsets later; more go to a temporary file."""


class Ranked(NamedTuple):
    """What :func:`moe_ext.ops.subset_errors` or :func:`moe_ext.ops.projected_errors` needs of some tokens; shapes and
    dtypes are there.

    Attributes:
        outputs: ``distances`` or ``projections``.
    """

    outputs: Tensor
    ranks: Tensor
    scores: Tensor


def ranked(
    block: MoeBlock,
    x: Tensor,
    logits: Tensor,
    depth: int,
    formula: RouterFormula | None = None,
    correction: Tensor | None = None,
) -> Iterator[Ranked]:
    """Runs all experts over all tokens, some tokens at a time.

    Args:
        block: the layer, of a patched model.
        x: (T, H), its experts' input.
        logits: (T, E), its router's output.
        depth: N, ranks that are kept of a token.
        formula, correction: of the router, as for :func:`ranked_scores`.
    """
    num_experts = logits.shape[1]
    first, second = torch.triu_indices(depth, depth, offset=1, device=x.device)  # (M,) each
    step = expert_outputs.tokens_at_a_time(block, x.shape[1])
    for part, part_logits in zip(x.split(step), logits.split(step), strict=True):
        gram = expert_outputs.gram_of(block, part)  # (T, E, E)
        scores, ranks = ranked_scores(part_logits, depth, formula, correction)
        squares = gram.diagonal(dim1=1, dim2=2).gather(1, ranks)  # (T, N)
        products = gram.flatten(1).gather(1, ranks[:, first] * num_experts + ranks[:, second])  # (T, M)
        distances = squares[:, first] + squares[:, second] - 2 * products
        yield Ranked(distances.cpu(), ranks.cpu(), scores.cpu())


def projected(
    block: MoeBlock,
    x: Tensor,
    logits: Tensor,
    gradient: Tensor,
    depth: int,
    formula: RouterFormula | None = None,
    correction: Tensor | None = None,
) -> Iterator[Ranked]:
    """As :func:`ranked`, with what the experts' outputs are along the gradient (T, H) for the layer's output."""
    projections = expert_outputs.projections_of(block, x, gradient)  # (T, E)
    scores, ranks = ranked_scores(logits, depth, formula, correction)
    yield Ranked(projections.gather(1, ranks).cpu(), ranks.cpu(), scores.cpu())


class LayerErrors:
    """One layer's tokens, batch by batch: losses of subsets known beforehand are summed at once and nothing is kept for
    them; for subsets that come up later, the tokens are kept.

    Args:
        keep: (S, E) bool, the subsets known beforehand.
        top_k: K.
        thresholds: (K - 1,) float32 skip thresholds of the pruned layer, or None.
        scale: of all routing weights.
        measure: what the losses measure; "nats": of parts from :func:`projected`, the others from :func:`ranked`.
        tokens: tokens of all batches, of all processes.
        store: whether :meth:`losses_of` will be asked.
    """

    def __init__(
        self,
        keep: Tensor,
        top_k: int,
        thresholds: Tensor | None,
        *,
        scale: float = 1.0,
        measure: Measure = "norms",
        tokens: int = 0,
        store: bool,
    ) -> None:
        self.keep, self.top_k, self.thresholds, self._scale = keep, top_k, thresholds, scale
        self.measure, self.tokens = measure, tokens
        self.losses = torch.zeros(len(keep), dtype=torch.float64)
        self._stored = SpillingList(MEMORY) if store else None
        self._parts_of_batch: list[int] = []

    def add_batch(self, parts: Iterator[Ranked]) -> None:
        """One calibration batch, in any number of parts."""
        errors, count = torch.zeros_like(self.losses), 0
        for part in parts:
            count += 1
            errors += self._errors(part, self.keep)
            if self._stored is not None:
                for tensor in part:
                    self._stored.append(tensor)
        self.losses += loss_of_batch(self.measure, errors, self.tokens)
        self._parts_of_batch.append(count)

    def losses_of(self, keep: Tensor) -> Tensor:
        """(S,) float64 losses of subsets ``keep`` (S, E) bool over the batches so far."""
        assert self._stored is not None
        losses, index = torch.zeros(len(keep), dtype=torch.float64), 0
        for parts in self._parts_of_batch:
            errors = torch.zeros_like(losses)
            for _ in range(parts):
                errors += self._errors(Ranked(*(self._stored[index + i] for i in range(3))), keep)
                index += 3
            losses += loss_of_batch(self.measure, errors, self.tokens)
        return losses

    def close(self) -> None:
        """Gives the memory of the tokens back."""
        if self._stored is not None:
            self._stored.close()

    def _errors(self, part: Ranked, keep: Tensor) -> Tensor:
        errors = ops.projected_errors if self.measure == "nats" else ops.subset_errors
        return errors(*part, keep, self.top_k, self.thresholds) * self._scale**2
