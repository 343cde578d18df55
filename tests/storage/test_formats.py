"""JSON is read strictly, values are quoted briefly, and a file's message never exceeds its bound."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.storage.dated_results import write_result
from moe_ext.storage.formats import MOST_CHARACTERS, FileFormatError, parse_json, shortened, shown


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_json_of_any_value_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "truncated, or not JSON"),
        (b"\xff", "truncated, or not JSON"),
        ("[NaN]", "NaN is not JSON"),
        ("[1e400]", "1e400 is beyond float64"),
        ('{"a": 1, "a": 2}', "'a' twice in an object"),
        (r'{"\ud800": 1}', "half of a character"),
        ("[" * 100_000, "nested too deeply|truncated"),
        ("9" * 5000, "truncated, or not JSON"),
        ('{"a": ' + "x" * 100_000, "truncated, or not JSON"),
    ],
)
def test_json_that_readers_take_differently_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        parse_json(text)
    assert len(str(refused.value)) <= 200


def test_a_result_has_null_where_a_number_is_none(tmp_path: Path) -> None:
    write_result(tmp_path / "r.json", "numbers", rows=[{"mean": float("nan"), "of": (1.5, float("inf"), 2, "NaN")}])
    assert parse_json((tmp_path / "r.json").read_bytes())["rows"] == [{"mean": None, "of": [1.5, None, 2, "NaN"]}]


def test_values_and_messages_are_short_and_keep_both_ends() -> None:
    assert shown("a") == "'a'"
    assert shown("a" * 1000).startswith("'aaa")
    assert len(shown(["name" * 1000] * 100)) == 80
    assert shown(10**5000) == "a number too long to be shown"
    text = str(FileFormatError("x" * 400_000 + "end"))
    assert len(text) == MOST_CHARACTERS
    assert text.endswith("end")
    assert shortened("short") == "short"
