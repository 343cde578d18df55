"""Least squares for down projections: kept channels take over from removed ones, kept experts from removed ones.

Both are ridge regressions towards the weights as they are, on features ``g h`` (routing weight times activations) of
the calibration tokens. They are solved in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ext.calibration.removal_order import damped
from moe_ext.calibration.routed_inputs import ROWS, RoutedInputs
from moe_ext.runtime.formulas import ExpertsLayer
from moe_ext.storage.spilled_tensors import SpillingList

CHANNEL_DAMPING = 0.01
"""Strength of the ridge where channels take over from channels of the same expert."""

EXPERT_DAMPING = 0.1
"""Strength of the ridge where experts take over from other experts."""

MOST_JOINT = 16_384
"""Channels of all kept experts up to which they are fitted together: their Gram matrix takes 2 GB."""

SWEEPS = 2
"""Times that every expert is fitted, the others as they are, where they are not fitted together."""

FITTED_BY = 10
"""Calibration tokens for every channel that is fitted to the layer's output, below which the ridge gets stronger."""


def refitted_down(gram: Tensor, down: Tensor, kept: Tensor, *, damping: float = CHANNEL_DAMPING) -> Tensor:
    """The columns of a down projection that come nearest to its outputs with some channels gone.

    ``D_S + (A_SS + damping * mean(diag A) * 1)^-1 A_SR D_R`` with ``D = down^T``, S the kept and R the removed ones:
    least squares over the tokens that A was summed over, ridge towards the columns as they were.

    Args:
        gram: (I, I), ``A = sum g^2 h h^T``.
        down: (H, I), any floating dtype.
        kept: (I') int64, distinct channels.
        damping: strength of the ridge, as a share of the mean diagonal.

    Returns:
        (H, I') in the dtype of ``down``, on its device; computed in float64.

    Raises:
        ValueError: ``gram`` as for :func:`moe_ext.calibration.removal_order.damped`.
    """
    kept = kept.to(gram.device)
    removed = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    removed[kept] = False
    weights = down.T.to(gram.device, torch.float64)
    factor = torch.linalg.cholesky(damped(gram, damping)[kept][:, kept])
    missing = gram.double()[kept][:, removed] @ weights[removed]
    fitted = weights[kept] + torch.cholesky_solve(missing, factor)
    return fitted.T.to(down.device, down.dtype).contiguous()


def ridge_for(tokens: Tensor, channels: int, enough: float) -> Tensor:
    """What the strength of a ridge is multiplied by: 1 where there are ``enough`` tokens for every channel that is
    fitted, and more the fewer there are.

    Args:
        tokens: (E,), of every expert.
    """
    return (enough * channels / tokens.double().clamp(min=1)).clamp(min=1)


