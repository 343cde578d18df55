"""Files of tensors: what the library reads, and the same bytes from every process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moe_ext.storage.tensor_file import write_tensors

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "transposed": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
    "empty": torch.zeros(0, 4),
}
METADATA = {name: name * 2 for name in ["zebra", "quick", "äöü", "brown", "a", "fox"]}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS, METADATA)
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == METADATA
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor)
    content = (tmp_path / "file").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0  # so that the tensors are aligned


def test_tensors_in_one_memory_are_written_apart(tmp_path: Path) -> None:
    both = torch.arange(6.0)
    write_tensors(tmp_path / "file", {"whole": both, "again": both, "end": both[3:]}, {})
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert torch.equal(file.get_tensor("again"), both)
        assert torch.equal(file.get_tensor("end"), both[3:])


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "here", TENSORS, METADATA)
    code = f"import sys; from {__name__} import *; write_tensors(sys.argv[1], TENSORS, METADATA)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True)
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
