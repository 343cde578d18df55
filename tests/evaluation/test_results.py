"""Measurements of variants are read from every file that holds some; the Pareto front is what brute force says."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.evaluation.results import Variant, VariantsFileError, read_variants
from moe_ext.report.figures import pareto
from tests.support.paths import ROOT


def test_the_demos_rows_are_variants_with_relative_speeds() -> None:
    variants = read_variants(sorted((ROOT / "benchmarks" / "results").glob("*-demo.json"))[-1])
    assert variants[0].name == "unpruned, transformers"
    assert {each.speed_unit for each in variants} == {"x"}
    assert all(each.perplexity > 1 and each.weight_bytes for each in variants)


def test_a_comparison_and_an_evaluation_are_variants(tmp_path: Path) -> None:
    row = {"checkpoint": "a", "mean": 5.0, "weight_bytes": 12, "tokens_per_second": 3.5, "more": None}
    (tmp_path / "compare.json").write_text(json.dumps({"checkpoints": [row, {**row, "checkpoint": "b"}]}))
    (tmp_path / "eval.json").write_text(json.dumps({"checkpoint": "c", "mean": 6.0, "weight_bytes": None}))
    assert read_variants(tmp_path / "compare.json") == [Variant("a", 5.0, 12, 3.5), Variant("b", 5.0, 12, 3.5)]
    assert read_variants(tmp_path / "eval.json") == [Variant("c", 6.0)]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"rows": []}', '{"rows": [{"name": "a"}]}', '{"checkpoints": 3}'])
def test_other_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(VariantsFileError, match=r"other\.json: "):
        read_variants(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": float("nan")}, "NaN is not JSON"),
        ({"mean": None}, "'a': perplexity is None; expected a finite positive number"),
        ({"mean": True}, "perplexity is True"),
        ({"mean": -1.0}, "perplexity is -1.0"),
        ({"mean": "5"}, "perplexity is '5'"),
        ({"mean": 10**400}, "perplexity is 1000"),
        ({"weight_bytes": 1.5}, "weight_bytes is 1.5; expected a finite positive whole number"),
        ({"weight_bytes": -1}, "weight_bytes is -1"),
        ({"tokens_per_second": 0}, "speed is 0"),
        ({"tokens_per_second": [1]}, r"speed is \[1\]"),
        ({"checkpoint": 3}, "name: expected a text, got 3"),
        ({"checkpoint": "x" * 100_000, "mean": 0}, "perplexity is 0"),
    ],
)
def test_measurements_that_cannot_be_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {"checkpoint": "a", "mean": 5.0, "weight_bytes": 12, "tokens_per_second": 3.5}
    (tmp_path / "compare.json").write_text(json.dumps({"checkpoints": [{**row, **change}]}))
    with pytest.raises(VariantsFileError, match=rf"compare\.json: .*{message}") as refused:
        read_variants(tmp_path / "compare.json")
    assert len(str(refused.value)) <= 500


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_beats(whole: list[tuple[int, int]]) -> None:
    points = [(float(cost), float(loss)) for cost, loss in whole]
    unbeaten = [
        point for point in points if not any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)
    ]
    front = pareto(points)
    assert [points[index] for index in front] == sorted(set(unbeaten))
    assert all(points.index(points[index]) == index for index in front)
