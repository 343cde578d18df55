"""Reading text by domain and cutting it into batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

import moe_ext
from moe_ext.data.tokens import token_ids
from moe_ext.evaluation.skip_rates import skip_rates
from moe_ext.runtime.batches import check_batch, prompt_batch, read_domains, token_batches
from tests.support.batches import random_tokens
from tests.support.mixtral import MixtralFactory


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
        (["chat.jsonl"], "chat.jsonl is no prose but jsonl: give it as data \\(--data"),
        (["table.CSV"], "table.CSV is no prose but CSV"),
        (["chat.txt"], "chat.txt is no prose but lines of JSON"),
        (["chats"], "chat.txt is no prose but lines of JSON"),
    ],
)
def test_unusable_text_is_refused(tmp_path: Path, paths: list[str], message: str) -> None:
    for folder in ("empty", "twin"):
        (tmp_path / folder).mkdir()
    for file in ("a.txt", "twin/a.txt"):
        (tmp_path / file).write_text("a")
    for file in ("chat.jsonl", "table.CSV", "chat.txt", "chats/chat.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('{"messages": [{"role": "user"}]}\n\n["text"]\n')
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ValueError, match=message):
        read_domains([tmp_path / path for path in paths])


@pytest.mark.parametrize("text", ["[1] is a footnote", '{"a": 1}\nand prose', '{\n  "a": 1\n}\n', "[not json]"])
def test_text_that_only_begins_like_json_is_prose(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read_domains([tmp_path / "a.txt"]) == {"a": text}


class BosTokenizer(LetterTokenizer):
    """Adds a BOS token, as Llama's and Mistral's do; knows it in the text, too."""

    bos_token, bos_token_id = "<s>", 1

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        parts = text.split("<s>")
        ids = super().__call__(parts[0])["input_ids"]
        for part in parts[1:]:
            ids += [1, *super().__call__(part)["input_ids"]]
        return {"input_ids": [1, *ids]}


def test_a_templated_text_gets_no_second_bos() -> None:
    assert token_ids("<s>ab", BosTokenizer()) == [1, 97, 98] == token_ids("ab", BosTokenizer())
    assert token_ids("<s><s>a", BosTokenizer()) == [1, 1, 97]  # its own two
    assert token_ids("", BosTokenizer()) == [1]
    batch = next(token_batches(["<s>ab"], BosTokenizer()))
    assert batch["input_ids"].tolist() == [[1, 97, 98]]


def test_what_a_tokenizer_adds_is_left_out_and_nothing_else(tiny_mixtral: MixtralFactory) -> None:
    model, tokens = tiny_mixtral(), random_tokens(2, 5)
    given = {"input_ids": tokens, "position_ids": torch.arange(5)[None], "token_type_ids": tokens, "length": [5, 5]}
    inputs, counted = check_batch(0, given, model)
    assert list(inputs) == ["input_ids", "position_ids"]
    assert counted is None
    with pytest.raises(ValueError, match="batch 3: MixtralModel takes no 'attention_masks'"):
        check_batch(3, {"input_ids": tokens, "attention_masks": tokens}, model)


JOBS: dict[str, Callable[[Any, Any], object]] = {
    "calibrate": lambda model, batches: moe_ext.calibrate(model, batches, progress=False),
    "search": lambda model, batches: moe_ext.search(model, batches, keep=7, progress=False),
    "skip_rates": skip_rates,
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_every_job_takes_a_tokenizers_output_and_refuses_tokens_that_are_not_there(
    tiny_mixtral: MixtralFactory, job: Callable[[Any, Any], object]
) -> None:
    model, tokens = moe_ext.patch(tiny_mixtral(num_hidden_layers=1)), random_tokens(1, 5)
    job(model, [BatchEncoding({"input_ids": tokens, "token_type_ids": torch.zeros_like(tokens)})])
    for wrong in (-1, 96, 2**40):
        bad = tokens.clone()
        bad[0, 3] = wrong
        with pytest.raises(ValueError, match=rf"batch 1: expected tokens from 0 and below .* size 96, got {wrong}"):
            job(model, [{"input_ids": tokens}, {"input_ids": bad}])
    with pytest.raises(ValueError, match=r"batch 0: has tokens of torch.float32"):
        job(model, [{"input_ids": tokens.float()}])


@pytest.mark.parametrize("wrong", [-1, 96])
def test_prompts_and_documents_with_tokens_that_are_not_there_are_refused(
    tiny_mixtral: MixtralFactory, wrong: int
) -> None:
    class Wrong:
        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1, 2, wrong]}

    message = rf"expected tokens from 0 and below the model's vocabulary size 96, got {wrong}"
    with pytest.raises(ValueError, match=f"prompt: {message}"):
        prompt_batch("a", Wrong(), tiny_mixtral())
    with pytest.raises(ValueError, match=f"'d', document 0: {message}"):
        moe_ext.perplexity(tiny_mixtral(), {"d": "a"}, Wrong())


@pytest.mark.parametrize("arguments", [{"window": 0}, {"batch_size": 0}])
def test_sizes_below_one_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        list(token_batches(["a"], LetterTokenizer(), **arguments))
