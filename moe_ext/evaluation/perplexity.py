"""Perplexity of a causal language model on texts by domain, over a sliding window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from moe_ext.evaluation.windows import Window, predicted, scored_windows, token_losses
from moe_ext.models.blocks import evaluation_mode
from moe_ext.models.wrapped import unwrapped
from moe_ext.storage.formats import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts the texts; lower is better.

    Attributes:
        per_domain: perplexity of every domain, exp of the mean negative log-likelihood over its scored tokens.
        mean: geometric mean of ``per_domain``, so that every domain weighs the same.
        tokens: scored tokens of every domain.
    """

    per_domain: dict[str, float]
    mean: float
    tokens: dict[str, int]

    @classmethod
    def of(cls, losses: Mapping[str, float], tokens: Mapping[str, int]) -> Perplexity:
        """From every domain's summed negative log-likelihood and scored tokens."""
        mean_loss = {domain: loss / tokens[domain] for domain, loss in losses.items()}
        return cls(
            per_domain={domain: _exp(loss) for domain, loss in mean_loss.items()},
            mean=_exp(sum(mean_loss.values()) / len(mean_loss)),
            tokens=dict(tokens),
        )


def check_finite(model: str, per_domain: Mapping[str, float], what: str = "perplexity") -> None:
    """ValueError, naming model and domain, if a perplexity, or ``what`` else, is infinite or NaN."""
    for domain, value in per_domain.items():
        if not math.isfinite(value):
            raise ValueError(f"{model}: the {what} of {shown(domain)} is {value}: the model does not predict the text")


def perplexity(
    model: PreTrainedModel,
    texts: Mapping[str, str | Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Perplexity:
    """Perplexity by domain, every token after a document's first scored exactly once.

    The first window of a document feeds the model its first ``window`` tokens and scores all their successors. Each
    further window ends ``stride`` tokens later, the last one at the document's end, is again ``window`` tokens long and
    scores only what is new: with at least ``window - stride + 1`` tokens of left context. The log-softmax is float32,
    the sums are float64.

    Args:
        model: a causal language model, compiled or wrapped or not, on any device in any dtype; its training modes are
            as before afterwards.
        texts: domain to text, or to several texts that are separate documents.
        tokenizer: the model's; adds the special tokens that it adds by default, but no second BOS token to a text that
            begins with it.
        window: tokens the model sees at once.
        stride: tokens from one window's end to the next's, 1 to ``window``; ``window // 2`` when not given.
        batch_size: windows a forward pass.
        progress: show a bar on standard error.

    Returns:
        The perplexities; infinite or NaN where the model's logits are.

    Raises:
        ValueError: no texts, a document with fewer than two tokens, a token outside the model's vocabulary, a window
            longer than the model's positions, or a stride or batch size out of range.
    """
    model = unwrapped(model)
    windows = scored_windows(model, texts, tokenizer, window, stride, batch_size)
    losses = {}
    bar = tqdm(total=windows.count(), unit="window", desc="perplexity", disable=not progress)
    with bar, evaluation_mode(model), torch.inference_mode():
        for domain in windows.per_domain:
            losses[domain] = 0.0
            for batch in windows.batches(domain, batch_size):
                losses[domain] += _summed_loss(model, batch)
                bar.update(len(batch))
    return Perplexity.of(losses, windows.tokens())


def _summed_loss(model: PreTrainedModel, batch: list[Window]) -> float:
    """Sum of the negative log-likelihoods of a batch's targets."""
    sums = [
        token_losses(logits, part.targets).double().sum()
        for logits, part in zip(predicted(model, batch), batch, strict=True)
    ]
    return sum(torch.stack(sums).tolist())


def _exp(exponent: float) -> float:
    """e to the exponent; infinite, where math.exp raises, when it is too large."""
    return torch.tensor(exponent, dtype=torch.float64).exp().item()
