"""One stream of pieces out of several, by shares of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_ext.data.cutting import Piece
from moe_ext.data.reading import Counts


@dataclass
class Stream:
    """A source's pieces and its share of the tokens.

    Attributes:
        taken: tokens so far.
    """

    name: str
    pieces: Iterator[Piece]
    weight: float
    taken: int = 0


def mixed(
    streams: Sequence[Stream], counts: Counts, *, tokens: int | None, samples: int | None, keep_shares: bool
) -> Iterator[Piece]:
    """Pieces of all streams: the next one is of the stream that is furthest behind its share of the tokens so far.

    Args:
        tokens: how many tokens, exactly, if the streams have so many: the last piece is cut for it. None: all.
        samples: how many documents. None: all.
        keep_shares: whether the mix ends with the first stream that does, so that the shares hold; the others go on
            alone otherwise.
    """
    left, begun, running = tokens, 0, list(streams)
    while running and left != 0:
        stream = min(running, key=lambda each: each.taken / each.weight)
        piece = next(stream.pieces, None)
        if piece is None:
            counts.ended.append(stream.name)
            if keep_shares:
                return
            running.remove(stream)
            continue
        if piece.first and begun == samples:
            running.remove(stream)  # the others finish the documents that they have begun
            continue
        if left is not None and len(piece.tokens) > left:
            lost = len(piece.tokens) - left + piece.lost
            piece = piece._replace(tokens=piece.tokens[:left], lost=lost, more=False)
        begun += piece.first
        counts.split += piece.first and piece.more
        counts.cut += piece.lost > 0
        counts.tokens_cut += piece.lost
        stream.taken += len(piece.tokens)
        left = None if left is None else left - len(piece.tokens)
        yield piece
