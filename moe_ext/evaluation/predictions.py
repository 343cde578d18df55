"""A model's next-token distributions on texts, in a file, for other models to be compared with them.

A row is one scored token: log-probabilities of the whole vocabulary in float16, 2 V bytes. Rounding changes a
probability by a factor of 1 + 2^-11 |log p| at most, up or down as it comes: on the demo model two equal models are
less than 1e-6 nats apart, and a divergence of 1e-3 nats is off by less than a thousandth. bfloat16 would be eight times
as coarse. What rounding could turn around is kept beside them as it was: the likeliest token, and the target's negative
log-likelihood.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from moe_ext.evaluation.perplexity import Perplexity
from moe_ext.evaluation.windows import Window, Windows, pieces, predicted, scored_windows, token_losses
from moe_ext.models.blocks import evaluation_mode
from moe_ext.models.wrapped import unwrapped
from moe_ext.runtime.batches import vocabulary_of
from moe_ext.storage.digests import tensor_bytes
from moe_ext.storage.files import file_destination, replace_file
from moe_ext.storage.formats import FileFormatError, Format, check_label, parse_json, shown
from moe_ext.storage.tensor_file import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = Format("moe_ext.predictions", 1, "a file of predictions")


class PredictionsFileError(FileFormatError):
    """A file does not hold predictions, or those of other text or windows."""


class Predicted(NamedTuple):
    """What a model predicts at the m targets of a window.

    Attributes:
        logits: (m, V) in any dtype, up to a constant a row.
        top: (m,) int64, the likeliest token; of several the one with the least index.
        losses: (m,) float32, negative log-likelihoods of the targets.
    """

    logits: Tensor
    top: Tensor
    losses: Tensor


def live_predictions(model: PreTrainedModel, batch: list[Window]) -> Iterator[Predicted]:
    """What a model in memory predicts, window by window."""
    for logits, part in zip(predicted(model, batch), batch, strict=True):
        yield Predicted(logits, logits.argmax(-1), token_losses(logits, part.targets))


def predicted_tokens(model: PreTrainedModel) -> int:
    """V: the tokens over which a causal language model's next-token distribution is."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return vocabulary_of(model) if weight is None else int(weight.shape[0])


