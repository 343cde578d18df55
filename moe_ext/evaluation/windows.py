"""The windows in which a model reads texts, every token after a document's first scored exactly once, and what it
predicts in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from moe_ext.data.tokens import token_ids
from moe_ext.models.blocks import input_device
from moe_ext.runtime.batches import check_tokens, vocabulary_of
from moe_ext.storage.digests import tensor_bytes
from moe_ext.storage.formats import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PIECE = 1 << 22
"""Logits that are copied in higher precision at once: a long window's in a large vocabulary take gigabytes."""


@dataclass(frozen=True)
class Window:
    """Inputs (n,) and targets (m,) with m <= n, int64: target i is the successor of input ``n - m + i``."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Windows:
    """What is scored of every domain.

    Attributes:
        per_domain: windows, the longest first, so that a batch of neighbours pads little.
        window, stride: of which they are.
    """

    per_domain: dict[str, list[Window]]
    window: int
    stride: int

    def tokens(self) -> dict[str, int]:
        """Scored tokens of every domain."""
        return {domain: sum(len(part.targets) for part in parts) for domain, parts in self.per_domain.items()}

    def count(self) -> int:
        """Windows of all domains."""
        return sum(map(len, self.per_domain.values()))

    def batches(self, domain: str, size: int) -> Iterator[list[Window]]:
        """A domain's windows, so many at a time."""
        parts = self.per_domain[domain]
        for start in range(0, len(parts), size):
            yield parts[start : start + size]

    def digest(self, domain: str) -> str:
        """Of a domain's tokens and the contexts in which they are scored."""
        digest = hashlib.sha256()
        for part in self.per_domain[domain]:
            digest.update(f"{len(part.inputs)} {len(part.targets)} ".encode())
            digest.update(tensor_bytes(part.inputs) + tensor_bytes(part.targets))
        return digest.hexdigest()


def scored_windows(
    model: PreTrainedModel,
    texts: Mapping[str, str | Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    stride: int | None,
    batch_size: int,
) -> Windows:
    """The windows of texts; arguments and errors as :func:`moe_ext.perplexity`.

    The first window of a document feeds the model its first ``window`` tokens and scores all their successors. Each
    further window ends ``stride`` tokens later, the last one at the document's end, is again ``window`` tokens long and
    scores only what is new.
    """
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
    found = {
        domain: [part for tokens in documents for part in _windows(tokens, window, stride)]
        for domain, documents in _tokenise(texts, tokenizer, vocabulary_of(model)).items()
    }
    for parts in found.values():
        parts.sort(key=lambda part: len(part.inputs), reverse=True)
    return Windows(found, window, stride)


def _windows(tokens: list[int], window: int, stride: int) -> Iterator[Window]:
    inputs, successors = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
    scored, end = 0, min(window, len(inputs))
    while scored < len(inputs):
        yield Window(inputs[max(0, end - window) : end], successors[scored:end])
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


def check_same_tokens(texts: Mapping[str, str | Sequence[str]], tokenizer: Any, reference: Any) -> None:
    """ValueError, naming the domain, unless both tokenizers cut the texts into the same tokens."""
    for domain, given in texts.items():
        documents = [given] if isinstance(given, str) else given
        if any(token_ids(text, tokenizer) != token_ids(text, reference) for text in documents):
            raise ValueError(f"reference: its tokenizer gives other tokens of {shown(domain)} than the model's")


def predicted(model: PreTrainedModel, batch: list[Window]) -> Iterator[Tensor]:
    """Runs a model on a batch of windows; of each the logits (m, V) before its m targets, in the model's dtype."""
    inputs = pad_sequence([part.inputs for part in batch], batch_first=True)  # with 0
    mask = pad_sequence([torch.ones_like(part.inputs) for part in batch], batch_first=True)
    device = input_device(model)
    logits = model(input_ids=inputs.to(device), attention_mask=mask.to(device), use_cache=False).logits
    for row, part in zip(logits, batch, strict=True):
        yield row[len(part.inputs) - len(part.targets) : len(part.inputs)]


def pieces(logits: Tensor) -> Iterator[slice]:
    """Rows of logits (m, V), at most ``PIECE`` numbers at a time."""
    step = max(1, PIECE // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(m,) float32 negative log-likelihoods of targets (m,) under logits (m, V); the log-softmax is float32."""
    targets = targets.to(logits.device)
    losses = [cross_entropy(logits[rows].float(), targets[rows], reduction="none") for rows in pieces(logits)]
    return torch.cat(losses)
