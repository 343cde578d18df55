"""Statistics add up, and their files come back bit for bit or are refused with one clear line."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moe_ext.calibration.statistics import RATIO_BINS, ExpertStatistics, StatisticsFileError

TENSORS = ("moments", "tokens", "ratio_histogram", "coactivation", "output_pairs")
LABELS = ("model_type", "layers", "top_k", "gate", "dataset")
Slot = tuple[int, float, float]  # expert, gate weight, output norm
Routing = list[list[list[Slot]]]  # layers, tokens, K slots with the largest gate weight first


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """L, E, K, from one expert a token to all of them."""
    experts = draw(st.integers(1, 6))
    return draw(st.integers(1, 3)), experts, draw(st.integers(1, experts))


def filled(shape: tuple[int, int, int], seed: int, *, whole: bool = False, dataset: str = "c4") -> ExpertStatistics:
    """Statistics of random content; ``whole``: moments that are integers, which add without rounding."""
    layers, experts, top_k = shape
    stats = ExpertStatistics.zeros("mixtral", tuple(f"layers.{i}" for i in range(layers)), experts, top_k, "g", dataset)
    generator = torch.Generator().manual_seed(seed)
    for name in TENSORS:
        tensor = getattr(stats, name)
        tensor.copy_(torch.randint(0, 2**40, tensor.shape, generator=generator))
    if not whole:
        stats.moments *= torch.rand(stats.moments.shape, generator=generator, dtype=torch.float64)
    stats.moments[:, torch.rand(experts, generator=generator) < 0.3] = 0  # experts that no token reached
    return stats


def accumulated(routing: Routing, experts: int, top_k: int) -> ExpertStatistics:
    """The definitions of design.md, one slot at a time."""
    stats = ExpertStatistics.zeros("mixtral", tuple(f"layers.{i}" for i in range(len(routing))), experts, top_k, "g")
    for layer, tokens in enumerate(routing):
        for slots in tokens:
            stats.tokens[layer] += 1
            for rank, (expert, gate, norm) in enumerate(slots):
                for a in range(3):
                    for b in range(3):
                        stats.moments[layer, expert, a, b] += gate**a * norm**b
                for other, its_gate, its_norm in slots:
                    stats.coactivation[layer, expert, other] += 1
                    assert stats.output_pairs is not None
                    stats.output_pairs[layer, expert, other] += gate * norm * its_gate * its_norm
                if rank:
                    ratio_bin = min(RATIO_BINS - 1, int(gate / slots[0][1] * RATIO_BINS))
                    stats.ratio_histogram[layer, rank - 1, ratio_bin] += 1
    return stats


@st.composite
def routings(draw: st.DrawFn, layers: int, experts: int, top_k: int) -> Routing:
    gates = st.lists(st.floats(0.01, 1), min_size=top_k, max_size=top_k).map(
        lambda values: sorted(values, reverse=True)
    )
    norms = st.lists(st.floats(0, 100), min_size=top_k, max_size=top_k)
    chosen = st.permutations(range(experts)).map(lambda order: order[:top_k])
    token = st.tuples(chosen, gates, norms).map(lambda parts: list(zip(*parts, strict=True)))
    tokens = st.lists(token, min_size=6, max_size=6)
    return draw(st.lists(tokens, min_size=layers, max_size=layers))


def assert_identical(left: ExpertStatistics, right: ExpertStatistics) -> None:
    for name in LABELS:
        assert getattr(left, name) == getattr(right, name), name
    for name in TENSORS:
        ours, theirs = getattr(left, name), getattr(right, name)
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.contiguous().numpy().tobytes() == theirs.contiguous().numpy().tobytes(), name


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    """Change the tensors or the metadata of a statistics file."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "stats.safetensors"
    filled((2, 4, 2), seed=0).save(path)
    return path


