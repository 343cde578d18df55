"""Sources to documents: rows read, rendered, counted, in the order of the source or shuffled."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moe_ext.data.rendering import ChatTemplate
from moe_ext.data.rows import Columns, Conversation, Row, UnreadableRowError, content_of, recognised
from moe_ext.data.sources import Source
from moe_ext.storage.formats import shown

MOST_NAMED = 10
"""Bad rows that a report names."""


class Document(NamedTuple):
    """A row's text and the domain that it counts in."""

    text: str
    domain: str


@dataclass
class Counts:
    """What became of the rows so far.

    Attributes:
        rows: that were read; bad and empty ones are among them.
        empty: rows without text.
        bad: rows that could not be read and were left out.
        first_bad: the first of them, where and why.
        split: rows longer than a window, which went on in the next one.
        cut: rows longer than a window, or than what was left of the tokens, whose rest was left out.
        tokens_cut: how many tokens that were.
        tokens: by domain, of the batches so far.
        ended: sources that had no more rows.
    """

    rows: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    split: int = 0
    cut: int = 0
    tokens_cut: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    ended: list[str] = field(default_factory=list)

    def copied(self) -> Counts:
        """As they are now."""
        return Counts(
            **{**vars(self), "first_bad": [*self.first_bad], "ended": [*self.ended], "tokens": Counter(self.tokens)}
        )

    def as_json(self) -> dict[str, Any]:
        """By name, as JSON takes them."""
        return {**vars(self), "tokens": dict(self.tokens)}


class Reader:
    """Reads sources.

    Args:
        skip_bad: whether rows that cannot be read are counted and left out.
    """

    def __init__(self, template: ChatTemplate, counts: Counts, *, skip_bad: bool) -> None:
        self._template, self._counts, self._skip_bad = template, counts, skip_bad

    def documents(self, source: Source, seed: int | None = None) -> Iterator[Document]:
        """A source's documents.

        Args:
            seed: shuffles them, within a window of ``SHUFFLED`` rows.

        Raises:
            ValueError: a row that cannot be read, unless these are left out: says where it stands.
        """
        found = self._in_order(source)
        return found if seed is None else _shuffled(found, random.Random(f"{seed} {source.name}"))

    def _in_order(self, source: Source) -> Iterator[Document]:
        known: dict[frozenset[str], Columns] = {}
        for row in source.rows():
            self._counts.rows += 1
            try:
                document = self._document(row, source, known)
            except UnreadableRowError as error:
                if not self._skip_bad:
                    raise ValueError(
                        f"{row.where}: {error}. To leave such rows out: skip_bad_rows (--skip-bad-rows)"
                    ) from None
                self._counts.bad += 1
                if len(self._counts.first_bad) < MOST_NAMED:
                    self._counts.first_bad.append(f"{row.where}: {error}")
                continue
            if document.text.strip():
                yield document
            else:
                self._counts.empty += 1

    def _document(self, row: Row, source: Source, known: dict[frozenset[str], Columns]) -> Document:
        if isinstance(row.content, UnreadableRowError):
            raise row.content
        if isinstance(row.content, str):
            return Document(_encodable(row.content), source.name)
        names = frozenset(row.content)
        if names not in known:
            known[names] = recognised(names, source.columns)
        columns = known[names]
        content = content_of(row.content, columns)
        text = self._template.render(content) if isinstance(content, Conversation) else content
        return Document(_encodable(text), _domain(row.content, columns, source.name))


def _domain(row: Mapping[str, Any], columns: Columns, name: str) -> str:
    if columns.domain is None:
        return name
    domain = row[columns.domain]
    if not isinstance(domain, str) or not domain:
        raise UnreadableRowError(f"{shown(columns.domain)} is {shown(domain, 40)}; expected a domain's name")
    return _encodable(domain)


def _encodable(text: str) -> str:
    """The text; UnreadableRowError if it holds half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnreadableRowError("holds half of a character, which UTF-8 cannot") from None
    return text


SHUFFLED = 10_000
"""Rows among which a shuffled source draws its next one, or fewer: at most ``SHUFFLED_CHARACTERS``."""
SHUFFLED_CHARACTERS = 1 << 26


def _shuffled(documents: Iterator[Document], rng: random.Random) -> Iterator[Document]:
    waiting: list[Document] = []
    characters = 0
    for document in documents:
        waiting.append(document)
        characters += len(document.text)
        while len(waiting) >= SHUFFLED or (characters >= SHUFFLED_CHARACTERS and len(waiting) > 1):
            chosen = rng.randrange(len(waiting))
            waiting[chosen], waiting[-1] = waiting[-1], waiting[chosen]
            characters -= len(waiting[-1].text)
            yield waiting.pop()
    rng.shuffle(waiting)
    yield from waiting
