"""What a command reads: ``--text`` or ``--data``, as batches or as texts by domain."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from operator import length_hint
from pathlib import Path
from typing import Any

import typer
from transformers import PreTrainedModel

from moe_ext.checkpoints.read_config import read_config
from moe_ext.commands.output import errors
from moe_ext.data import Batches, Counts
from moe_ext.data import batches as batches_of
from moe_ext.data import documents as documents_of
from moe_ext.data.cutting import Long
from moe_ext.data.sources import Source, sources_of
from moe_ext.data.tokens import Texts
from moe_ext.runtime.batches import read_domains, token_batches
from moe_ext.runtime.packing import packs
from moe_ext.storage.digests import TextDigest

_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKmMgGbB]?)")
_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def count_in(text: str | None) -> int | None:
    """The number of ``--tokens 4M``."""
    if text is None:
        return None
    found = _COUNT.fullmatch(text)
    if found is None or (count := round(float(found[1]) * _SIZES[found[2].lower()])) < 1:
        raise typer.BadParameter(f"--tokens {text}: expected a number of tokens, such as 500k or 4M")
    return count


class Reading:
    """The text of a command.

    Attributes:
        given: ``--text`` and ``--data`` as they came.

    Raises:
        typer.BadParameter: ``--text`` and ``--data``, neither where one is needed, or options of ``--data`` without it.
    """

    def __init__(
        self,
        text: list[Path] | None,
        data: list[str] | None,
        *,
        needed: bool,
        columns: list[str] | None = None,
        template: str | None = None,
        skip_bad_rows: bool = False,
        tokens: str | None = None,
        samples: int | None = None,
        seed: int | None = None,
        long: Long | None = None,
        packing: bool = False,
        batch_tokens: int | None = None,
        ahead: int | None = None,
    ) -> None:
        if text and data:
            raise typer.BadParameter("give --text or --data, one of them")
        if needed and not text and not data:
            raise typer.BadParameter("give --text or --data")
        of_data: dict[str, Any] = {
            "columns": columns,
            "template": template,
            "skip-bad-rows": skip_bad_rows,
            "tokens": tokens,
            "samples": samples,
            "seed": seed,
            "long": long,
            "packing": packing,
            "batch-tokens": batch_tokens,
            "ahead": ahead,
        }
        for name, value in of_data.items():
            if value not in (None, False, []) and not data:
                raise typer.BadParameter(f"--{name} goes with --data")
        self.given: dict[str, Any] = {"text": text, "data": data}
        self._texts: dict[str, str] = {}
        self._columns = columns
        self._sources: list[Source] = []
        self._rows: dict[str, Any] = {"template": template, "skip_bad_rows": skip_bad_rows}
        self._rows |= {"samples": samples, "seed": seed}
        self._mix: dict[str, Any] = {
            "tokens": count_in(tokens),
            "long": long or "split",
            "ahead": 16 if ahead is None else ahead,
        }
        self._packing, self._batch_tokens = packing, batch_tokens
        self._batches: Batches | None = None
        self._counts: Counts | None = None

    def __bool__(self) -> bool:
        return any(self.given.values())

    @property
    def has_rows(self) -> bool:
        """Whether it is of ``--data``."""
        return bool(self.given["data"])

    def find(self) -> None:
        """Finds what is to be read, before any work.

        Raises:
            ValueError: text or sources that are not there.
        """
        text, data = self.given["text"], self.given["data"]
        self._texts = read_domains(text) if text else {}
        self._sources = sources_of(data, self._columns) if data else []
        for source in self._sources:
            source.check()

    @property
    def counts(self) -> Counts | None:
        """What became of the rows of ``--data``, once they are read."""
        return self._counts if self._batches is None else self._batches.counts

    @property
    def label(self) -> str:
        """The names of the domains."""
        return " + ".join([*self._texts, *(source.name for source in self._sources)])

    def batches(
        self, model: PreTrainedModel | Path, tokenizer: Any, *, window: int, batch_size: int
    ) -> Batches | list[dict[str, Any]]:
        """For a model in memory, or a checkpoint folder."""
        if not self._sources:
            return list(token_batches(self._texts, tokenizer, window=window, batch_size=batch_size))
        in_memory = isinstance(model, PreTrainedModel)
        config = model.config if isinstance(model, PreTrainedModel) else read_config(model)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if isinstance(positions, int) and window > positions:
            raise ValueError(f"window: expected no more than the model's {positions} positions, got {window}")
        packing = self._packing and isinstance(model, PreTrainedModel) and packs(model)
        if self._packing and not packing:
            why = "the model lets one row of a window see another" if in_memory else "that is tried in memory only"
            errors.print(f"rows are not packed: {why}")
        made = batches_of(
            self._sources,
            tokenizer,
            window=window,
            batch_size=None if self._batch_tokens else batch_size,
            batch_tokens=self._batch_tokens,
            packing=packing,
            **self._mix,
            **self._rows,
        )
        self._batches = made
        return made

    def texts(self, tokenizer: Any) -> Texts:
        """Domain to text, or to several."""
        if not self._sources:
            return self._texts
        found, self._counts = documents_of(self._sources, tokenizer, **self._rows)
        return found


class Fingerprinted:
    """Batches as they are, and the fingerprint of those that were given out.

    Attributes:
        tokens, counts, waiting: as of :class:`moe_ext.data.Batches`, if they are such.
    """

    def __init__(self, batches: Iterable[dict[str, Any]]) -> None:
        self._batches = batches
        self._digest = TextDigest()
        self.tokens: int | None = getattr(batches, "tokens", None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._digest = TextDigest()
        for batch in self._batches:
            self._digest.add(batch)
            yield batch

    def __length_hint__(self) -> int:
        return length_hint(self._batches, 0)

    @property
    def counts(self) -> Counts | None:
        return getattr(self._batches, "counts", None)

    @property
    def waiting(self) -> float | None:
        return getattr(self._batches, "waiting", None)

    def label(self) -> str:
        """Of these batches, for files that are not to be counted twice."""
        return self._digest.hexdigest()[:12]


def say_counts(counts: Counts | None) -> None:
    """Prints what became of rows, where there is something to say."""
    if counts is None:
        return
    for count, what in (
        (counts.empty, "rows without text"),
        (counts.split, "rows longer than a window, which went on in the next"),
        (counts.cut, f"rows cut, {counts.tokens_cut:,} tokens left out"),
        (counts.bad, "rows that could not be read, left out"),
    ):
        if count:
            errors.print(f"{count:,} {what}", highlight=False)
    for row in counts.first_bad:
        errors.print(f"  {row}", highlight=False)
