"""Which text calibrates and which judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_ext.data.tokens import token_ids
from moe_ext.storage.formats import shown

HELD_BACK = 10
"""One of so many characters of every domain, at its end, is held back from calibration to judge on."""


def held_back(texts: Mapping[str, str], tokenizer: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The beginning of every domain, and its end.

    Raises:
        ValueError: a domain too short for both, which is named.
    """
    first, last = {}, {}
    for domain, text in texts.items():
        cut = len(text) - len(text) // HELD_BACK
        first[domain], last[domain] = text[:cut], text[cut:]
        if min(len(token_ids(part, tokenizer)) for part in (first[domain], last[domain])) < 2:
            raise ValueError(
                f"texts: {shown(domain)} is too short to hold a tenth back to judge on; give more, or other text to "
                "judge on (--judge)"
            )
    return first, last


def check_judged(judged: Mapping[str, str], tokenizer: Any, window: int, positions: int | None) -> None:
    """ValueError for text that could not be scored in the end, hours later."""
    for domain, text in judged.items():
        if len(token_ids(text, tokenizer)) < 2:
            raise ValueError(f"judge: {shown(domain)} has fewer than 2 tokens, of which none can be scored")
    if positions is not None and window > positions:
        raise ValueError(f"window: expected no more than the model's {positions} positions, got {window}")
