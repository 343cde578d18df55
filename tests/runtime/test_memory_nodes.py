"""Experts on several memory nodes: the same bits, and where weights lie. Nodes are played on a machine of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import moe_ext
from moe_ext import ops
from moe_ext.binary import _C
from tests.support.batches import random_tokens
from tests.support.families import build, logits_of
from tests.support.mixtral import MixtralFactory
from tests.support.quantised_layers import FORMATS, quantised_case
from tests.support.reference import experts_case


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXT_NODES", "2")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize(("hidden", "intermediate"), [(48, 40), (520, 1000)])
def test_results_have_the_same_bits_on_any_number_of_nodes(
    tokens: int, hidden: int, intermediate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = experts_case(tokens, 5, 2, hidden, intermediate, dtype=torch.bfloat16, sentinels=0.2)
    packed = quantised_case(FORMATS["int4-32"], tokens, 5, 2, hidden, intermediate, dtype=torch.bfloat16).packed
    expected = ops.experts(*case.arguments()), ops.experts(*packed.arguments(), **packed.options)
    for nodes in ("2", "3", "7"):
        monkeypatch.setenv("MOE_EXT_NODES", nodes)
        for count in (1, 2, 5):
            with threads(count):
                got = ops.experts(*case.arguments()), ops.experts(*packed.arguments(), **packed.options)
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_a_number_of_nodes_that_is_none_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXT_NODES", "many")
    with pytest.raises(RuntimeError, match="MOE_EXT_NODES=many; expected a number from 1 to 64"):
        ops.experts(*experts_case(3, 5, 2, 16, 24).arguments())


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize(("name", "weights"), [("mixtral", None), ("mixtral", "int4"), ("gpt_oss", None)])
def test_weights_are_moved_and_logits_stay(name: str, weights: str | None) -> None:
    model = build(name, num_hidden_layers=2)
    if weights is not None:
        moe_ext.quantize(model, weights, group_size=32)
    moe_ext.patch(model)
    tokens = random_tokens(1, 9)
    expected = logits_of(model, tokens)
    try:
        placement = moe_ext.place_on_nodes(model)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert placement.nodes == 2
    assert 0 < placement.placed == placement.num_bytes
    assert torch.equal(logits_of(model, tokens), expected)


@pytest.mark.skipif(_C.memory_nodes() > 1, reason="this machine has several memory nodes")
def test_on_one_node_there_is_nothing_to_do(tiny_mixtral: MixtralFactory) -> None:
    assert "MOE_EXT_NODES" not in os.environ
    placement = moe_ext.place_on_nodes(moe_ext.patch(tiny_mixtral()))
    assert (placement.nodes, placement.num_bytes, placement.placed) == (1, 0, 0)


@pytest.mark.usefixtures("two_nodes")
def test_refusals(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    with pytest.raises(ValueError, match="model is not patched"):
        moe_ext.place_on_nodes(model)
    with pytest.raises(ValueError, match="model has experts on meta; memory nodes are the CPU's"):
        moe_ext.place_on_nodes(moe_ext.patch(model).to("meta"))
