"""Kernels of csrc/cuda as compiled for an architecture: what nvcc, ptxas and cuobjdump say about each.

Needs nvcc, and cuobjdump from the CUDA toolkit or from the triton that comes with torch's CUDA build.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    arch: str
    name: str  # without namespaces and arguments
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int
    sass: list[tuple[int, str]]  # (address, instruction)
    branch_tables: dict[int, list[int]]  # targets of each indirect branch, by its address
    remarks: list[str]  # of ptxas: fences that it had to add to wgmmas, or that it made them wait for each other

    @functools.cached_property
    def loops(self) -> list[list[str]]:
        """Instructions of every loop (a branch back to a lower address), the shortest first."""
        found = []
        for address, text in self.sass:
            target = re.search(r"\bBRA\b.*?\b(0x[0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                found.append([text for at, text in self.sass if int(target[1], 16) <= at <= address])
        return sorted(found, key=len)

    def conversion_loop(self) -> list[str]:
        """The innermost loop that copies lines of weights and stores what they are converted to: a line's."""
        for loop in self.loops:
            if count(loop, "LDGSTS") and count(loop, r"STS\.128"):
                return loop
        return []

    def main_loop(self) -> list[str]:
        """The innermost loop that multiplies and copies weights; of wgmma that of the widest product."""
        widest = {"hopper_gemm_kernel": 192, "hopper_packed_gemm_kernel": 128}.get(self.name.split("<")[0])
        needed = ("HMMA", "LDG") if widest is None else (rf"HGMMA\.64x{widest}x16\b",)
        for loop in self.loops:
            if all(count(loop, name) for name in needed):
                return loop
        return []


def count(instructions: list[str], name: str) -> int:
    return sum(bool(re.search(rf"(^|\s){name}", text)) for text in instructions)


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        tool = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return str(tool)
    raise SystemExit("cuobjdump was not found: install the CUDA toolkit's or torch's CUDA build")


def output_of(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{command[0]} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def default_archs() -> list[str]:
    text = (ROOT / "setup.py").read_text()
    match = re.search(r'^CUDA_ARCHS = "(.+)"', text, re.MULTILINE)
    assert match is not None
    return [arch.removesuffix("+PTX").replace(".", "") for arch in match[1].split()]


def branch_tables(cubin: Path) -> dict[str, dict[int, list[int]]]:
    """Targets of the indirect branches (BRX) as the compiler recorded them, by mangled kernel and address."""
    tables: dict[str, dict[int, list[int]]] = {}
    for section in re.split(r"^\.nv\.info\.", output_of(cuobjdump(), "-elf", cubin), flags=re.MULTILINE)[1:]:
        found = re.findall(r"Offset of Indirect Branch: (0x[0-9a-f]+).*\n\s*Targets: ((?:0x[0-9a-f]+\s)+)", section)
        tables[section.split()[0]] = {int(at, 16): [int(to, 16) for to in targets.split()] for at, targets in found}
    return tables


def short_name(mangled: str) -> str:
    """Name with template arguments, without namespaces, enumeration casts and parameters."""
    name = output_of("c++filt", mangled).strip()
    name = re.sub(r"\(anonymous namespace\)::|moe_ext::cuda::small_batch::|moe_ext::cuda::|moe_ext::", "", name)
    name = name.replace("(Product)0", "gate_up").replace("(Product)1", "down")
    for number, weights in enumerate(("plain", "int8", "int4", "fp8", "mxfp4")):
        name = name.replace(f"(WeightType){number}", weights)
    for number, scales in enumerate(("float32", "bfloat16", "float16", "e8m0")):
        name = name.replace(f"(ScaleType){number}", scales)
    for number, experts in enumerate(("usual", "special", "transposed")):
        name = name.replace(f"(Experts){number}", experts)
    return re.sub(r"^void |\([^()]*\)$", "", name)


def compile_one(source: Path, arch: str, folder: Path) -> list[Kernel]:
    cubin = folder / f"{source.stem}.{arch}.cubin"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", '-DMOE_EXT_CUDA_ARCHS=""', f"-I{ROOT / 'csrc'}"]
    report = output_of(nvcc, *flags, f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", source, "-o", cubin)
    disassembly = output_of(cuobjdump(), "-sass", cubin)
    code: dict[str, list[tuple[int, str]]] = {}
    for function in disassembly.split("Function : ")[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+?) *;", function)
        code[function.split()[0]] = [(int(address, 16), text) for address, text in lines]
    tables = branch_tables(cubin)
    kernels = []
    for part in report.split("Compiling entry function '")[1:]:
        mangled = part.split("'")[0]
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill)", part)[:3])
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None
        static = int(shared[1]) if shared else 0
        name = short_name(mangled)
        if name.startswith("hopper_") and arch != "90a":
            continue  # compiled to nothing
        numbers = int(registers[1]), stack, stores + loads, static
        remarks = re.findall(rf"\(C75\d\d\) (.+) in function '{mangled}'", report)
        kernels.append(Kernel(arch, name, *numbers, code[mangled], tables.get(mangled, {}), remarks))
    return kernels
