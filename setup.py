"""Builds moe_ext._C, the one binary of the package: operators on torch's ABI-stable API, CPU kernels, build facts.

The CPU kernels are always built. The CUDA kernels are built when torch is a CUDA build and nvcc is there;
MOE_EXT_CUDA=1 insists on them, MOE_EXT_CUDA=0 leaves them out. TORCH_CUDA_ARCH_LIST chooses the architectures.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
# 9.0a, not 9.0: machine code for exactly the H100 and H200, whose wgmma gemm_wgmma.cu uses.
CUDA_ARCHS = "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
TORCH_TARGET_VERSION = "0x020a000000000000"  # torch 2.10: the oldest whose stable API has all that csrc/torch calls


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels; exits with the reason when MOE_EXT_CUDA=1 cannot be honoured."""
    choice = os.environ.get("MOE_EXT_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"MOE_EXT_CUDA={choice!r}: expected 0, 1 or nothing")
    missing = [
        reason
        for reason, present in {
            f"torch {torch.__version__} is no CUDA build": torch.version.cuda,
            "nvcc was not found (set CUDA_HOME)": CUDA_HOME,
            f"{CUDA_HOME} has no CUDA headers (set CUDA_HOME to the toolkit)": not CUDA_HOME or has_headers(CUDA_HOME),
        }.items()
        if not present
    ]
    if choice == "1" and missing:
        raise SystemExit("MOE_EXT_CUDA=1, but " + " and ".join(missing))
    return choice != "0" and not missing


def has_headers(toolkit: str) -> bool:
    """Whether a toolkit has them: torch takes the folder above any nvcc on the PATH for one."""
    places = ("include", "targets/*/include")  # the second is conda's
    return any(any(Path(toolkit).glob(f"{place}/cuda_runtime_api.h")) for place in places)


def cuda_archs() -> str:
    """CUDA_ARCHS as far as this nvcc knows them, machine code for each and PTX of the last for what comes later."""
    listed = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--list-gpu-arch"], check=True, capture_output=True, text=True)
    known = set(re.findall(r"compute_(\d+)", listed.stdout))
    wanted = CUDA_ARCHS.removesuffix("+PTX").split()
    archs = [arch for arch in wanted if arch.removesuffix("a").replace(".", "") in known]
    if not archs:
        raise SystemExit(f"{CUDA_HOME}/bin/nvcc knows none of {CUDA_ARCHS}; install a newer CUDA toolkit")
    return " ".join(archs) + "+PTX"


def check_archs(archs: str) -> None:
    """Exits if TORCH_CUDA_ARCH_LIST asks for a device that lacks bfloat16 tensor cores and cp.async, or for both kinds
    of code for an H100: which of them would run there is CUDA's choice, and one kernel exists for 9.0a alone."""
    old = [arch for arch in re.findall(r"\d+\.\d+", archs) if float(arch) < 8.0]
    if old:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={archs!r}: moe_ext's CUDA kernels need 8.0 or newer, not {old[0]}")
    if re.search(r"9\.0(?!a)", archs) and "9.0a" in archs:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={archs!r}: list 9.0a without 9.0, for it is for the same devices")


def extension() -> Extension:
    cuda = wants_cuda()
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs())
        check_archs(os.environ["TORCH_CUDA_ARCH_LIST"])
    defines = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("MOE_EXT_TORCH_VERSION", f'"{torch.__version__}"'),
        ("MOE_EXT_CUDA_ARCHS", '"{}"'.format(os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else "")),
    ]
    # -g0: Python's own flags ask for debug information, which makes the binary ten times as large.
    # -ffp-contract=off: a product and a sum are fused where the source says fma and nowhere else. Left to the compiler,
    # one tile of a product fuses and another does not, and a token's bits depend on its batch.
    cxx = ["-std=c++17", "-O3", "-ffp-contract=off", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
    # torch's build names libraries that nothing here uses, libtorch_python among them.
    link = ["-Wl,--as-needed"] if sys.platform == "linux" else []
    if cuda:
        defines.append(("MOE_EXT_WITH_CUDA", "1"))
    make = CUDAExtension if cuda else CppExtension
    cuda_sources = [*sources("csrc/cuda/*.cu"), *sources("csrc/cuda/*.cpp")] if cuda else []
    return make(
        name="moe_ext._C",
        sources=[*sources("csrc/torch/*.cpp"), *sources("csrc/cpu/**/*.cpp"), *cuda_sources],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=defines,
        extra_compile_args={"cxx": cxx, "nvcc": ["-std=c++17", "-O3", "-Xcompiler=-Wall,-Wextra,-fvisibility=hidden"]},
        extra_link_args=link,
    )


def version() -> str:
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "moe_ext" / "version.py").read_text(), re.MULTILINE)
    assert match is not None
    return match.group(1)


setup(version=version(), ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
