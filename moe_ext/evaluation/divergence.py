"""How far a model's next-token distributions are from those of a reference model, on the same tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_ext.evaluation.perplexity import Perplexity
from moe_ext.evaluation.predictions import Predicted, StoredPredictions, live_predictions, predicted_tokens
from moe_ext.evaluation.windows import Window, pieces, scored_windows
from moe_ext.models.blocks import evaluation_mode
from moe_ext.models.wrapped import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Divergence:
    """What tells a model from its reference.

    Attributes:
        kl: of every domain, the mean over its scored tokens of KL(reference || model), in nats a token; 0 for equal
            models.
        mean_kl: mean of ``kl`` over the domains, so that every domain weighs the same.
        top1: of every domain, the share of its scored tokens for which both find the same token likeliest; of tokens
            that are equally likely the first counts.
        mean_top1: mean of ``top1`` over the domains.
        perplexity: of the model: what :func:`moe_ext.perplexity` gives.
        reference_perplexity: of the reference.
        reference_parameters: number of the reference's parameters.
    """

    kl: dict[str, float]
    mean_kl: float
    top1: dict[str, float]
    mean_top1: float
    perplexity: Perplexity
    reference_perplexity: Perplexity
    reference_parameters: int


def divergence(
    model: PreTrainedModel,
    reference: PreTrainedModel | str | os.PathLike[str],
    texts: Mapping[str, str | Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Divergence:
    """KL divergence from a reference, agreement with it, and both perplexities, in one pass over the texts.

    Perplexity alone can rank a model that is broken above the one it was made of (arXiv 2607.16721); these two cannot.
    Both models run on the same windows, as :func:`moe_ext.perplexity` cuts them, every token after a document's first
    counted once. Log-softmax and sums are float64.

    Args:
        model, texts, tokenizer, window, stride, batch_size, progress: as for :func:`moe_ext.perplexity`.
        reference: another model with the same vocabulary, on any device in any dtype; or a file that
            :func:`moe_ext.save_predictions` wrote of the same texts, window and stride, which may hold further domains.

    Returns:
        The divergences; infinite or NaN where the logits make them so.

    Raises:
        ValueError: vocabularies that differ, or as for :func:`moe_ext.perplexity`, of either model.
        PredictionsFileError: the file is none, or of other text, tokens, window or stride.
        OSError: it cannot be read.
    """
    model = unwrapped(model)
    windows = scored_windows(model, texts, tokenizer, window, stride, batch_size)
    stored: StoredPredictions | None = None
    if isinstance(reference, str | os.PathLike):
        stored = StoredPredictions(reference)
        vocabulary, parameters = stored.vocabulary, stored.parameters
    else:
        reference = unwrapped(reference)
        scored_windows(reference, texts, tokenizer, window, stride, batch_size)  # it takes them, too
        vocabulary, parameters = predicted_tokens(reference), reference.num_parameters()
    if vocabulary != predicted_tokens(model):
        raise ValueError(
            f"reference: predicts {vocabulary} tokens, the model {predicted_tokens(model)}; expected one vocabulary"
        )
    if stored is not None:
        stored.check(windows)

    def referred(domain: str, first: int, batch: list[Window]) -> Iterator[Predicted]:
        if stored is not None:
            return stored.predictions(domain, first, batch)
        assert not isinstance(reference, str | os.PathLike)
        return live_predictions(reference, batch)

    tokens = windows.tokens()
    sums = {domain: torch.zeros(4, dtype=torch.float64) for domain in tokens}
    bar = tqdm(total=windows.count(), unit="window", desc="divergence", disable=not progress)
    with ExitStack() as stack:
        stack.enter_context(bar)
        stack.enter_context(torch.inference_mode())
        stack.enter_context(evaluation_mode(model))
        if not isinstance(reference, str | os.PathLike):
            stack.enter_context(evaluation_mode(reference))
        for domain in tokens:
            first = 0
            for batch in windows.batches(domain, batch_size):
                both = zip(live_predictions(model, batch), referred(domain, first, batch), strict=True)
                sums[domain] += sum((_sums(*pair).cpu() for pair in both), torch.zeros(4, dtype=torch.float64))
                first += sum(len(part.targets) for part in batch)
                bar.update(len(batch))
    kl = {domain: float(row[0]) / tokens[domain] for domain, row in sums.items()}
    top1 = {domain: float(row[1]) / tokens[domain] for domain, row in sums.items()}
    return Divergence(
        kl=kl,
        mean_kl=sum(kl.values()) / len(kl),
        top1=top1,
        mean_top1=sum(top1.values()) / len(top1),
        perplexity=Perplexity.of({domain: float(row[2]) for domain, row in sums.items()}, tokens),
        reference_perplexity=Perplexity.of({domain: float(row[3]) for domain, row in sums.items()}, tokens),
        reference_parameters=parameters,
    )


def _sums(ours: Predicted, theirs: Predicted) -> Tensor:
    """(4,) float64 of a window: KL divergence, agreements, and the losses of the model and of the reference."""
    device = ours.logits.device
    kl = torch.zeros((), dtype=torch.float64, device=device)
    for rows in pieces(ours.logits):
        kl += _kl(theirs.logits[rows].to(device).double(), ours.logits[rows].double())
    agree = (ours.top == theirs.top.to(device)).sum().double()
    return torch.stack([kl, agree, ours.losses.double().sum(), theirs.losses.to(device).double().sum()])


def _kl(reference: Tensor, model: Tensor) -> Tensor:
    """Sum over rows of KL(reference || model), from logits (n, V) in float64."""
    expected, found = reference.log_softmax(-1), model.log_softmax(-1)
    terms = expected.exp() * (expected - found)
    return terms.masked_fill(expected == float("-inf"), 0.0).sum()  # what is never expected adds nothing
