"""Batches out of sources, as :func:`moe_ext.calibrate` and the others take them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from moe_ext.data.ahead import made_ahead
from moe_ext.data.cutting import Long, pieces_of
from moe_ext.data.mixing import Stream, mixed
from moe_ext.data.packing import Arrays, Shape, batched
from moe_ext.data.reading import Counts, Reader
from moe_ext.data.rendering import ChatTemplate
from moe_ext.data.rows import Columns
from moe_ext.data.sources import Source, sources_of
from moe_ext.storage.formats import shown

MOST_DOMAINS = 64


@dataclass(frozen=True)
class Mix:
    """How much of the sources is read, and in which order; arguments of :func:`batches`."""

    tokens: int | None
    samples: int | None
    seed: int | None
    long: Long
    skip_bad_rows: bool


class Batches:
    """Batches that can be gone through several times, each time the same.

    Attributes:
        counts: what became of the rows up to the last batch that was given out.
        tokens: how many tokens were asked for; None: all.
        domains: names of the sources.
        waiting: share of the time since the first batch that was spent waiting for one.
    """

    def __init__(
        self, sources: list[Source], tokenizer: Any, template: ChatTemplate, shape: Shape, mix: Mix, ahead: int
    ) -> None:
        self._sources, self._tokenizer, self._template = sources, tokenizer, template
        self._shape, self._mix, self._ahead = shape, mix, ahead
        self.counts = Counts()
        self.tokens = mix.tokens
        self.domains = [source.name for source in sources]
        self.waiting = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.counts, self.waiting = Counts(), 0.0
        made = made_ahead(self._made, self._ahead) if self._ahead else self._made()
        waited, begun, asked = 0.0, 0.0, time.monotonic()
        for arrays, counts in made:
            batch = {name: each if isinstance(each, str) else torch.from_numpy(each) for name, each in arrays.items()}
            now = time.monotonic()
            if begun:  # the first batch, before which a process starts and files are opened, says nothing of the pace
                waited += now - asked
                self.waiting = waited / (now - begun)
            begun, self.counts = begun or now, counts
            yield batch
            asked = time.monotonic()

    def _made(self) -> Iterator[tuple[Arrays, Counts]]:
        counts, mix = Counts(), self._mix
        reader = Reader(self._template, counts, skip_bad=mix.skip_bad_rows)
        streams = []
        for source in self._sources:
            documents = islice(reader.documents(source, mix.seed), mix.samples)
            pieces = pieces_of(documents, self._tokenizer, self._shape.window, mix.long)
            streams.append(Stream(source.name, pieces, source.weight or 1.0))
        weighted = any(source.weight is not None for source in self._sources)
        pieces = mixed(streams, counts, tokens=mix.tokens, samples=mix.samples, keep_shares=weighted)
        for arrays in batched(pieces, self._shape):
            mask = arrays["counted" if self._shape.packed else "attention_mask"]
            counts.tokens[arrays["domain"]] += int(mask.sum())
            if len(counts.tokens) > MOST_DOMAINS:
                raise ValueError(f"columns: the domain column names more than {MOST_DOMAINS} domains")
            yield arrays, counts.copied()


def batches(
    data: str | Path | Source | Iterable[str | Path | Source] | Mapping[str, Iterable[Mapping[str, Any] | str]],
    tokenizer: Any,
    *,
    window: int = 512,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    tokens: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    columns: str | Columns | Iterable[str] | Mapping[str, str | Columns] | None = None,
    template: str | Path | None = None,
    skip_bad_rows: bool = False,
    long: Long = "split",
    packing: bool = False,
    ahead: int = 16,
) -> Batches:
    """Batches of text files, chat data and data sets for :func:`moe_ext.calibrate`, :func:`moe_ext.search` and the
    others. Rows are read, rendered, tokenised and put together in a process of its own while the model runs; memory
    does not grow with the sources.

    Args:
        data: one source or several, each ``[NAME=]SOURCE[:split][@weight]``: a text file, ``.jsonl`` (``.gz``,
            ``.zst``), ``.json``, ``.parquet`` or ``.arrow``, a folder of them, or a data set's name on the Hugging Face
            Hub; or rows by the name of their domain: mappings of columns, as ``datasets`` gives them, or texts. A
            source is a domain.
        tokenizer: the model's. A text gets the special tokens that it adds; a conversation those of its chat template.
        window: tokens a row, at most; no more than the model's positions.
        batch_size: rows a batch, at most; 8, if ``batch_tokens`` is not given either.
        batch_tokens: tokens a batch with its padding, at most.
        tokens: how many tokens, exactly, unless the sources have fewer. None: all.
        samples: how many rows. None: all.
        seed: reads the rows in an order shuffled by it, 10,000 at a time, the same every time. None: in their own.
        columns: which columns hold what, such as ``"prompt=question,response=answer"``
            (:class:`moe_ext.data.rows.Columns`), of all sources or ``"name:..."`` of one. Usual names are recognised:
            messages, pairs of a prompt and a response, text, in this order.
        template: a file with another chat template than the tokenizer's, the name of one of its own, or itself.
        skip_bad_rows: whether rows that cannot be read are left out, and counted; they are an error otherwise.
        long: rows longer than a window: "split": they go on in the next one; "cut": their rest is left out after the
            last whole sentence. Either is counted.
        packing: whether several rows share one window, each with positions that begin at 0 and without attention to the
            others: for models of which :func:`moe_ext.runtime.packing.packs` says so.
        ahead: batches that are made ahead; 0: none, and in this process.

    Sources are mixed by tokens: with weights in their proportion, until the first source ends; without weights in equal
    parts, and a source that ends leaves the rest to the others.

    Returns:
        :class:`Batches`: mappings with ``input_ids`` (B, S), ``attention_mask`` (B, S), or ``position_ids`` and
        ``counted`` (B, S) if packed, and ``domain``; and in ``counts`` what became of the rows.

    Raises:
        ValueError: a source that is not there, columns or sizes that are wrong. While they are gone through: a row that
            cannot be read (says where), or a tokenizer without a chat template that meets a conversation.
        OSError: while they are gone through: a file or data set that cannot be read.
    """
    for name, number, least in (
        ("window", window, 1),
        ("batch_size", batch_size, 1),
        ("batch_tokens", batch_tokens, 1),
        ("tokens", tokens, 1),
        ("samples", samples, 1),
        ("ahead", ahead, 0),
    ):
        if number is not None and (type(number) is not int or number < least):
            raise ValueError(f"{name}: expected a whole number of {least} or more, got {shown(number)}")
    if seed is not None and type(seed) is not int:
        raise ValueError(f"seed: expected a whole number, got {shown(seed)}")
    if long not in ("split", "cut"):
        raise ValueError(f"long: expected 'split' or 'cut', got {shown(long)}")
    sources = sources_of(data, columns)
    for source in sources:
        source.check()
    rows = batch_size if batch_size is not None or batch_tokens is not None else 8
    return Batches(
        sources,
        tokenizer,
        ChatTemplate(tokenizer, template),
        Shape(window, rows, batch_tokens, packing),
        Mix(tokens, samples, seed, long, skip_bad_rows),
        ahead,
    )


def documents(
    data: str | Path | Source | Iterable[str | Path | Source] | Mapping[str, Iterable[Mapping[str, Any] | str]],
    tokenizer: Any,
    *,
    samples: int | None = None,
    seed: int | None = None,
    columns: str | Columns | Iterable[str] | Mapping[str, str | Columns] | None = None,
    template: str | Path | None = None,
    skip_bad_rows: bool = False,
) -> tuple[dict[str, list[str]], Counts]:
    """Domain to texts, for :func:`moe_ext.perplexity`, :func:`moe_ext.divergence` and :func:`moe_ext.compress`, and
    what became of the rows. All texts are in memory.

    Args:
        data, tokenizer, seed, columns, template, skip_bad_rows: as for :func:`batches`.
        samples: rows of every source, at most.

    Raises:
        ValueError, OSError: as :func:`batches`, or a source without text.
    """
    counts = Counts()
    reader = Reader(ChatTemplate(tokenizer, template), counts, skip_bad=skip_bad_rows)
    sources = sources_of(data, columns)
    for source in sources:
        source.check()
    found: dict[str, list[str]] = {}
    for source in sources:
        for document in islice(reader.documents(source, seed), samples):
            found.setdefault(document.domain, []).append(document.text)
        if source.columns.domain is None and source.name not in found:
            raise ValueError(f"data {shown(source.name)}: holds no text")
    return found, counts
