"""A list of tensors, part of them in a file."""

import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.storage.spilled_tensors import SpillingList
from tests.support.forked import exit_status, fork

TENSORS = [
    torch.arange(6, dtype=torch.float64).reshape(2, 3),
    torch.randn(3, 4).bfloat16(),
    torch.zeros(0, 5),
    torch.arange(12).reshape(3, 4).T,  # not contiguous
    torch.tensor([True, False]),
    torch.tensor(3.5),
]


@given(memory=st.integers(0, 250), order=st.lists(st.integers(0, len(TENSORS) - 1), max_size=9))
def test_what_is_appended_comes_back(memory: int, order: list[int]) -> None:
    spilling = SpillingList(memory)
    for index in order:
        spilling.append(TENSORS[index])
    assert len(spilling) == len(order)
    for place, index in enumerate(order):
        assert spilling[place].dtype == TENSORS[index].dtype
        assert torch.equal(spilling[place], TENSORS[index])
    spilling.close()


@pytest.mark.parametrize("memory", [0, 16, 1000])
def test_a_replaced_tensor_leaves_the_others_alone(memory: int) -> None:
    spilling = SpillingList(memory)
    for value in range(4):
        spilling.append(torch.full((2,), float(value)))
    spilling[2] = torch.tensor([7.0, 8.0])
    assert [spilling[place].tolist() for place in range(4)] == [[0, 0], [1, 1], [7, 8], [3, 3]]
    with pytest.raises(ValueError, match=r"tensor: is torch\.float32 of shape \(3,\); expected .*\(2,\)"):
        spilling[1] = torch.zeros(3)
    spilling.close()


@pytest.mark.parametrize("memory", [0, 1000])
def test_a_tensor_that_changes_later_was_copied(memory: int) -> None:
    spilling, tensor = SpillingList(memory), torch.ones(2)
    spilling.append(tensor)
    tensor.zero_()
    assert spilling[0].tolist() == [1, 1]
    spilling.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_full_disk_is_an_error_that_names_the_folder() -> None:
    def filling() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        spilling = SpillingList(0)
        spilling.append(torch.arange(1000))
        with pytest.raises(OSError, match=r"a temporary file of .* could not be written: .*; TMPDIR may name another"):
            spilling.append(torch.arange(1000))
        assert torch.equal(spilling[0], torch.arange(1000))

    assert exit_status(fork(filling)) == 0