class OutputFit:
    """Fits a layer's down projections to what its experts should give together.

    Args:
        inputs: of the kept experts, over all batches.
        wanted: for every batch (T, H) float32, what they should give for its counted tokens; changed.
        layer: the experts as they are. Biases of their outputs stay; the rest of ``wanted`` is fitted.
    """

    def __init__(self, inputs: RoutedInputs, wanted: SpillingList, layer: ExpertsLayer) -> None:
        self.inputs, self.wanted, self.layer = inputs, wanted, layer
        self.device, self.dtype = layer.down.device, layer.down.dtype
        down = layer.down.detach()
        self.down = (down if layer.formula.transposed else down.transpose(1, 2)).double()  # (E, I, H)
        self.channels = self.down.shape[1]
        self.tokens = torch.zeros(len(down), dtype=torch.int64)
        if layer.down_bias is not None:
            self._subtract_biases(layer.down_bias.detach().float().cpu())

    def fit(self, damping: float = EXPERT_DAMPING, most_joint: int = MOST_JOINT) -> Tensor:
        """As the layer's down projections are, in their dtype.

        Raises:
            ValueError: sums that are not finite.
        """
        experts, channels, _ = self.down.shape
        for batch in range(len(self.inputs)):
            routed = self.inputs.batch(batch, torch.device("cpu"))[1]
            self.tokens += torch.bincount(routed[routed < experts].flatten(), minlength=experts)
        ridge = (damping * ridge_for(self.tokens, channels, FITTED_BY)).to(self.device)
        if experts * channels <= most_joint:
            self._together(ridge)
        else:
            self._subtract(range(experts))
            for _ in range(SWEEPS):
                for expert in range(experts):
                    self._alone(expert, float(ridge[expert]))
        down = self.down if self.layer.formula.transposed else self.down.transpose(1, 2)
        return down.to(self.dtype).contiguous()

    def _together(self, ridge: Tensor) -> None:
        experts, channels, outputs = self.down.shape
        size = experts * channels
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        products = torch.zeros(size, outputs, dtype=torch.float64, device=self.device)
        down = self.down.flatten(0, 1).float()
        for batch in range(len(self.inputs)):
            x, routed, weights = self.inputs.batch(batch, self.device)
            wanted = self.wanted[batch].to(self.device)
            for first in range(0, len(x), ROWS):
                part = slice(first, first + ROWS)
                features = torch.zeros(len(x[part]), experts, channels, device=self.device)
                rows_of = []
                for expert in range(experts):
                    rows, slots = (routed[part] == expert).nonzero(as_tuple=True)
                    h = self.layer.hidden(expert, x[part][rows])
                    features[rows, expert] = weights[part][rows, slots][:, None] * h
                    rows_of.append(rows)
                flat = features.flatten(1)
                missing = wanted[part] - flat @ down
                for expert, rows in enumerate(rows_of):
                    place = slice(expert * channels, (expert + 1) * channels)
                    gram[place] += features[rows, expert].T @ flat[rows]
                    products[place] += features[rows, expert].T @ missing[rows]
        self._check(gram, products)
        mean = gram.diagonal().mean()
        if mean > 0:
            gram.diagonal().add_(ridge.repeat_interleave(channels) * mean)
            fitted = torch.cholesky_solve(products, torch.linalg.cholesky(gram))
            self.down += fitted.view_as(self.down)

    def _alone(self, expert: int, ridge: float) -> None:
        """Fits one expert to what the others leave of ``wanted``, which becomes what it leaves."""
        _, channels, outputs = self.down.shape
        gram = torch.zeros(channels, channels, dtype=torch.float64, device=self.device)
        products = torch.zeros(channels, outputs, dtype=torch.float64, device=self.device)
        for batch in range(len(self.inputs)):
            for h, rows in self._features(batch, expert):
                gram += h.T @ h
                products += h.T @ self.wanted[batch][rows].to(self.device)
        self._check(gram, products)
        mean = gram.diagonal().mean()
        if mean > 0:
            gram.diagonal().add_(ridge * mean)
            change = torch.cholesky_solve(products, torch.linalg.cholesky(gram))
            self.down[expert] += change
            self._subtract([expert], change.float())

    def _subtract(self, experts: range | list[int], down: Tensor | None = None) -> None:
        """Takes what experts give with ``down`` (I, H), or their own, from what is wanted."""
        for batch in range(len(self.inputs)):
            wanted = self.wanted[batch]
            for expert in experts:
                for h, rows in self._features(batch, expert):
                    wanted[rows] -= (h @ (self.down[expert].float() if down is None else down)).cpu()
            self.wanted[batch] = wanted

    def _subtract_biases(self, biases: Tensor) -> None:
        """Takes what the biases (E, H) give from what is wanted; a slot without expert gives nothing."""
        biases = torch.cat((biases, torch.zeros_like(biases[:1])))
        for batch in range(len(self.inputs)):
            _, routed, weights = self.inputs.batch(batch, torch.device("cpu"))
            self.wanted[batch] = self.wanted[batch] - torch.einsum("tk,tkh->th", weights, biases[routed])

    def _features(self, batch: int, expert: int) -> list[tuple[Tensor, Tensor]]:
        """``g h`` (R, I) of an expert's tokens in a batch, and their rows on the CPU, some at a time."""
        x, routed, weights = self.inputs.batch(batch, torch.device("cpu"))
        found = []
        rows, slots = (routed == expert).nonzero(as_tuple=True)
        for part, place in zip(rows.split(ROWS), slots.split(ROWS), strict=True):
            h = self.layer.hidden(expert, x[part].to(self.device))
            found.append((weights[part, place].to(self.device)[:, None] * h, part))
        return found

    def _check(self, gram: Tensor, products: Tensor) -> None:
        if not bool(gram.isfinite().all()) or not bool(products.isfinite().all()):
            raise ValueError("the experts' activations or the layer's outputs are not finite")
