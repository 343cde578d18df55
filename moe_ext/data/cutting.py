"""Documents to pieces of at most a window of tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_ext.data.reading import Document
from moe_ext.data.tokens import Templated, token_lists

Long = Literal["split", "cut"]

TOGETHER = 256
"""Documents that the tokenizer takes at once, or fewer: at most ``TOGETHER_CHARACTERS``."""
TOGETHER_CHARACTERS = 1 << 20
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f][\"'\u201d\u2019)\]]*(?=\s)|\n")


class Piece(NamedTuple):
    """Tokens of one document that a model reads together.

    Attributes:
        tokens: (n,) int64.
        first: whether the document begins here.
        more: whether it goes on in the next piece.
        lost: tokens of its rest, which are left out.
    """

    tokens: NDArray[np.int64]
    domain: str
    first: bool = True
    more: bool = False
    lost: int = 0


def pieces_of(documents: Iterable[Document], tokenizer: Any, window: int, long: Long) -> Iterator[Piece]:
    """Pieces of documents.

    Args:
        long: what becomes of a document that is longer than a window: "split": it goes on in the next piece; "cut": its
            rest is left out after the last whole sentence, if that is in the window's second half.
    """
    for together in _grouped(documents):
        lists = token_lists([document.text for document in together], tokenizer)
        for document, tokens in zip(together, lists, strict=True):
            whole = np.asarray(tokens, dtype=np.int64)
            if len(whole) <= window:
                if len(whole):
                    yield Piece(whole, document.domain)
            elif long == "cut":
                end = _last_sentence(document.text, whole, tokenizer, window)
                yield Piece(whole[:end], document.domain, lost=len(whole) - end)
            else:
                for start in range(0, len(whole), window):
                    piece = whole[start : start + window]
                    yield Piece(piece, document.domain, start == 0, start + window < len(whole))


def _grouped(documents: Iterable[Document]) -> Iterator[list[Document]]:
    together: list[Document] = []
    characters = 0
    for document in documents:
        together.append(document)
        characters += len(document.text)
        if len(together) == TOGETHER or characters >= TOGETHER_CHARACTERS:
            yield together
            together, characters = [], 0
    if together:
        yield together


def _last_sentence(text: str, tokens: NDArray[np.int64], tokenizer: Any, window: int) -> int:
    """Tokens up to the end of the last sentence that ends in the window's second half; the window, if none does."""
    if not getattr(tokenizer, "is_fast", False):
        return window  # its tokens do not say where they stand in the text
    templated = isinstance(text, Templated)
    encoded = tokenizer(str(text), verbose=False, return_offsets_mapping=True, add_special_tokens=not templated)
    offsets = encoded["offset_mapping"][len(encoded["input_ids"]) - len(tokens) :]  # without a second BOS
    ends = [end for _, end in offsets[:window]]
    last = max((found.end() for found in _SENTENCE_END.finditer(text, 0, ends[-1] + 1)), default=0)
    count = bisect_right(ends, last)
    return count if count > window // 2 else window
