"""Texts to tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

Texts = Mapping[str, str | Sequence[str]]
"""Domain to a text, or to several that are separate documents."""


class Templated(str):
    """A text that a chat template wrote, with the special tokens that it is to have: a tokenizer adds none."""

    __slots__ = ()


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """A text's tokens with the special ones that the tokenizer adds. A text that begins with the BOS token itself, as
    chat templates write it, gets no second one."""
    # Not verbose: windows may be shorter than the text.
    options = {"add_special_tokens": False} if isinstance(text, Templated) else {}
    tokens: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
    return _with_one_bos(text, tokens, tokenizer)


def token_lists(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """:func:`token_ids` of every text, in one call for the texts of either kind: a Rust tokenizer shares it out over
    its threads."""
    found: list[list[int]] = [[]] * len(texts)
    for templated in (False, True):
        chosen = [index for index, text in enumerate(texts) if isinstance(text, Templated) == templated]
        if not chosen:
            continue
        options = {"add_special_tokens": False} if templated else {}
        lists = tokenizer([str(texts[index]) for index in chosen], verbose=False, **options)["input_ids"]
        for index, tokens in zip(chosen, lists, strict=True):
            found[index] = _with_one_bos(texts[index], tokens, tokenizer)
    return found


def _with_one_bos(text: str, tokens: list[int], tokenizer: Any) -> list[int]:
    first, number = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if first and text.startswith(first) and tokens[:2] == [number, number] and not isinstance(text, Templated):
        return tokens[1:]
    return tokens
