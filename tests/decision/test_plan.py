"""Plans keep the best experts, hold together, and their files come back equal or are refused with one clear line."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ext.decision.criteria import Scores
from moe_ext.decision.plan import plan
from moe_ext.decision.pruning_plan import PlanFileError, PruningPlan
from moe_ext.version import __version__
from tests.support.scores import scored

PLAN = PruningPlan("mixtral", 4, 2, ("layers.0", "layers.1"), ((0, 1, 3), (1, 2)), {"criterion": "man"})


@st.composite
def score_tables(draw: st.DrawFn) -> list[list[float]]:
    """Few distinct values, so that ties are common."""
    experts = draw(st.integers(1, 8))
    value = st.sampled_from([0.0, -0.0, 1.0, 2.0, 0.5, -3.0, math.inf])
    return draw(st.lists(st.lists(value, min_size=experts, max_size=experts), min_size=1, max_size=3))


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    experts = draw(st.integers(1, 8))
    top_k = draw(st.integers(1, experts))
    names = draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3, unique=True))
    kept = st.sets(st.integers(0, experts - 1), min_size=top_k).map(lambda chosen: tuple(sorted(chosen)))
    value = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
    )
    made_by = st.dictionaries(st.text(max_size=5), value | st.lists(value, max_size=2), max_size=3)
    return PruningPlan("m", experts, top_k, tuple(names), tuple(draw(kept) for _ in names), draw(made_by))


def edited(**changes: object) -> str:
    """The JSON of a valid plan with fields changed; ``...`` removes one."""
    fields: dict[str, Any] = json.loads(PLAN.to_json()) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...})


@given(table=score_tables(), data=st.data())
def test_the_lowest_score_goes_first_and_of_equals_the_higher_index(
    table: list[list[float]], data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, len(table[0])))
    made = plan(scored(table), keep=keep)
    for row, kept in zip(table, made.keep, strict=True):
        left = list(range(len(row)))
        while len(left) > keep:
            lowest = min(row[expert] for expert in left)
            left.remove(max(expert for expert in left if row[expert] == lowest))
        assert list(kept) == left


@pytest.mark.parametrize(
    ("ratio", "experts", "removed"),
    [(0, 8, 0), (0.25, 8, 2), (0.5, 8, 4), (0.49, 128, 63), (0.3, 5, 2), (0.1, 4, 0), (0.125, 4, 1), (1 / 3, 60, 20)],
)
def test_a_ratio_removes_its_share_rounded_half_up(ratio: float, experts: int, removed: int) -> None:
    made = plan(scored([[float(expert) for expert in range(experts)]]), ratio=ratio)
    assert made.removed(0) == tuple(range(removed))


def test_keeping_every_expert_removes_none() -> None:
    assert plan(scored([[1.0, 2.0]]), keep=2).removed(0) == ()


def test_a_plan_says_how_it_was_made() -> None:
    scores = scored([[1.0, 2.0]])
    assert plan(scores, keep=1).made_by == {"criterion": "man", "dataset": "c4", "keep": 1, "moe_ext": __version__}
    assert plan(scores, ratio=0.5).made_by == {
        "criterion": "man",
        "dataset": "c4",
        "ratio": 0.5,
        "moe_ext": __version__,
    }


def test_a_plan_is_for_the_model_of_its_scores() -> None:
    made = plan(scored([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], top_k=2), keep=2)
    assert (made.model_type, made.num_experts, made.top_k) == ("mixtral", 3, 2)
    assert made.layers == ("layers.0", "layers.1")


@pytest.mark.parametrize("arguments", [{}, {"keep": 1, "ratio": 0.5}])
def test_keep_and_ratio_are_alternatives(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected exactly one of keep and ratio"):
        plan(scored([[1.0, 2.0]]), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 1}, "keep: 1 keeps 1 of 4 experts; expected 2 to 4"),
        ({"keep": 5}, "keep: 5 keeps 5 of 4 experts; expected 2 to 4"),
        ({"ratio": 0.75}, "ratio: 0.75 keeps 1 of 4 experts; expected 2 to 4"),
        ({"ratio": 1.0}, r"ratio: expected a share in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, r"ratio: expected a share in \[0, 1\), got -0.1"),
        ({"ratio": math.nan}, r"ratio: expected a share in \[0, 1\), got nan"),
    ],
)
def test_an_impossible_number_of_experts_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(scored([[1.0, 2.0, 3.0, 4.0]], top_k=2), **arguments)


def test_a_nan_score_is_refused_with_its_layer() -> None:
    with pytest.raises(ValueError, match=r"layer 'layers.1' has a NaN score for expert 2"):
        plan(scored([[1.0, 2.0, 3.0], [1.0, 2.0, math.nan]]), keep=2)
    with pytest.raises(ValueError, match=r"layer 'layers.0' has an infinite score for expert 0"):
        plan(scored([[math.inf, 2.0, 3.0], [1.0, 2.0, 3.0]]), keep=2, scope="model")


@given(made=plans())
def test_kept_and_removed_experts_are_all_experts(made: PruningPlan) -> None:
    for layer, kept in enumerate(made.keep):
        assert sorted((*kept, *made.removed(layer))) == list(range(made.num_experts))


def grouped(values: list[list[float]], groups: int, fewest: int, top_k: int = 1) -> Scores:
    scores = scored(values, top_k=top_k)
    return replace(scores, layout=replace(scores.layout, groups=groups, fewest=fewest))


def test_every_group_loses_the_same_number_its_lowest_first() -> None:
    made = plan(grouped([[0.1, 0.2, 0.3, 0.4, 9.0, 8.0, 7.0, 6.0]], groups=2, fewest=2), keep=4)
    assert made.keep == ((2, 3, 4, 5),)
    assert plan(grouped([[1.0] * 8], groups=2, fewest=2), ratio=0.5).keep == ((0, 1, 4, 5),)  # ties, in each group


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 5}, "keep: 5 keeps 5 experts, which 2 groups do not share equally"),
        ({"keep": 2}, r"keep: 2 keeps 2 of 8 experts; expected 4 to 8 \(what the router needs to all\)"),
        ({"keep": 2, "scope": "model"}, r"keep: 2 keeps 2 of 8 experts; expected 4 to 8"),
    ],
)
def test_a_number_that_the_groups_do_not_allow_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(grouped([[1.0] * 8], groups=2, fewest=4), **arguments)


@pytest.mark.parametrize("normalise", ["sum", "max"])
def test_a_layer_that_no_token_reached_goes_first(normalise: str) -> None:
    made = plan(scored([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), keep=2, scope="model", normalise=normalise)
    assert made.keep == ((0, 1, 2), (0,))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_broken_number_to_keep_is_refused(scope: str) -> None:
    with pytest.raises(ValueError, match=r"keep: expected a whole number, got 2\.5"):
        plan(scored([[1.0] * 4] * 2), keep=2.5, scope=scope)  # type: ignore[arg-type]


def test_one_ranking_over_all_layers_by_hand() -> None:
    table = [[0.1, 0.2, 0.3, 0.4], [10.0, 20.0, 30.0, 940.0], [5.0, 5.0, 5.0, 5.0]]
    raw = plan(scored(table), keep=3, scope="model", normalise="none")
    assert raw.keep == ((3,), (0, 1, 2, 3), (0, 1, 2, 3))  # the smallest layer is emptied down to its floor
    by_sum = plan(scored(table), ratio=0.25, scope="model")  # shares: .1 .2 .3 .4, .01 .02 .03 .94, .25 each
    assert by_sum.keep == ((0, 1, 2, 3), (3,), (0, 1, 2, 3))
    by_max = plan(scored(table), keep=2, scope="model", normalise="max")  # .25 .5 .75 1, .01 .02 .03 1, 1 each
    assert by_max.keep == ((3,), (3,), (0, 1, 2, 3))
    assert by_sum.made_by["scope"] == "model"
    assert by_sum.made_by["normalise"] == "sum"


@settings(max_examples=60)
@given(data=st.data())
def test_one_ranking_over_all_layers_removes_one_at_a_time(data: st.DataObject) -> None:
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 5))
    value = st.sampled_from([0.0, 1.0, 2.0, 0.5])
    table = data.draw(st.lists(st.lists(value, min_size=experts, max_size=experts), min_size=layers, max_size=layers))
    top_k = data.draw(st.integers(1, experts))
    keep = data.draw(st.integers(top_k, experts))
    made = plan(scored(table, top_k=top_k), keep=keep, scope="model", normalise="none")
    left = [(score, layer, expert) for layer, row in enumerate(table) for expert, score in enumerate(row)]
    while len(left) > keep * layers:
        sizes = [sum(entry[1] == layer for entry in left) for layer in range(layers)]
        removable = [entry for entry in left if sizes[entry[1]] > top_k]
        left.remove(min(removable, key=lambda entry: (entry[0], -entry[1], -entry[2])))
    for layer, kept in enumerate(made.keep):
        assert list(kept) == [expert for _, of, expert in left if of == layer]


def test_one_ranking_over_all_layers_takes_a_group_step_at_a_time() -> None:
    # Steps, lowest of each group together: layer a (1 + 5) / 2 = 3, (2 + 6) / 2 = 4; layer b (0 + 7) / 2 = 3.5, 8.
    table = [[1.0, 2.0, 6.0, 5.0], [9.0, 0.0, 7.0, 7.0]]
    made = plan(grouped(table, groups=2, fewest=2), keep=3, scope="model", normalise="none")
    assert made.keep == ((1, 2), (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "global"}, "scope: expected layer or model, got 'global'"),
        ({"scope": "model", "normalise": "mean"}, "normalise: expected one of sum, max, none, got 'mean'"),
        ({"normalise": "sum"}, "normalise: expected none with scope 'layer', got 'sum'"),
    ],
)
def test_an_unknown_scope_or_normalisation_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(scored([[1.0, 2.0]]), keep=1, **arguments)


def test_a_layer_that_does_not_exist_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        PLAN.removed(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "layers: expected one or more distinct names"),
        ({"layers": ["layers.0", "layers.0"]}, "layers: expected one or more distinct names"),
        ({"keep": [[0, 1]]}, "keep: expected one entry for each of 2 layers, got 1"),
        ({"keep": [[0, 1], [0]]}, "keep: layer 'layers.1': expected at least top_k = 2 experts, got 1"),
        ({"keep": [[0, 1], [2, 4]]}, "keep: layer 'layers.1': expected 0 to 3, got expert 4"),
        ({"keep": [[-1, 1], [2, 3]]}, "keep: layer 'layers.0': expected 0 to 3, got expert -1"),
        ({"keep": [[1, 1], [2, 3]]}, "keep: layer 'layers.0': expected ascending indices, each once"),
        ({"keep": [[0, 1], [3, 2]]}, "keep: layer 'layers.1': expected ascending indices, each once"),
        ({"keep": [[0, 1], [2, 3.0]]}, "keep: layer 'layers.1': expected a tuple of integers"),
        ({"keep": [[0, 1], [False, True]]}, "keep: layer 'layers.1': expected a tuple of integers"),
        ({"keep": [[0, 1], 3]}, "keep: layer 'layers.1': expected a tuple of integers"),
        ({"top_k": 0}, "top_k: expected 1 to 4 experts, got 0"),
        ({"top_k": 5}, "top_k: expected 1 to 4 experts, got 5"),
        ({"format": ...}, "not a pruning plan"),
        ({"format": "moe_ext.expert_statistics"}, "not a pruning plan"),
        ({"format_version": 3}, "written by a newer moe_ext .*upgrade"),
        ({"format_version": 0}, "format_version: expected 1 to 2, got 0"),
        ({"format_version": "1"}, "format_version: expected 1 to 2, got '1'"),
        ({"format_version": True}, "format_version: expected 1 to 2, got True"),
        ({"format_version": ...}, "format_version: expected 1 to 2, got None"),
        ({"model_type": 3}, "model_type: expected a JSON str, got 3"),
        ({"num_experts": 4.0}, "num_experts: expected a JSON int, got 4.0"),
        ({"top_k": True}, "top_k: expected a JSON int, got True"),
        ({"layers": [0, 1]}, "layers: expected names"),
        ({"keep": {"layers.0": [0, 1]}}, "keep: expected a JSON list"),
        ({"made_by": None}, "made_by: expected a JSON dict, got None"),
        ({"made_by": ...}, "field 'made_by' is missing"),
        ({"keep": ...}, "field 'keep' is missing"),
        ({"keeps": []}, "field 'keeps' is not part of format version 2"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanFileError, match=message):
        PruningPlan.from_json(edited(**changes))


def test_a_plan_in_memory_keeps_tuples() -> None:
    with pytest.raises(ValueError, match="layer 'a': expected a tuple of integers"):
        PruningPlan("m", 2, 1, ("a",), ([0, 1],))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, math.nan, math.inf, b"", {"a": object()}])
def test_made_by_holds_json_values_only(value: object) -> None:
    with pytest.raises(ValueError, match="made_by: expected a dict of JSON values"):
        PruningPlan("m", 2, 1, ("a",), ((0,),), {"value": value})


@given(made=plans())
def test_json_comes_back_equal(made: PruningPlan) -> None:
    assert PruningPlan.from_json(made.to_json()) == made


@settings(max_examples=25)
@given(made=plans())
def test_a_saved_plan_loads_equal(tmp_path_factory: pytest.TempPathFactory, made: PruningPlan) -> None:
    path = tmp_path_factory.getbasetemp() / "plan.json"
    made.save(path)
    assert PruningPlan.load(path) == made


def test_the_file_is_json_with_a_field_a_line(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == (
        "{\n"
        '  "format": "moe_ext.pruning_plan",\n'
        '  "format_version": 2,\n'
        '  "model_type": "mixtral",\n'
        '  "num_experts": 4,\n'
        '  "top_k": 2,\n'
        '  "layers": ["layers.0", "layers.1"],\n'
        '  "keep": [[0, 1, 3], [1, 2]],\n'
        '  "made_by": {"criterion": "man"}\n'
        "}\n"
    )


def test_a_plan_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    whole = path.read_bytes()
    for length in range(len(whole) - 2):  # the last two bytes are the brace and the newline
        path.write_bytes(whole[:length])
        with pytest.raises(PlanFileError, match=r"plan\.json: truncated, or not JSON"):
            PruningPlan.load(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b"NaN", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanFileError, match=r"plan\.json: "):
        PruningPlan.load(path)


def test_a_number_that_json_does_not_have_is_refused() -> None:
    with pytest.raises(PlanFileError, match=r"not JSON .NaN is not JSON"):
        PruningPlan.from_json(edited(made_by={"ratio": math.nan}))


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PruningPlan.load(tmp_path / "absent.json")


def test_an_interrupted_save_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, text: str, encoding: str) -> int:
        with path.open("w", encoding=encoding) as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    path = tmp_path / "plan.json"
    PLAN.save(path)
    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        PruningPlan("m", 2, 1, ("a",), ((0,),)).save(path)
    assert PruningPlan.load(path) == PLAN
    assert os.listdir(tmp_path) == ["plan.json"]
