"""Batches of every kind that people have: taken, with the same result, or refused by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding

import moe_ext
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.runtime.batches import as_batch, check_batch
from moe_ext.runtime.packing import packs
from tests.support import every_family
from tests.support.batches import random_tokens
from tests.support.letters import LETTERS, letter_tokenizer
from tests.support.mixtral import MixtralFactory

NEEDS = "needs the extra data: pip install '.[test]'"
datasets = pytest.importorskip("datasets", reason=NEEDS)

TOKENS = random_tokens(3, 9)
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7])  # right and left padding
ROWS = {"input_ids": TOKENS.tolist(), "attention_mask": MASK.tolist()}


def statistics(model: Any, batches: Any) -> ExpertStatistics:
    return moe_ext.calibrate(model, batches, progress=False)


def four_dimensional(additive: bool) -> torch.Tensor:
    """(3, 1, 9, 9): the mask above and causal; tokens that are padding see nothing."""
    sees = torch.ones(9, 9).tril().bool() & MASK[:, None, :].bool() & MASK[:, :, None].bool()
    return torch.where(sees, 0.0, torch.finfo(torch.float32).min)[:, None] if additive else sees[:, None]


def padding_tokenizer() -> Any:
    tokenizer = letter_tokenizer(bos=False)
    tokenizer.pad_token = LETTERS[0]
    return tokenizer


SAME: dict[str, Callable[[], Any]] = {
    "lists": lambda: [ROWS],
    "numpy": lambda: [{"input_ids": TOKENS.numpy(), "attention_mask": MASK.numpy().astype(np.int8)}],
    "int32 and bool": lambda: [{"input_ids": TOKENS.int(), "attention_mask": MASK.bool()}],
    "a mask of floats": lambda: [{"input_ids": TOKENS, "attention_mask": MASK.float()}],
    "a data set": lambda: datasets.Dataset.from_dict(ROWS).with_format("torch").iter(3),
    "a data set of lists": lambda: datasets.Dataset.from_dict(ROWS).iter(3),
    "a data loader": lambda: DataLoader(datasets.Dataset.from_dict(ROWS).with_format("torch"), batch_size=3),
    "a padding collator": lambda: DataLoader(
        [{"input_ids": row[kept.bool()].tolist()} for row, kept in zip(TOKENS, MASK, strict=True)],  # type: ignore[arg-type]
        batch_size=3,
        collate_fn=DataCollatorWithPadding(padding_tokenizer()),
    ),
    "one row at a time": lambda: [
        {"input_ids": row[kept.bool()].tolist()} for row, kept in zip(TOKENS, MASK, strict=True)
    ],
    "tokens alone": lambda: [row[kept.bool()].numpy() for row, kept in zip(TOKENS, MASK, strict=True)],
    "lists of tokens alone": lambda: [row[kept.bool()].tolist() for row, kept in zip(TOKENS, MASK, strict=True)],
    "rows of a data set": lambda: datasets.Dataset.from_list(
        [{"input_ids": row[kept.bool()].tolist()} for row, kept in zip(TOKENS, MASK, strict=True)]
    ),
    "packed by transformers": lambda: [
        DataCollatorWithFlattening(return_seq_idx=False)(
            [{"input_ids": row[kept.bool()].tolist()} for row, kept in zip(TOKENS, MASK, strict=True)]
        )
    ],
    "who sees whom": lambda: [{"input_ids": TOKENS, "attention_mask": four_dimensional(additive=False)}],
    "who sees whom, added": lambda: [{"input_ids": TOKENS, "attention_mask": four_dimensional(additive=True)}],
    "what counts": lambda: [
        {"input_ids": TOKENS, "attention_mask": four_dimensional(additive=True), "counted": MASK.bool()}
    ],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return every_family.build("mixtral")


@pytest.fixture(scope="module")
def expected(model: Any) -> ExpertStatistics:
    return statistics(model, [{"input_ids": TOKENS, "attention_mask": MASK}])


@pytest.mark.parametrize("kind", SAME.values(), ids=SAME.keys())
def test_every_kind_gives_the_same_statistics(model: Any, expected: ExpertStatistics, kind: Callable[[], Any]) -> None:
    found = statistics(model, kind())
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.coactivation, expected.coactivation)
    # Sequences in other batches and places round differently; float32 has 24 bits.
    torch.testing.assert_close(found.moments, expected.moments, rtol=1e-4, atol=1e-6)


REFUSED: dict[str, tuple[Any, str]] = {
    "a text": (
        "ab",
        "is a text, not tokens; texts and rows of data sets are made into batches by moe_ext.data.batches",
    ),
    "a row of text": (
        {"text": "ab"},
        r"is no mapping with 'input_ids': it has \['text'\]; texts and rows of data sets",
    ),
    "a list of rows": ([{"input_ids": [1]}], "is a list of dict; expected a mapping with 'input_ids'"),
    "a tuple of tensors": ((TOKENS, MASK), "is a tuple of Tensor; expected a mapping"),
    "nothing": (None, "is no mapping with 'input_ids': NoneType"),
    "ragged lists": ({"input_ids": [[1, 2], [3]]}, "'input_ids' has rows of different lengths; pad them to one"),
    "ragged arrays": (
        {"input_ids": np.array([np.array([1, 2]), np.array([3])], dtype=object)},
        "'input_ids' has rows of different lengths",
    ),
    "a list of tensors": (
        {"input_ids": [torch.ones(2), torch.ones(2)]},
        "'input_ids' is a list of tensors; expected one",
    ),
    "lists of words": ({"input_ids": [["a", "b"]]}, "'input_ids' holds no numbers"),
    "floats": ({"input_ids": [[0.5, 1.0]]}, "has tokens of torch.float32; expected int32 or int64"),
    "bytes": ({"input_ids": TOKENS.to(torch.uint8)}, "has tokens of torch.uint8; expected int32 or int64"),
    "a window too many": ({"input_ids": TOKENS[None]}, r"'input_ids' has shape \(1, 3, 9\); expected \(sequences, tok"),
    "a mask of three dimensions": (
        {"input_ids": TOKENS, "attention_mask": torch.ones(3, 9, 9)},
        r"'attention_mask' has shape \(3, 9, 9\); expected \(3, 9\), or 4 dimensions \(batch, 1, tokens, tokens\)",
    ),
    "a mask of other tokens": (
        {"input_ids": TOKENS, "attention_mask": torch.ones(3, 1, 8, 9)},
        r"'attention_mask' has shape \(3, 1, 8, 9\); expected \(3, 1, 9, 9\)",
    ),
    "a mask of numbers": (
        {"input_ids": TOKENS, "attention_mask": torch.ones(3, 1, 9, 9).long()},
        "'attention_mask' of 4 dimensions is torch.int64; expected bool, or floats that are added",
    ),
    "a count of other tokens": (
        {"input_ids": TOKENS, "counted": torch.ones(3, 8)},
        r"'counted' has shape \(3, 8\); expected \(3, 9\)",
    ),
}


@pytest.mark.parametrize(("batch", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_taken_is_refused_by_name(model: Any, batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^batch 1:? {message}"):
        statistics(model, [TOKENS, batch])


def test_a_batch_that_is_one_already_is_not_copied() -> None:
    batch = {"input_ids": TOKENS, "attention_mask": MASK}
    again = as_batch(0, batch)
    assert all(again[name] is tensor for name, tensor in batch.items())


def test_all_jobs_read_every_kind(tiny_mixtral: MixtralFactory) -> None:
    small = tiny_mixtral(num_hidden_layers=1)
    kinds: list[Any] = [[1, 2, 3], {"input_ids": np.array([[4, 5, 6]]), "domain": "x"}]
    result = moe_ext.search(small, kinds, keep=7, progress=False)
    moe_ext.prune(small, result.plan, refit=kinds)
    assert check_batch(0, kinds[1], small).counted is None


# Of families that were seen to keep rows apart, and not: a wrong answer in either direction is worse than the names.
APART = ("mixtral", "qwen3_moe", "deepseek_v3", "gemma4")
MIXED = ("jamba", "qwen3_next", "gpt_oss", "deepseek_v4", "lfm2_moe")


@pytest.mark.parametrize(("family", "apart"), [*((name, True) for name in APART), *((name, False) for name in MIXED)])
def test_whether_a_model_keeps_packed_rows_apart_is_found_out(family: str, apart: bool) -> None:
    model = every_family.build(family)
    before = model.training
    assert packs(model) == apart
    assert packs(model.to(torch.bfloat16)) == apart
    assert model.training == before


def test_packed_statistics_are_those_of_rows_alone() -> None:
    model = every_family.build("qwen3_moe")
    rows = {"x": ["".join(LETTERS[(index + number) % 8] for index in range(number % 11 + 1)) for number in range(30)]}
    tokenizer = letter_tokenizer(bos=False)
    alone = statistics(model, moe_ext.data.batches(rows, tokenizer, window=16, batch_size=1, ahead=0))
    packed = statistics(model, moe_ext.data.batches(rows, tokenizer, window=16, batch_size=4, packing=True, ahead=0))
    assert torch.equal(packed.tokens, alone.tokens)
    assert torch.equal(packed.coactivation, alone.coactivation)
    torch.testing.assert_close(packed.moments, alone.moments, rtol=1e-4, atol=1e-6)
