"""From sources to batches: every token once, shares of the tokens, windows, packing, order, and the process ahead."""

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.data import Batches, Source, batches
from moe_ext.data.ahead import made_ahead
from moe_ext.data.packing import POOL
from tests.support.letters import LETTERS, letter_tokenizer

TOKENIZER = letter_tokenizer(bos=True)
texts = st.lists(st.text(LETTERS, min_size=1, max_size=30), min_size=1, max_size=12)


def documents_in(found: Batches) -> list[tuple[str, list[int]]]:
    """Domain and tokens of every piece, read back from batches, padded or packed."""
    pieces = []
    for batch in found:
        ids, positions = batch["input_ids"], batch.get("position_ids")
        counted = batch["counted"] if positions is not None else batch["attention_mask"].bool()
        assert ids.dtype == torch.int64
        assert ids.shape == counted.shape
        for row in range(len(ids)):
            tokens = ids[row][counted[row]].tolist()
            starts = [0] if positions is None else (positions[row][counted[row]] == 0).nonzero().flatten().tolist()
            pieces += [(batch["domain"], tokens[a:b]) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    return pieces


@given(
    of=st.dictionaries(st.sampled_from("xyz"), texts, min_size=1),
    window=st.integers(1, 20),
    rows=st.none() | st.integers(1, 5),
    budget=st.none() | st.integers(1, 60),
    packing=st.booleans(),
    seed=st.none() | st.integers(0, 3),
)
def test_every_token_is_in_one_batch_of_its_domain(
    of: dict[str, list[str]], window: int, rows: int | None, budget: int | None, packing: bool, seed: int | None
) -> None:
    found = batches(
        dict(of), TOKENIZER, window=window, batch_size=rows, batch_tokens=budget, packing=packing, seed=seed, ahead=0
    )
    expected = Counter(
        (domain, tuple(tokens[start : start + window]))
        for domain, documents in of.items()
        for tokens in (TOKENIZER(text)["input_ids"] for text in documents)
        for start in range(0, len(tokens), window)
    )
    assert Counter((domain, tuple(tokens)) for domain, tokens in documents_in(found)) == expected
    for batch in found:
        size, length = batch["input_ids"].shape
        assert length <= window
        assert size <= (rows or (8 if budget is None else size))
        assert budget is None or size == 1 or size * length <= budget
    per_domain = Counter[str]()
    for (domain, tokens), times in expected.items():
        per_domain[domain] += len(tokens) * times
    assert found.counts.tokens == per_domain
    assert found.counts.rows == sum(map(len, of.values()))
    assert found.counts.split == sum(len(text) + 1 > window for documents in of.values() for text in documents)
    assert sorted(found.counts.ended) == sorted(of)


@given(packing=st.booleans(), seed=st.none() | st.integers(0, 9))
def test_the_same_sources_give_the_same_batches(packing: bool, seed: int | None) -> None:
    rng = random.Random(0)
    rows = {"x": ["".join(rng.choices(LETTERS, k=rng.randint(1, 20))) for _ in range(40)]}
    found = batches(rows, TOKENIZER, window=24, packing=packing, seed=seed, ahead=0)
    first, second = list(found), list(found)
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one if name != "domain")
    in_order = [tokens for _, tokens in documents_in(batches(rows, TOKENIZER, batch_size=1, window=24, ahead=0))]
    assert sorted(map(tuple, in_order)) == sorted(tuple(tokens) for _, tokens in documents_in(found))


def test_a_seed_shuffles_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_ext.data.reading.SHUFFLED", 50)
    rows = {"x": [LETTERS[number % 8] * (number % 9 + 1) for number in range(200)]}

    def taken(seed: int | None) -> Counter[int]:
        return Counter(
            len(tokens) for _, tokens in documents_in(batches(rows, TOKENIZER, samples=40, seed=seed, ahead=0))
        )

    assert taken(None) == Counter(number % 9 + 2 for number in range(40))
    assert len({tuple(sorted(taken(seed).items())) for seed in (None, 0, 1, 2)}) > 2
    assert taken(1) == taken(1)


@given(
    weights=st.lists(st.floats(0.1, 5), min_size=2, max_size=4),
    tokens=st.integers(1, 400),
    window=st.integers(1, 16),
)
def test_shares_of_the_tokens_are_the_weights(weights: list[float], tokens: int, window: int) -> None:
    rows = ["abcdefgh" * 3, "ab", "abcdefg"] * 40
    sources = [Source(str(number), weight=weight, given=rows) for number, weight in enumerate(weights)]
    found = batches(sources, TOKENIZER, window=window, tokens=tokens, ahead=0)
    assert sum(len(part) for _, part in documents_in(found)) == tokens
    for number, weight in enumerate(weights):
        expected = tokens * weight / sum(weights)
        # The stream that is furthest behind is next: ahead by a piece at most, behind by one of every other.
        assert abs(found.counts.tokens[str(number)] - expected) <= window * len(weights)


def test_a_weighted_mix_ends_with_its_first_source_and_another_goes_on() -> None:
    short, long = ["ab"] * 4, ["ab"] * 40
    weighted = [Source("short", weight=1, given=short), Source("long", weight=2, given=long)]
    for sources, expected in ((weighted, {"short": 12, "long": 24}), ({"short": short, "long": long}, None)):
        found = batches(sources, TOKENIZER, ahead=0)
        list(found)
        assert found.counts.tokens == (expected or {"short": 12, "long": 120})
        assert found.counts.ended[0] == "short"


