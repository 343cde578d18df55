"""Kept channels as bits: there and back, and what is refused."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.decision.kept_channels import KeptChannels


@given(channels=st.integers(1, 40), experts=st.integers(1, 4), layers=st.integers(1, 3), seed=st.integers(0, 1000))
def test_what_is_kept_comes_back(channels: int, experts: int, layers: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for layer in range(layers):
        width = 1 + (seed + layer) % channels
        order = torch.rand(experts, channels, generator=generator).argsort(1)
        kept.append(order[:, :width].sort(1).values)
    found = KeptChannels.of(kept, channels)
    assert [found.width(layer) for layer in range(layers)] == [indices.shape[1] for indices in kept]
    again = KeptChannels.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    for layer, indices in enumerate(kept):
        assert torch.equal(again.indices(layer), indices)


def test_channel_0_is_the_highest_bit_of_the_first_digit() -> None:
    assert KeptChannels.of([torch.tensor([[0, 9]])], 10).to_json() == {"intermediate_size": 10, "kept": [["8040"]]}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.tensor([[0, 10]]), "layer 0: expected 0 to 9, got 0 to 10"),
        (torch.tensor([[-1, 3]]), "layer 0: expected 0 to 9, got -1 to 3"),
        (torch.tensor([[3, 3]]), "layer 0: an expert keeps a channel twice"),
        (torch.zeros(2, 0, dtype=torch.int64), "keeps 0 channels; expected as many as the layer's first expert"),
    ],
)
def test_channels_that_make_no_sense_are_refused(kept: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeptChannels.of([kept], 10)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected an object with 'intermediate_size'"),
        ({"intermediate_size": 10}, "expected an object"),
        ({"intermediate_size": True, "kept": [["8000"]]}, "expected an object"),
        ({"intermediate_size": 0, "kept": []}, "expected an object"),
        ({"intermediate_size": 10, "kept": [[]]}, "a list of hexadecimal masks for every layer"),
        ({"intermediate_size": 10, "kept": [[5]]}, "a list of hexadecimal masks for every layer"),
        ({"intermediate_size": 10, "kept": [["8g00"]]}, "channels: non-hexadecimal number"),
        ({"intermediate_size": 10, "kept": [["80"]]}, "layer 0, kept expert 0: has 1 bytes; expected 2"),
        ({"intermediate_size": 10, "kept": [["8020"]]}, "keeps a channel beyond the 10 that there are"),
        ({"intermediate_size": 10, "kept": [["8000", "c000"]]}, "kept expert 1: keeps 2 channels; expected as many"),
        ({"intermediate_size": 10, "kept": [["0000"]]}, "keeps 0 channels"),
    ],
)
def test_a_file_that_says_something_else_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeptChannels.from_json(value)
