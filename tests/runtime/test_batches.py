"""Reading text by domain and cutting it into batches."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.runtime.batches import read_domains, token_batches


class LetterTokenizer:
    """One token a letter."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@given(
    documents=st.lists(st.text("abc", max_size=40), max_size=6), window=st.integers(1, 12), batch_size=st.integers(1, 5)
)
def test_batches_hold_every_token_once_in_order(documents: list[str], window: int, batch_size: int) -> None:
    batches = list(token_batches(documents, LetterTokenizer(), window=window, batch_size=batch_size))
    rows: list[list[int]] = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape
        assert ids.shape[0] <= batch_size
        assert ids.shape[1] <= window
        assert bool((mask.sum(1) > 0).all())
        rows += [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert [token for row in rows for token in row] == [ord(letter) for letter in "".join(documents)]


def test_a_file_and_a_folder_are_read_by_domain(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name, text in {"poems.md": "a", "more/b.txt": "b", "more/a.txt": "é", "more/notes.json": "{}"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_domains([tmp_path / "poems.md", tmp_path / "more"]) == {"poems": "a", "a": "é", "b": "b"}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["missing"], "missing does not exist"),
        (["empty"], "holds no \\*.txt file"),
        (["a.txt", "twin/a.txt"], "two text files are named 'a'"),
        (["blank.txt"], "blank.txt is empty"),
        (["latin.txt"], "latin.txt is not UTF-8 text"),
    ],
)
def test_unusable_text_is_refused(tmp_path: Path, paths: list[str], message: str) -> None:
    for folder in ("empty", "twin"):
        (tmp_path / folder).mkdir()
    for file in ("a.txt", "twin/a.txt"):
        (tmp_path / file).write_text("a")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ValueError, match=message):
        read_domains([tmp_path / path for path in paths])


@pytest.mark.parametrize("arguments", [{"window": 0}, {"batch_size": 0}])
def test_sizes_below_one_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        list(token_batches(["a"], LetterTokenizer(), **arguments))
