"""One server and one set of inputs for all tests of this folder."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.support import Server, make_inputs, server_with_shim


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder that other users may enter, too, which pytest's own are not."""
    made = Path(tempfile.mkdtemp(prefix="moe_ext-faults-")).resolve()
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Server]:
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Linux and a C compiler")
    with server_with_shim(folder) as server:
        yield server


@pytest.fixture(scope="session")
def inputs(folder: Path) -> Path:
    make_inputs(folder / "inputs")
    return folder / "inputs"