def test_zeros_has_the_documented_shapes() -> None:
    stats = ExpertStatistics.zeros("mixtral", ("a", "b", "c"), 8, 3, "softmax")
    assert {name: tuple(getattr(stats, name).shape) for name in TENSORS} == {
        "moments": (3, 8, 3, 3),
        "tokens": (3,),
        "ratio_histogram": (3, 2, RATIO_BINS),
        "coactivation": (3, 8, 8),
        "output_pairs": (3, 8, 8),
    }
    assert (stats.num_layers, stats.num_experts) == (3, 8)


def test_zeros_accepts_one_expert_a_token() -> None:
    assert ExpertStatistics.zeros("m", ("a",), 4, 1, "g").ratio_histogram.shape == (1, 0, RATIO_BINS)


@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "message"),
    [
        ((), 4, 2, "layers: expected one or more distinct names"),
        (("a", "a"), 4, 2, "layers: expected one or more distinct names"),
        (("a",), 4, 0, "top_k: expected 1 to 4 experts, got 0"),
        (("a",), 4, 5, "top_k: expected 1 to 4 experts, got 5"),
    ],
)
def test_impossible_sizes_are_refused(layers: tuple[str, ...], experts: int, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertStatistics.zeros("m", layers, experts, top_k, "g")


def test_a_tensor_of_another_dtype_is_refused() -> None:
    stats = filled((1, 4, 2), seed=0)
    with pytest.raises(ValueError, match=r"moments: is torch.float32 on cpu; expected torch.float64 on cpu"):
        ExpertStatistics(
            stats.layout, "g", "", stats.moments.float(), stats.tokens, stats.ratio_histogram, stats.coactivation
        )


@settings(max_examples=25)
@given(data=st.data(), shape=shapes())
def test_routing_counts_are_the_tokens_routed_to_each_expert(data: st.DataObject, shape: tuple[int, int, int]) -> None:
    layers, experts, top_k = shape
    routing = data.draw(routings(layers, experts, top_k))
    counts = [[sum(slot[0] == e for token in layer for slot in token) for e in range(experts)] for layer in routing]
    assert accumulated(routing, experts, top_k).routing_counts().tolist() == counts


def test_routing_counts_are_a_copy() -> None:
    stats = filled((1, 2, 1), seed=0)
    before = stats.moments.clone()
    stats.routing_counts().add_(1)
    assert torch.equal(stats.moments, before)


@settings(max_examples=25)
@given(data=st.data(), shape=shapes(), cut=st.integers(0, 6))
def test_merged_halves_equal_one_run_over_everything(
    data: st.DataObject, shape: tuple[int, int, int], cut: int
) -> None:
    layers, experts, top_k = shape
    routing = data.draw(routings(layers, experts, top_k))
    first, second = ([layer[part] for layer in routing] for part in (slice(cut), slice(cut, None)))
    merged = accumulated(first, experts, top_k) + accumulated(second, experts, top_k)
    whole = accumulated(routing, experts, top_k)
    for name in ("tokens", "ratio_histogram", "coactivation"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name
    # At most 6 non-negative terms in another order: 6 roundings of 2^-53 each.
    torch.testing.assert_close(merged.moments, whole.moments, rtol=6 * 2.0**-53 * 2, atol=0)


@given(shape=shapes(), seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_merging_is_commutative(shape: tuple[int, int, int], seeds: tuple[int, int]) -> None:
    left, right = filled(shape, seeds[0], dataset="c4"), filled(shape, seeds[1], dataset="math")
    assert_identical(left + right, right + left)


@given(shape=shapes(), seeds=st.tuples(*[st.integers(0, 99)] * 3), labels=st.tuples(*[st.sampled_from("abc")] * 3))
def test_merging_is_associative(
    shape: tuple[int, int, int], seeds: tuple[int, int, int], labels: tuple[str, str, str]
) -> None:
    first, second, third = (
        filled(shape, seed, whole=True, dataset=label) for seed, label in zip(seeds, labels, strict=True)
    )
    assert_identical((first + second) + third, first + (second + third))


def test_merging_with_zeros_changes_nothing() -> None:
    stats = filled((2, 4, 2), seed=1)
    assert_identical(stats + ExpertStatistics.zeros("mixtral", stats.layers, 4, 2, "g"), stats)


def test_merging_leaves_its_operands_alone() -> None:
    left, right = filled((2, 4, 2), seed=1), filled((2, 4, 2), seed=2)
    left.merge(right).moments.zero_()
    assert_identical(left, filled((2, 4, 2), seed=1))
    assert_identical(right, filled((2, 4, 2), seed=2))


@pytest.mark.parametrize(
    ("labels", "joined"),
    [
        (("c4", "c4"), "c4"),
        (("math", "C++"), "C++ + math"),
        (("", "c4"), "c4"),
        (("d + b", "c + b + a"), "a + b + c + d"),
    ],
)
def test_merging_joins_different_dataset_labels(labels: tuple[str, str], joined: str) -> None:
    left, right = (filled((1, 2, 1), seed=0, dataset=label) for label in labels)
    assert (left + right).dataset == joined


@pytest.mark.parametrize(
    ("differing", "other"),
    [
        ("model_type", ExpertStatistics.zeros("olmoe", ("a", "b"), 4, 2, "g")),
        ("layers", ExpertStatistics.zeros("mixtral", ("a", "c"), 4, 2, "g")),
        ("num_experts", ExpertStatistics.zeros("mixtral", ("a", "b"), 8, 2, "g")),
        ("top_k", ExpertStatistics.zeros("mixtral", ("a", "b"), 4, 1, "g")),
        ("gate", ExpertStatistics.zeros("mixtral", ("a", "b"), 4, 2, "sigmoid")),
    ],
)
def test_statistics_of_another_model_are_not_merged(differing: str, other: ExpertStatistics) -> None:
    with pytest.raises(ValueError, match=f"do not add up: {differing} "):
        ExpertStatistics.zeros("mixtral", ("a", "b"), 4, 2, "g").merge(other)


def test_adding_a_number_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        filled((1, 2, 1), seed=0) + 1


@settings(max_examples=25)
@given(shape=shapes(), seed=st.integers(0, 99), label=st.text(st.characters(codec="utf-8"), max_size=20))
def test_a_saved_file_loads_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int], seed: int, label: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    stats = filled(shape, seed, dataset=label)
    stats.moments[0, 0, 1] = torch.tensor([5e-324, -0.0, math.nextafter(math.inf, 0)], dtype=torch.float64)
    stats.save(path)
    assert_identical(ExpertStatistics.load(path), stats)


def test_views_are_saved_too(tmp_path: Path) -> None:
    stats = filled((2, 4, 2), seed=0)
    stats.coactivation = stats.coactivation.transpose(1, 2)
    stats.save(tmp_path / "stats.safetensors")
    assert_identical(ExpertStatistics.load(tmp_path / "stats.safetensors"), stats)


def test_loaded_statistics_do_not_follow_the_file(saved: Path) -> None:
    loaded = ExpertStatistics.load(saved)
    with saved.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(b"\xff" * 512)
    assert_identical(loaded, filled((2, 4, 2), seed=0))


def test_the_header_tells_a_reader_what_the_file_is(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "moe_ext.expert_statistics",
        "format_version": "2",
        "model_type": "mixtral",
        "layers": json.dumps(["layers.0", "layers.1"]),
        "top_k": "2",
        "gate": "g",
        "dataset": "c4",
        "token_count": str(filled((2, 4, 2), seed=0).tokens.max().item()),
        "groups": "1",
        "experts": json.dumps([4, 4]),
        "fewest": "2",
        "model_digest": "",
        "shards": "[]",
    }


def first_version(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Makes the content of a file that of one of format version 1."""
    del tensors["output_pairs"]
    metadata["format_version"] = "1"


def test_files_of_the_first_version_are_read_and_written_again(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, first_version)
    loaded = ExpertStatistics.load(saved)
    assert loaded.output_pairs is None
    for name in TENSORS[:-1]:
        assert torch.equal(getattr(loaded, name), getattr(filled((2, 4, 2), seed=0), name))
    assert (loaded + loaded).output_pairs is None
    with pytest.raises(ValueError, match="one of the two has output_pairs and the other has none"):
        loaded + filled((2, 4, 2), seed=0)
    loaded.save(tmp_path / "again.safetensors")  # as what it was
    assert_equal_throughout(ExpertStatistics.load(tmp_path / "again.safetensors"), loaded)
    with safe_open(tmp_path / "again.safetensors", framework="pt") as file:
        assert file.metadata()["format_version"] == "1"


def test_the_first_version_has_no_products_of_pairs(saved: Path) -> None:
    rewrite(saved, lambda _, metadata: metadata.update(format_version="1"))
    with pytest.raises(StatisticsFileError, match="tensor 'output_pairs' is not part of format version 1"):
        ExpertStatistics.load(saved)


# ---- groups, layers of different sizes, sums of outputs


def uneven(seed: int = 0, **changes: Any) -> ExpertStatistics:
    """Two layers of 6 and 4 experts in 2 groups, with sums of outputs of either sign."""
    fields = {"num_experts": (6, 4), "top_k": 2, "groups": 2, "fewest": 4, "hidden_size": 3, **changes}
    stats = ExpertStatistics.zeros("deepseek_v3", ("layers.1", "layers.2"), gate="g", **fields)
    generator = torch.Generator().manual_seed(seed)
    if stats.output_sum is not None:
        stats.output_sum.copy_(torch.randn(stats.output_sum.shape, generator=generator))
    stats.moments.copy_(torch.randint(0, 9, stats.moments.shape, generator=generator))
    return stats


def assert_equal_throughout(got: ExpertStatistics, expected: ExpertStatistics) -> None:
    for name, value in vars(expected).items():
        found = getattr(got, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


def test_everything_about_layers_comes_back_from_a_file(tmp_path: Path) -> None:
    stats = uneven()
    stats.save(tmp_path / "stats.safetensors")
    loaded = ExpertStatistics.load(tmp_path / "stats.safetensors")
    assert (loaded.groups, loaded.experts, loaded.fewest) == (2, (6, 4), 4)
    assert loaded.output_sum is not None
    assert_equal_throughout(loaded, stats)


def test_everything_about_layers_survives_a_merge() -> None:
    one, other = uneven(0), uneven(1)
    both = one + other
    assert (both.groups, both.experts, both.fewest) == (2, (6, 4), 4)
    assert both.output_sum is not None
    assert one.output_sum is not None
    assert other.output_sum is not None
    assert torch.equal(both.output_sum, one.output_sum + other.output_sum)
    assert torch.equal(both.moments, one.moments + other.moments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 1}, "groups 2 and 1"),
        ({"fewest": 2}, "fewest 4 and 2"),
        ({"num_experts": (4, 6)}, r"experts \(6, 4\) and \(4, 6\)"),
        ({"hidden_size": None}, "one of the two has output_sum and the other has none"),
        ({"hidden_size": 4}, "output_sum has 3 and 4 dimensions"),
    ],
)
def test_statistics_of_differently_made_models_do_not_merge(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"other: .*{message}"):
        uneven().merge(uneven(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 0}, r"groups: 0 groups of equal size do not hold \(6, 4\) experts"),
        ({"groups": 4}, r"groups: 4 groups of equal size do not hold \(6, 4\) experts"),
        ({"fewest": 5}, "fewest: expected 2 to 4 experts, got 5"),
        ({"fewest": 1}, "fewest: expected 2 to 4 experts, got 1"),
        ({"num_experts": (6,)}, r"experts: expected 2 numbers, the largest 6, got \(6,\)"),
        ({"num_experts": (6, 0)}, r"experts: expected 2 numbers, the largest 6, got \(6, 0\)"),
    ],
)
def test_numbers_of_experts_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uneven(**changes)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_sums_of_outputs_that_are_not_finite_are_not_saved(bad: float, tmp_path: Path) -> None:
    stats = uneven()
    assert stats.output_sum is not None
    stats.output_sum[1, 2, 0] = bad
    with pytest.raises(
        ValueError, match=r"output_sum: layer 'layers.2' holds \w+ at \[2, 0\]; expected finite values$"
    ):
        stats.save(tmp_path / "stats.safetensors")


def test_a_file_from_before_groups_and_uneven_layers_is_read(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in ("groups", "experts", "fewest")}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    safetensors.torch.save_file(tensors, saved, metadata)
    assert_equal_throughout(ExpertStatistics.load(saved), filled((2, 4, 2), seed=0))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("groups", "two", "metadata 'groups' is 'two'; expected an integer"),
        ("experts", "[4, 4.0]", "metadata 'experts' is .*; expected a JSON list of integers"),
        ("experts", "[4", "metadata 'experts' is .*; expected a JSON list of integers"),
        ("experts", "[4]", "experts: expected 2 numbers, the largest 4"),
        ("fewest", "5", "fewest: expected 2 to 4 experts, got 5"),
    ],
)
def test_a_file_with_broken_numbers_of_experts_is_refused(saved: Path, name: str, value: str, message: str) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = {**file.metadata(), name: value}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    safetensors.torch.save_file(tensors, saved, metadata)
    with pytest.raises(StatisticsFileError, match=rf"stats\.safetensors: {message}"):
        ExpertStatistics.load(saved)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 700, 10_000, -512, -8, -1])
def test_a_truncated_statistics_file_is_refused(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(StatisticsFileError, match=r"stats\.safetensors: truncated, or not a safetensors file"):
        ExpertStatistics.load(saved)


def test_a_file_with_trailing_bytes_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(StatisticsFileError, match="not a safetensors file"):
        ExpertStatistics.load(saved)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"moments": torch.ones(2)}, tmp_path / "stats.pt")
    with pytest.raises(StatisticsFileError, match="not a safetensors file"):
        ExpertStatistics.load(tmp_path / "stats.pt")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save({"weight": torch.ones(2, 2)}, metadata))
    with pytest.raises(StatisticsFileError, match=r"model\.safetensors: not a statistics file"):
        ExpertStatistics.load(path)


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ExpertStatistics.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "4"}, "written by a newer moe_ext .*upgrade"),
        ({"format_version": "0"}, "format_version: expected 1 to 3, got 0"),
        ({"format_version": ""}, "format_version: expected 1 to 3, got ''"),
        ({"format_version": "one"}, "format_version: expected 1 to 3, got 'one'"),
        ({"top_k": "two"}, "'top_k' is 'two'; expected an integer"),
        ({"top_k": "3"}, "ratio_histogram: has shape"),
        ({"top_k": str(10**18)}, "top_k: expected 1 to 4 experts"),
        ({"layers": "layers.0"}, "'layers' is 'layers.0'; expected a JSON list"),
        ({"layers": "[" * 100_000}, "expected a JSON list"),
        ({"layers": "[1, 2]"}, "expected a JSON list of names"),
        ({"layers": '["layers.0"]'}, "moments: has shape"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(saved: Path, changes: dict[str, str], message: str) -> None:
    rewrite(saved, lambda _, metadata: metadata.update(changes))
    with pytest.raises(StatisticsFileError, match=message):
        ExpertStatistics.load(saved)


def test_a_newer_file_is_recognised_whatever_else_it_lacks(saved: Path) -> None:
    def into_the_future(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        tensors.pop("tokens")
        metadata.pop("top_k")
        metadata["format_version"] = "7"

    rewrite(saved, into_the_future)
    with pytest.raises(StatisticsFileError, match=r"newer moe_ext \(format version 7, known is 3\): upgrade moe_ext"):
        ExpertStatistics.load(saved)


@pytest.mark.parametrize("name", LABELS)
def test_missing_metadata_is_named(saved: Path, name: str) -> None:
    rewrite(saved, lambda _, metadata: metadata.pop(name))
    with pytest.raises(StatisticsFileError, match=f"metadata '{name}' is missing"):
        ExpertStatistics.load(saved)


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_named(saved: Path, name: str) -> None:
    rewrite(saved, lambda tensors, _: tensors.pop(name))
    with pytest.raises(StatisticsFileError, match=f"tensor '{name}' is missing"):
        ExpertStatistics.load(saved)


def test_an_unknown_tensor_is_refused_rather_than_dropped(saved: Path) -> None:
    rewrite(saved, lambda tensors, _: tensors.update(surprise=torch.ones(1)))
    with pytest.raises(StatisticsFileError, match="tensor 'surprise' is not part of format version 2"):
        ExpertStatistics.load(saved)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_the_wrong_shape_is_named(saved: Path, name: str) -> None:
    rewrite(saved, lambda tensors, _: tensors.update({name: tensors[name].unsqueeze(0)}))
    with pytest.raises(StatisticsFileError, match=f"{name}: has shape"):
        ExpertStatistics.load(saved)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_the_wrong_dtype_is_named(saved: Path, name: str) -> None:
    rewrite(saved, lambda tensors, _: tensors.update({name: tensors[name].float()}))
    with pytest.raises(StatisticsFileError, match=f"{name}: is torch.float32"):
        ExpertStatistics.load(saved)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_moments_that_cannot_be_are_refused_with_their_layer(saved: Path, value: float) -> None:
    rewrite(saved, lambda tensors, _: tensors["moments"][1, 2, 0, 1].fill_(value))
    with pytest.raises(StatisticsFileError, match=rf"moments: layer 'layers.1' holds {value} at \[2, 0, 1\]"):
        ExpertStatistics.load(saved)


@pytest.mark.parametrize("name", ["tokens", "ratio_histogram", "coactivation"])
def test_negative_counts_are_refused(saved: Path, name: str) -> None:
    rewrite(saved, lambda tensors, _: tensors[name][0].fill_(-1))
    with pytest.raises(StatisticsFileError, match=f"{name}: layer 'layers.0' holds -1"):
        ExpertStatistics.load(saved)


def test_moments_that_cannot_be_are_not_saved(saved: Path) -> None:
    stats = filled((2, 4, 2), seed=1)
    stats.moments[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"moments: layer 'layers.0' holds nan"):
        stats.save(saved)
    assert_identical(ExpertStatistics.load(saved), filled((2, 4, 2), seed=0))


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_save_leaves_the_old_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    def write_half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    path = tmp_path / "stats.safetensors"
    if exists:
        filled((2, 4, 2), seed=0).save(path)
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(KeyboardInterrupt):
        filled((2, 4, 2), seed=1).save(path)
    assert os.listdir(tmp_path) == (["stats.safetensors"] if exists else [])
    if exists:
        assert_identical(ExpertStatistics.load(path), filled((2, 4, 2), seed=0))


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    code = """
import sys
from moe_ext.calibration.statistics import ExpertStatistics
stats = ExpertStatistics.zeros("mixtral", tuple(map(str, range(64))), 64, 8, "g")
while True:
    stats.save(sys.argv[1])
    print("saved", flush=True)
    stats.tokens += 1
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == b"saved\n"
        time.sleep(0.004)  # into the next save, which takes several times as long
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert len(set(ExpertStatistics.load(path).tokens.tolist())) == 1


def test_shards_and_model_of_merged_files_are_kept(tmp_path: Path) -> None:
    one = replace(filled((2, 4, 2), seed=0), shards=("machine-b",), model_digest="m")
    two = replace(filled((2, 4, 2), seed=1), shards=("machine-a", "machine-c"), model_digest="m")
    (one + two).save(tmp_path / "all.safetensors")
    loaded = ExpertStatistics.load(tmp_path / "all.safetensors")
    assert (loaded.shards, loaded.model_digest) == (("machine-a", "machine-b", "machine-c"), "m")
    assert (one + filled((2, 4, 2), seed=1)).model_digest == ""


def test_a_shard_counts_twice_only_if_told_so() -> None:
    one = replace(filled((2, 4, 2), seed=0), shards=("a",))
    two = replace(filled((2, 4, 2), seed=1), shards=("a", "b"))
    with pytest.raises(ValueError, match="both hold the shard 'a', which would count twice"):
        _ = one + two
    assert one.merge(two, allow_duplicates=True).shards == ("a", "a", "b")


def test_models_with_other_routers_do_not_add_up() -> None:
    one = replace(filled((2, 4, 2), seed=0), model_digest="m")
    with pytest.raises(ValueError, match="the weights of the routers differ"):
        _ = one + replace(filled((2, 4, 2), seed=1), model_digest="n")


def test_a_tensor_of_the_same_name_twice_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode().rstrip()
    entry = json.dumps(json.loads(header)["tokens"])
    text = (header[:-1] + f',"tokens":{entry}}}').encode()
    saved.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(StatisticsFileError, match="'tokens' twice in an object"):
        ExpertStatistics.load(saved)


@pytest.mark.parametrize("name", [*TENSORS, "output_sum"])
@pytest.mark.parametrize("shape", [(), (-1,)])
def test_tensors_without_dimensions_and_flattened_ones_are_named(
    saved: Path, name: str, shape: tuple[int, ...]
) -> None:
    def flatten(tensors: dict[str, Any], _: dict[str, str]) -> None:
        whole = tensors.get(name, torch.zeros(2, 4, 3, dtype=torch.float64))
        tensors[name] = whole.flatten()[0].clone() if shape == () else whole.reshape(shape)

    if (name, shape) == ("tokens", (-1,)):
        return  # it is flat
    rewrite(saved, flatten)
    with pytest.raises(StatisticsFileError, match=rf"stats\.safetensors: {name}: has shape"):
        ExpertStatistics.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": json.dumps(["x" * 400_000, "b"]), "top_k": "9"},
        {"layers": json.dumps(["x" * 400_000] * 2)},
        {"format": "x" * 400_000},
        {"experts": json.dumps([3] * 100_000)},
        {"groups": "9" * 5000},
    ],
)
def test_no_message_is_long_whatever_the_file_holds(saved: Path, change: dict[str, str]) -> None:
    rewrite(saved, lambda _, metadata: metadata.update(change))
    with pytest.raises(StatisticsFileError) as refused:
        ExpertStatistics.load(saved)
    assert len(str(refused.value)) <= 500


def test_half_of_a_character_in_a_name_is_refused(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, lambda _, metadata: metadata.update(layers=r'["\ud800", "b"]'))
    with pytest.raises(StatisticsFileError, match="metadata 'layers' is"):
        ExpertStatistics.load(saved)
    with pytest.raises(ValueError, match=r"dataset: 'a\\udcff' holds half of a character"):
        ExpertStatistics.zeros("mixtral", ("layers.0",), 4, 2, "g", "a\udcff")


@pytest.mark.parametrize(("name", "place"), [("tokens", 0), ("coactivation", (0, 1, 1)), ("moments", (0, 1, 0, 0))])
def test_counts_that_would_wrap_do_not_add_up(name: str, place: Any, tmp_path: Path) -> None:
    one, other = filled((1, 2, 1), 0), filled((1, 2, 1), 1)
    for stats in (one, other):
        getattr(stats, name)[place] = 2**62 if name != "moments" else 2**53
    with pytest.raises(ValueError, match=rf"other: does not add up: {name}: layer 'layers.0' holds"):
        _ = one + other
    if name != "moments":
        with pytest.raises(ValueError, match=rf"{name}: layer 'layers.0' holds 4611686018427387904 .*up to 2\^53"):
            one.save(tmp_path / "stats.safetensors")