def save_predictions(
    model: PreTrainedModel,
    texts: Mapping[str, str | Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    *,
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Perplexity:
    """Writes a model's next-token distributions, as the reference that :func:`moe_ext.divergence` takes in its place.

    The file takes 2 V + 8 bytes a scored token, V the vocabulary: log-probabilities in float16 (see
    docs/file_formats.md). The rows are written as they come; one batch's logits are in memory.

    Args:
        path: the destination, conventionally ``*.safetensors``; replaced whole or left as it was.
        model, texts, tokenizer, window, stride, batch_size, progress: as for :func:`moe_ext.perplexity`. With progress,
            the file's size is said on standard error first.

    Returns:
        The perplexities, those of :func:`moe_ext.perplexity`.

    Raises:
        ValueError: as for :func:`moe_ext.perplexity`, or logits that are no distribution: NaN, or infinite (the domain
            is named).
        OSError: the file cannot be written, or the disk is too small, which is found before the model runs.
    """
    target = file_destination(path)
    model = unwrapped(model)
    windows = scored_windows(model, texts, tokenizer, window, stride, batch_size)
    vocabulary, tokens = predicted_tokens(model), windows.tokens()
    needed = sum(tokens.values()) * (2 * vocabulary + 8)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the predictions of {sum(tokens.values())} tokens need {needed / 1e9:.2f} GB, {target.parent} has "
            f"{free / 1e9:.2f} GB",
        )
    if progress:
        print(f"{target}: {needed / 1e6:.1f} MB of predictions", file=sys.stderr)
    metadata = {
        **FORMAT.metadata(),
        "model": str(model.config.name_or_path or type(model).__name__),
        "parameters": str(model.num_parameters()),
        "window": str(windows.window),
        "stride": str(windows.stride),
        "domains": json.dumps(
            {domain: {"tokens": tokens[domain], "digest": windows.digest(domain)} for domain in windows.per_domain}
        ),
    }
    for name, value in metadata.items():
        check_label(name, value)
    losses = {}
    bar = tqdm(total=windows.count(), unit="window", desc="predictions", disable=not progress)
    with (
        bar,
        evaluation_mode(model),
        torch.inference_mode(),
        replace_file(target) as temporary,
        temporary.open("wb") as file,
    ):
        rows = _Rows(file, sum(tokens.values()), vocabulary, metadata)
        for domain in windows.per_domain:
            losses[domain] = 0.0
            for batch in windows.batches(domain, batch_size):
                losses[domain] += sum(rows.write(domain, each) for each in live_predictions(model, batch))
                bar.update(len(batch))
        rows.finish()
    return Perplexity.of(losses, tokens)


def _layout(tokens: int, vocabulary: int) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Name, element type and shape of every tensor, in the order in which they lie in the file."""
    return ("log_probs", "F16", (tokens, vocabulary)), ("losses", "F32", (tokens,)), ("top", "I32", (tokens,))


class _Rows:
    """Writes a safetensors file whose largest tensor comes row by row."""

    def __init__(self, file: IO[bytes], tokens: int, vocabulary: int, metadata: Mapping[str, str]) -> None:
        self._file, self._vocabulary = file, vocabulary
        self._top: list[Tensor] = []
        self._losses: list[Tensor] = []
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
        begin = 0
        for name, dtype, shape in _layout(tokens, vocabulary):
            end = begin + tokens * (2 * vocabulary if name == "log_probs" else 4)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, domain: str, found: Predicted) -> float:
        """Adds the rows of a window; the sum of its losses."""
        if found.logits.shape[1] != self._vocabulary:
            raise ValueError(
                f"model: gives {found.logits.shape[1]} logits a token; expected {self._vocabulary}, the rows of its "
                "output embedding"
            )
        for rows in pieces(found.logits):
            log_probs = found.logits[rows].double().log_softmax(-1)
            if log_probs.isnan().any():
                raise ValueError(f"model: its logits on {shown(domain)} are not finite: it does not predict the text")
            self._file.write(tensor_bytes(log_probs.half()))
        self._top.append(found.top.int().cpu())
        self._losses.append(found.losses.cpu())
        return float(found.losses.double().sum())

    def finish(self) -> None:
        """Writes what is not in the rows."""
        self._file.write(tensor_bytes(torch.cat(self._losses)))
        self._file.write(tensor_bytes(torch.cat(self._top)))


@dataclass(frozen=True)
class _Domain:
    """Where a domain's rows are, and what they are of."""

    first: int
    tokens: int
    digest: str


class StoredPredictions:
    """Predictions in a file, read as they are asked for.

    Attributes:
        name: the model that made them.
        parameters: its number of parameters.
        vocabulary: V.

    Raises:
        PredictionsFileError: the file is truncated, foreign or from a newer version.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._read()
        except OSError:
            raise
        except Exception as error:  # beside safetensors' own error what torch says of a type that it does not have
            raise PredictionsFileError(f"{path}: {error}") from error

    def _read(self) -> None:
        header, _ = read_header(self.path)
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            metadata = {}
        metadata = FORMAT.check_metadata(metadata)
        if header.keys() != {"log_probs", "losses", "top"}:
            raise ValueError(f"holds the tensors {shown(sorted(header))}; expected log_probs, losses and top")
        self._file = safe_open(self.path, framework="pt")
        rows = self._file.get_slice("log_probs")
        shape = tuple(rows.get_shape())
        if len(shape) != 2 or shape[1] < 1:
            raise ValueError(f"log_probs: has shape {shown(shape)}; expected (tokens, vocabulary)")
        for name, dtype, expected in _layout(*shape):
            found = self._file.get_slice(name)
            if found.get_dtype() != dtype or tuple(found.get_shape()) != expected:
                raise ValueError(
                    f"{name}: is {shown(found.get_dtype())} of shape {shown(tuple(found.get_shape()))}; "
                    f"expected {dtype} of shape {expected}"
                )
        self._rows, self.vocabulary = rows, shape[1]
        self._top, self._losses = self._file.get_tensor("top").long(), self._file.get_tensor("losses")
        if self._top.numel() and not 0 <= int(self._top.min()) <= int(self._top.max()) < self.vocabulary:
            raise ValueError(f"top: holds a token outside the vocabulary of {self.vocabulary}")
        if not bool((self._losses >= 0).all()):
            raise ValueError("losses: holds a value that is negative or no number")
        self.name = metadata.get("model", "")
        self.parameters, self._window, self._stride = (
            _whole(name, metadata.get(name, "")) for name in ("parameters", "window", "stride")
        )
        self._domains = _domains(parse_json(metadata.get("domains", "")), shape[0])

    def tokens(self) -> dict[str, int]:
        """Tokens of every domain."""
        return {name: domain.tokens for name, domain in self._domains.items()}

    def check(self, windows: Windows) -> None:
        """Checks that they are of those tokens in those windows.

        Raises:
            PredictionsFileError: of others (says what differs).
        """
        theirs, ours = (self._window, self._stride), (windows.window, windows.stride)
        if theirs != ours:
            raise PredictionsFileError(
                f"{self.path}: made with window {theirs[0]} and stride {theirs[1]}; expected {ours[0]} and {ours[1]}"
            )
        for domain in windows.per_domain:
            if domain not in self._domains:
                raise PredictionsFileError(f"{self.path}: holds no domain {shown(domain)}")
            if self._domains[domain].digest != windows.digest(domain):
                raise PredictionsFileError(f"{self.path}: is of other text, or other tokens, of {shown(domain)}")

    def predictions(self, domain: str, first: int, batch: list[Window]) -> Iterator[Predicted]:
        """What was predicted in a batch of a domain's windows, of which ``first`` tokens come before it.

        Raises:
            PredictionsFileError: log-probabilities that are none.
        """
        first += self._domains[domain].first
        for part in batch:
            rows = slice(first, first + len(part.targets))
            log_probs = self._rows[rows]
            # A row of -inf alone is NaN once it is normalised; positive ones are no logarithms of probabilities.
            if not bool((log_probs <= 0).all()) or not bool(log_probs.isfinite().any(-1).all()):
                raise PredictionsFileError(f"{self.path}: log_probs: holds values that are no log-probabilities")
            yield Predicted(log_probs, self._top[rows], self._losses[rows])
            first += len(part.targets)


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) > 0):
        raise ValueError(f"{name}: expected a positive whole number, got {shown(text)}")
    return int(text)


def _domains(stored: Any, rows: int) -> dict[str, _Domain]:
    """Where the rows of every domain are; ValueError unless they share all rows out."""
    found: dict[str, _Domain] = {}
    first = 0
    for domain, entry in stored.items() if isinstance(stored, dict) else ():
        tokens = entry.get("tokens") if isinstance(entry, dict) else None
        digest = entry.get("digest") if isinstance(entry, dict) else None
        if type(tokens) is not int or tokens < 1 or not isinstance(digest, str):
            raise ValueError(f"domains: {shown(domain)} is {shown(entry)}; expected its tokens and their digest")
        found[domain] = _Domain(first, tokens, digest)
        first += tokens
    if not found or first != rows:
        raise ValueError(f"domains: they have {first} tokens; expected one or more of {rows} tokens together")
    return found
