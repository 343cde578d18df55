"""Which text calibrates and which judges."""

from __future__ import annotations

from typing import Any

from moe_ext.data.tokens import Texts, token_ids
from moe_ext.storage.formats import shown

HELD_BACK = 10
"""One of so many characters of every domain, or of its documents, at its end, is held back from calibration to judge
on."""


def documents_of(texts: Texts) -> dict[str, str | list[str]]:
    """Texts as JSON takes them."""
    return {domain: given if isinstance(given, str) else list(given) for domain, given in texts.items()}


def held_back(texts: Texts, tokenizer: Any) -> tuple[dict[str, str | list[str]], dict[str, str | list[str]]]:
    """The beginning of every domain, and its end: of a domain of ten documents or more whole ones.

    Raises:
        ValueError: a domain too short for both, which is named.
    """
    first: dict[str, str | list[str]] = {}
    last: dict[str, str | list[str]] = {}
    for domain, given in documents_of(texts).items():
        if isinstance(given, list) and len(given) < HELD_BACK:
            # Cut as one text is: each document, so that both parts have the kinds that there are.
            cuts = [len(text) - len(text) // HELD_BACK for text in given]
            first[domain] = [_part(text, 0, cut) for text, cut in zip(given, cuts, strict=True)]
            last[domain] = [_part(text, cut, len(text)) for text, cut in zip(given, cuts, strict=True)]
        else:
            cut = len(given) - len(given) // HELD_BACK
            first[domain], last[domain] = given[:cut], given[cut:]
        if min(_fewest_tokens(part, tokenizer) for part in (first[domain], last[domain])) < 2:
            raise ValueError(
                f"texts: {shown(domain)} is too short to hold a tenth back to judge on; give more, or other text to "
                "judge on (--judge)"
            )
    return first, last


def _part(text: str, start: int, end: int) -> str:
    """Of a text, of its own kind: what a chat template wrote has its special tokens."""
    return type(text)(text[start:end])


def _fewest_tokens(given: str | list[str], tokenizer: Any) -> int:
    return min(len(token_ids(text, tokenizer)) for text in ([given] if isinstance(given, str) else given))


def check_judged(judged: Texts, tokenizer: Any, window: int, positions: int | None) -> None:
    """ValueError for text that could not be scored in the end, hours later."""
    for domain, given in documents_of(judged).items():
        if _fewest_tokens(given, tokenizer) < 2:
            raise ValueError(f"judge: {shown(domain)} has fewer than 2 tokens, of which none can be scored")
    if positions is not None and window > positions:
        raise ValueError(f"window: expected no more than the model's {positions} positions, got {window}")
