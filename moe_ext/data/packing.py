"""Pieces to batches: of one domain each, cut by tokens or by rows, with padding or packed.

Pieces wait until there are enough of a domain for ``POOL`` batches. Neighbours in length then share a batch, or,
packed, pieces fill rows of the window: the longest first, each into the first row that has room.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_ext.data.cutting import Piece

POOL = 8
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Of batches.

    Attributes:
        window: tokens a row, at most.
        rows: rows a batch, at most; None: as many as ``tokens`` allow.
        tokens: tokens a batch with its padding, at most, but one row at least.
        packed: whether several pieces share a row.
    """

    window: int
    rows: int | None
    tokens: int | None
    packed: bool

    def most_rows(self, longest: int) -> int:
        """Rows of a batch of which the longest has so many tokens."""
        if self.tokens is None:
            return self.rows or 1
        fitting = max(1, self.tokens // longest)
        return fitting if self.rows is None else min(fitting, self.rows)

    @property
    def pool(self) -> int:
        """Tokens of a domain that wait, at least, before batches are made of them."""
        return POOL * (self.tokens or (self.rows or 1) * self.window)


def batched(pieces: Iterable[Piece], shape: Shape) -> Iterator[Arrays]:
    """Batches of pieces: ``input_ids`` (B, S) int64, with ``attention_mask`` (B, S) int64 or, packed, ``position_ids``
    (B, S) int64 that begin with 0 for every piece, and ``counted`` (B, S) bool; and ``domain``."""
    waiting: dict[str, list[Piece]] = {}
    tokens: dict[str, int] = {}
    for piece in pieces:
        waiting.setdefault(piece.domain, []).append(piece)
        tokens[piece.domain] = tokens.get(piece.domain, 0) + len(piece.tokens)
        if tokens[piece.domain] >= shape.pool:
            yield from _of_domain(piece.domain, waiting.pop(piece.domain), shape)
            del tokens[piece.domain]
    for domain, rest in waiting.items():
        yield from _of_domain(domain, rest, shape)


def _of_domain(domain: str, pieces: list[Piece], shape: Shape) -> Iterator[Arrays]:
    longest_first = sorted((piece.tokens for piece in pieces), key=len, reverse=True)
    rows = _packed_rows(longest_first, shape.window) if shape.packed else [[tokens] for tokens in longest_first]
    start = 0
    while start < len(rows):
        end = start + shape.most_rows(sum(map(len, rows[start])))
        yield {**_arrays(rows[start:end], packed=shape.packed), "domain": domain}
        start = end


def _packed_rows(longest_first: Sequence[Any], window: int) -> list[list[Any]]:
    """Rows of at most a window, the fullest first."""
    rows: list[list[Any]] = []
    room: list[int] = []
    open_from = 0  # rows before it have no room
    for tokens in longest_first:
        for row in range(open_from, len(rows)):
            if room[row] >= len(tokens):
                break
        else:
            row = len(rows)
            rows.append([])
            room.append(window)
        rows[row].append(tokens)
        room[row] -= len(tokens)
        while open_from < len(rows) and room[open_from] == 0:
            open_from += 1
    return [rows[row] for row in sorted(range(len(rows)), key=room.__getitem__)]


def _arrays(rows: Sequence[Sequence[Any]], *, packed: bool) -> Arrays:
    lengths = [sum(map(len, row)) for row in rows]
    shape = len(rows), max(lengths)
    input_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    counted = np.arange(shape[1]) < np.array(lengths)[:, None]
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[number, :length] = np.concatenate(row)
        # Padding is a document of its own, which nothing else sees.
        parts = [*map(len, row), shape[1] - length]
        positions[number] = np.concatenate([np.arange(part) for part in parts])
    if packed:
        return {"input_ids": input_ids, "position_ids": positions, "counted": counted}
    return {"input_ids": input_ids, "attention_mask": counted.astype(np.int64)}