def test_samples_are_whole_rows_and_tokens_are_exact() -> None:
    rows = ["abcdefgh" * 2, "abc"] * 10
    found = batches({"x": rows}, TOKENIZER, window=6, samples=3, ahead=0)
    assert sum(len(tokens) for _, tokens in documents_in(found)) == 17 + 4 + 17
    assert found.counts.split == 2
    found = batches({"x": rows, "y": rows}, TOKENIZER, samples=3, ahead=0)
    assert len(documents_in(found)) == 3
    found = batches({"x": rows}, TOKENIZER, tokens=20, ahead=0)
    assert [len(tokens) for _, tokens in documents_in(found)] == [17, 3]
    assert (found.counts.cut, found.counts.tokens_cut) == (1, 1)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("abcdefg. abc", 9),  # BOS and the sentence
        ("abcdefgh\nabc", 10),
        ("ab. abcdefghabc", 10),  # its end is in the window's first half
        ("abcdefgh.abc", 10),  # a dot within a word
        ('abcd." abcdefg', 7),
        ("abcdefghab", 10),
        ("abcdefgh.", 10),
    ],
)
def test_a_long_row_is_cut_after_a_sentence_and_counted(text: str, kept: int) -> None:
    found = batches({"x": [text]}, TOKENIZER, window=10, long="cut", ahead=0)
    ((_, tokens),) = documents_in(found)
    assert tokens == TOKENIZER(text)["input_ids"][:kept]
    lost = len(text) + 1 - kept
    assert (found.counts.cut, found.counts.tokens_cut) == (int(lost > 0), lost)


def test_packed_rows_are_full() -> None:
    rng = random.Random(1)
    rows = ["".join(rng.choices(LETTERS, k=rng.randint(1, 31))) for _ in range(400)]
    packed = list(batches({"x": rows}, TOKENIZER, window=32, batch_size=8, packing=True, ahead=0))
    places = sum(batch["input_ids"].numel() for batch in packed)
    assert sum(int(batch["counted"].sum()) for batch in packed) / places > 0.95
    padded = batches({"x": rows}, TOKENIZER, window=32, batch_size=8, ahead=0)
    places = sum(batch["input_ids"].numel() for batch in padded)
    assert sum(int(batch["attention_mask"].sum()) for batch in padded) / places > 0.8  # neighbours in length


def test_nothing_is_read_that_is_not_needed() -> None:
    read = Counter[str]()

    def endless() -> Iterator[str]:
        while True:
            read["rows"] += 1
            yield "abc"

    found = batches({"x": endless()}, TOKENIZER, samples=5, ahead=0)
    assert len(documents_in(found)) == 5
    assert read["rows"] == 5
    first = next(iter(batches({"x": endless()}, TOKENIZER, window=4, batch_size=2, ahead=0)))
    assert first["input_ids"].shape == (2, 4)
    assert read["rows"] < 5 + 256 + POOL * 2 + 1


def test_a_process_ahead_gives_the_same_and_leaves_the_callers_numbers_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 40)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    here, there = (batches(tmp_path / "a.txt", TOKENIZER, window=8, ahead=depth) for depth in (0, 3))
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one if name != "domain")
    assert here.counts == there.counts
    assert torch.equal(torch.rand(1), expected)


def test_a_process_ahead_is_ahead_by_so_much_and_ends_with_its_reader() -> None:
    def numbers() -> Iterator[tuple[int, int]]:
        for number in range(10**9):
            yield number, os.getpid()

    items = made_ahead(numbers, 2)
    found = list(islice(items, 5))
    assert [number for number, _ in found] == list(range(5))
    process = found[0][1]
    assert process != os.getpid()
    items.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_process_ahead_that_is_killed_is_an_error() -> None:
    def killed() -> Iterator[int]:
        yield 1
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"killed|exited unexpectedly"):
        list(made_ahead(killed, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window: expected a whole number of 1 or more, got 0"),
        ({"batch_tokens": 2.5}, "batch_tokens: expected a whole number of 1 or more, got 2.5"),
        ({"tokens": 0}, "tokens: "),
        ({"samples": -1}, "samples: "),
        ({"ahead": -1}, "ahead: expected a whole number of 0 or more"),
        ({"seed": "a"}, "seed: expected a whole number, got 'a'"),
        ({"long": "truncate"}, "long: expected 'split' or 'cut', got 'truncate'"),
    ],
)
def test_sizes_that_are_wrong_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches({"x": ["a"]}, TOKENIZER, **arguments)


def test_a_column_that_names_countless_domains_is_refused() -> None:
    rows = [{"text": "ab", "id": str(number)} for number in range(70)]
    with pytest.raises(ValueError, match="the domain column names more than 64 domains"):
        list(batches({"x": rows}, TOKENIZER, columns="domain=id", ahead=0))


def test_arrays_of_the_process_are_tensors_here() -> None:
    (batch,) = batches({"x": ["ab"]}, TOKENIZER)
    assert isinstance(batch["input_ids"], torch.Tensor)
    assert batch["domain"] == "x"
