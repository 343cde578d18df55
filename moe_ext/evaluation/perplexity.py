"""Perplexity of a causal language model on texts by domain, over a sliding window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from moe_ext.models.blocks import evaluation_mode, input_device
from moe_ext.models.wrapped import unwrapped
from moe_ext.runtime.batches import check_tokens, token_ids, vocabulary_of
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


def check_finite(model: str, per_domain: Mapping[str, float]) -> None:
    """ValueError, naming model and domain, if a perplexity is infinite or NaN."""
    for domain, value in per_domain.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{model}: the perplexity of {shown(domain)} is {value}: the model does not predict the text"
            )


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
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window < 1 or (limit is not None and window > limit):
        raise ValueError(f"window: expected 1 to max_position_embeddings = {limit} tokens, got {window}")
    if stride is None:
        stride = max(1, window // 2)
    if not 1 <= stride <= window:
        raise ValueError(f"stride: expected 1 to window = {window}, got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    # Everything is tokenised before the model runs: a bad document in the last domain costs no forward pass.
    windows = {
        domain: [part for tokens in documents for part in _windows(tokens, window, stride)]
        for domain, documents in _tokenise(texts, tokenizer, vocabulary_of(model)).items()
    }
    mean_loss, tokens = {}, {}
    bar = tqdm(total=sum(map(len, windows.values())), unit="window", desc="perplexity", disable=not progress)
    with bar, evaluation_mode(model), torch.inference_mode():
        for domain, parts in windows.items():
            # Longest first, so that a batch pads little.
            parts.sort(key=lambda part: len(part.inputs), reverse=True)
            loss = 0.0
            for start in range(0, len(parts), batch_size):
                batch = parts[start : start + batch_size]
                loss += _summed_loss(model, batch)
                bar.update(len(batch))
            tokens[domain] = sum(len(part.targets) for part in parts)
            mean_loss[domain] = loss / tokens[domain]
    return Perplexity(
        per_domain={domain: _exp(loss) for domain, loss in mean_loss.items()},
        mean=_exp(sum(mean_loss.values()) / len(mean_loss)),
        tokens=tokens,
    )


@dataclass(frozen=True)
class _Window:
    """Inputs (n,) and targets (m,) with m <= n, int64: target i is the successor of input ``n - m + i``."""

    inputs: torch.Tensor
    targets: torch.Tensor


def _windows(tokens: list[int], window: int, stride: int) -> Iterator[_Window]:
    inputs, successors = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
    scored, end = 0, min(window, len(inputs))
    while scored < len(inputs):
        yield _Window(inputs[max(0, end - window) : end], successors[scored:end])
        scored, end = end, min(end + stride, len(inputs))


def _tokenise(
    texts: Mapping[str, str | Sequence[str]], tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> dict[str, list[list[int]]]:
    """Token ids of every document of every domain."""
    if not texts:
        raise ValueError("texts: expected one or more domains, got none")
    tokenised = {}
    for domain, documents in texts.items():
        documents = [documents] if isinstance(documents, str) else documents
        if not documents:
            raise ValueError(f"texts: domain {domain!r} has no documents")
        tokenised[domain] = [token_ids(document, tokenizer) for document in documents]
        for index, tokens in enumerate(tokenised[domain]):
            if len(tokens) < 2:
                raise ValueError(f"texts: {domain!r}, document {index}: expected 2 or more tokens, got {len(tokens)}")
            check_tokens(f"tokenizer: texts {domain!r}, document {index}", torch.tensor(tokens), vocabulary)
    return tokenised


def _summed_loss(model: PreTrainedModel, batch: list[_Window]) -> float:
    """Sum of the negative log-likelihoods of a batch's targets."""
    inputs = pad_sequence([part.inputs for part in batch], batch_first=True)  # with 0
    mask = pad_sequence([torch.ones_like(part.inputs) for part in batch], batch_first=True)
    device = input_device(model)
    logits = model(input_ids=inputs.to(device), attention_mask=mask.to(device), use_cache=False).logits
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row, part in zip(logits, batch, strict=True):
        # (m, vocabulary): a row at a time, because the float32 copy of a whole batch's logits is large.
        predictions = row[len(part.inputs) - len(part.targets) : len(part.inputs)].float()
        total += cross_entropy(predictions, part.targets.to(logits.device), reduction="none").double().sum()
    return total.item()


def _exp(exponent: float) -> float:
    """e to the exponent; infinite, where math.exp raises, when it is too large."""
    return torch.tensor(exponent, dtype=torch.float64).exp().item()
