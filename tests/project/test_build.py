"""What was built: the binary needs torch's stable ABI only, the kernels need no torch, wrong switches are refused."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_ext.binary import _C
from tests.support.paths import ROOT

KERNEL_FILES = [
    ROOT / "csrc" / "moe.h",
    *sorted(path for part in ("cpu", "cuda") for path in (ROOT / "csrc" / part).rglob("*") if path.is_file()),
]


def output_of(tool: str, *arguments: str) -> str:
    """Standard output of a binutils program; skips the test where it is not installed."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def undefined_symbols() -> list[str]:
    """Names that the binary takes from other libraries, without their versions."""
    lines = output_of("nm", "-D", "--undefined-only", str(_C.__file__)).splitlines()
    return [line.split()[-1].split("@")[0] for line in lines]


def needed_libraries() -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", "-W", str(_C.__file__)))


def test_the_binary_takes_no_cpp_symbol_of_torch() -> None:
    symbols = undefined_symbols()
    assert "torch_parallel_for" in symbols  # it does use the stable ABI, so the list is that of the right file
    assert [symbol for symbol in symbols if re.match(r"_ZN?[A-Z]*(2at|3c10|5torch|5caffe)", symbol)] == []


def test_all_that_the_binary_takes_from_torch_is_its_c_interface() -> None:
    of_torch = [symbol for symbol in undefined_symbols() if re.search("torch|c10|aten", symbol, re.IGNORECASE)]
    assert [symbol for symbol in of_torch if not symbol.startswith(("aoti_torch_", "torch_"))] == []


def test_the_binary_brings_no_openmp_and_no_python_library_of_its_own() -> None:
    needed = needed_libraries()
    assert "libc.so.6" in needed
    assert [name for name in needed if re.match("libgomp|libiomp|libomp|libtorch_python|libpython", name)] == []


def test_the_binary_exports_its_module_only() -> None:
    lines = output_of("nm", "-D", "--defined-only", str(_C.__file__)).splitlines()
    exported = [line.split()[-1] for line in lines if line.split()[-2] == "T"]
    assert exported == ["PyInit__C"]


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_kernels_include_no_torch_and_no_python_header(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"](.+)[>"]', path.read_text(), re.MULTILINE)
    assert [name for name in included if re.match("torch/|ATen/|c10/|pybind11/|Python", name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_code_for_a_newer_processor_shares_no_function_with_the_rest(isa: str, tmp_path: Path) -> None:
    # A weak symbol (an inline function, a template) that is compiled in several files is linked once. Were that copy
    # the AVX-512 one, the portable code would crash on an older processor. -O0: nothing is hidden by inlining.
    compiler = shutil.which("c++") or pytest.skip("c++ is not installed")
    if os.uname().machine != "x86_64":
        pytest.skip("these variants are for x86-64")
    compiled = tmp_path / "loops.o"
    source = ROOT / "csrc" / "cpu" / "vector" / f"{isa}.cpp"
    subprocess.run([compiler, "-std=c++17", "-O0", "-c", f"-I{ROOT / 'csrc'}", source, "-o", compiled], check=True)
    weak = [line for line in output_of("nm", "-C", str(compiled)).splitlines() if re.search(" [WVu] ", line)]
    assert weak  # -O0 keeps the member functions of its own vector type
    assert [line for line in weak if f"moe_ext::cpu::{isa}::" not in line] == []


@pytest.mark.skipif(not (ROOT / "moe_ext").exists(), reason="setup.py needs the package's source")
@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ("bogus", r"MOE_EXT_CUDA='bogus': expected 0, 1 or nothing"),
        pytest.param(
            "1",
            r"MOE_EXT_CUDA=1, but .*torch \S+ is no CUDA build",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build"),
        ),
    ],
)
def test_a_cuda_switch_that_cannot_be_honoured_is_one_clear_error(switch: str, message: str) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "MOE_EXT_CUDA": switch},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert re.match(message, result.stderr.splitlines()[-1]), result.stderr  # torch itself may warn before it
    assert "Traceback" not in result.stderr
