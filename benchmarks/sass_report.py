"""Do the compiled CUDA kernels hold what the source promises: no spills, tensor-core loops, fences and waits?

Compiles csrc/cuda for every architecture of setup.py's default list (or those named), reads ptxas's report and the
SASS, prints a table of registers and shared memory, and exits with 1 where a rule does not hold:

    python benchmarks/sass_report.py [--arch 80 --arch 90a] [--output FILE.json]

- no kernel of HOT spills a register or has a stack frame;
- the main loop of grouped_gemm_kernel holds HMMA, LDSM and LDGSTS.128 and touches no local memory;
- the main loop of small_batch_kernel holds HMMA and eight loads of 128 bits, and no narrower global load;
- from sm_90 on, a kernel that launch_next() launches touches no global memory before its wait for the kernel before it,
  and does not end without it; small_batch_kernel alone may read first (`experts`, an input of the call);
- in hopper_gemm_kernel, which is empty but for sm_90a, wgmma's accumulators and the copies into its operands are fenced
  and waited for on every path (sass_rules.py), and ptxas had to add nothing for that.

Needs nvcc, and cuobjdump from the CUDA toolkit or from the triton that comes with torch's CUDA build. No GPU.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sass_flow import UnreadableError, instructions, successors
from sass_rules import WAIT, accumulator_faults, copy_faults, fence_faults, overlap_faults, release_faults

from moe_ext.storage.dated_results import table, write_result

ROOT = Path(__file__).parents[1]
HOT = (
    "hopper_gemm_kernel",
    "grouped_gemm_kernel",
    "small_batch_kernel",
    "combine_kernel",
    "route_kernel",
    "plain_gemm_kernel",
    "products_kernel",
)


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

    def loops(self) -> list[list[str]]:
        """Instructions of every loop (a branch back to a lower address), the shortest first."""
        found = []
        for address, text in self.sass:
            target = re.search(r"\bBRA\b.*?\b(0x[0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                found.append([text for at, text in self.sass if int(target[1], 16) <= at <= address])
        return sorted(found, key=len)

    def main_loop(self) -> list[str]:
        """The innermost loop that multiplies and copies weights, in hopper_gemm_kernel that of its widest product."""
        needed = (r"HGMMA\.64x192x16\b",) if self.name.startswith("hopper_gemm_kernel") else ("HMMA", "LDG")
        for loop in self.loops():
            if all(count(loop, name) for name in needed):
                return loop
        return []

    def faults(self) -> list[str]:
        faults = [f"ptxas: {remark}" for remark in self.remarks]
        if self.name.startswith(HOT) and (self.spill_bytes or self.stack_bytes):
            faults.append(f"{self.spill_bytes} bytes of spills, {self.stack_bytes} bytes of stack")
        loop = self.main_loop()
        if self.name.startswith("grouped_gemm_kernel"):
            needed = ("HMMA", "LDSM", r"LDGSTS\.\S*\.128\b")
            faults += [f"no {name} in the main loop" for name in needed if not count(loop, name)]
            faults += [f"{name} (local memory)" for name in ("LDL", "STL") if count(loop, name)]
        if self.name.startswith("small_batch_kernel"):
            wide, loads = count(loop, r"LDG\.\S*\.128\b"), count(loop, r"LDG\.")
            if wide < 8 or wide != loads:
                faults.append(f"{wide} of {loads} loads in the main loop are 128 bits wide")
        if self.name.startswith("hopper_gemm_kernel") and not loop:
            faults.append("no HGMMA of 192 columns in a loop")
        return faults + self.order_faults()

    def order_faults(self) -> list[str]:
        """What breaks the rules of sass_rules.py that are for this kernel."""
        if int(self.arch.rstrip("af")) < 90:
            return []
        code = instructions(self.sass)
        try:
            edges = successors(code, self.branch_tables)
            faults = []
            if self.name.split("<")[0] in kernels_launched_next():
                faults += overlap_faults(code, edges, loads_first=self.name.startswith("small_batch_kernel"))
            elif any(one.opcode == WAIT for one in code):
                faults.append("waits for the previous kernel, but no launch_next<> names it")
            if self.name.startswith("hopper_gemm_kernel"):
                for rule in (accumulator_faults, fence_faults, copy_faults, release_faults):
                    faults += rule(code, edges)
        except UnreadableError as error:
            return [f"cannot be read: {error}"]
        return faults


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


@functools.cache
def kernels_launched_next() -> frozenset[str]:
    """The kernels that overlap with the one before them on the stream (csrc/cuda/next_kernel.cuh)."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    return frozenset(re.findall(r"\blaunch_next<(\w+)", sources))


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
    name = re.sub(r"\(anonymous namespace\)::|moe_ext::cuda::|moe_ext::", "", name)
    name = name.replace("(Product)0", "gate_up").replace("(Product)1", "down")
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
        if name.startswith("hopper_gemm_kernel") and arch != "90a":
            continue  # compiled to nothing
        numbers = int(registers[1]), stack, stores + loads, static
        remarks = re.findall(rf"\(C75\d\d\) (.+) in function '{mangled}'", report)
        kernels.append(Kernel(arch, name, *numbers, code[mangled], tables.get(mangled, {}), remarks))
    return kernels


def hopper_row(kernel: Kernel) -> dict[str, Any]:
    """What hopper_gemm_kernel's main loop issues, and what all of it waits for."""
    loop, all_of_it = kernel.main_loop(), [text for _, text in kernel.sass]
    products = count(loop, "HGMMA")
    return {
        "kernel": f"`{kernel.name}`",
        "registers": kernel.registers,
        "HGMMA in the loop of 192 rows": products,
        "instructions / HGMMA": round(len(loop) / products, 2) if products else None,
        "HGMMA": count(all_of_it, "HGMMA"),
        "WARPGROUP.ARRIVE": count(all_of_it, r"WARPGROUP\.ARRIVE"),
        "WARPGROUP.DEPBAR": count(all_of_it, r"WARPGROUP\.DEPBAR"),
        "LDGSTS": count(all_of_it, "LDGSTS"),
        "DEPBAR SB0": count(all_of_it, r"DEPBAR\.LE SB0"),
        "FENCE.VIEW.ASYNC": count(all_of_it, r"FENCE\.VIEW\.ASYNC"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="such as 90a; default: all of setup.py's list")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    archs = options.arch or default_archs()

    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [pool.submit(compile_one, source, arch, Path(folder)) for source in sources for arch in archs]
        kernels = [kernel for future in work for kernel in future.result()]

    rows: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        none = dict.fromkeys((f"sm_{arch}" for arch in archs), "-")
        first = {"kernel": f"`{kernel.name}`", "static shared": kernel.static_shared_bytes, **none}
        row = rows.setdefault(kernel.name, first)
        row[f"sm_{kernel.arch}"] = kernel.registers
    print(table(list(rows.values())))

    faults = [f"sm_{k.arch} {k.name}: {fault}" for k in kernels for fault in k.faults()]
    multiplying = [k for k in kernels if k.name.startswith(("grouped_gemm_kernel", "small_batch_kernel"))]
    print("\nmain loops:")
    for kernel in multiplying:
        loop = kernel.main_loop()
        names = {
            "HMMA": "HMMA",
            "LDSM": "LDSM",
            "LDGSTS.128": r"LDGSTS\.\S*\.128\b",
            "LDG.128": r"LDG\.\S*\.128\b",
            "LDL": "LDL",
        }
        found = ", ".join(f"{count(loop, pattern)} {name}" for name, pattern in names.items())
        print(f"sm_{kernel.arch} {kernel.name}: {found}")
    hopper = [hopper_row(kernel) for kernel in kernels if kernel.name.startswith("hopper_gemm_kernel")]
    if hopper:
        print(f"\nhopper_gemm_kernel on sm_90a:\n{table(hopper)}")
    if options.output is not None:
        version = output_of(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version").strip().splitlines()[-1]
        write_result(
            options.output,
            "registers a thread and static shared memory as ptxas reports them; nothing was run",
            compiler=version,
            spilling_kernels=[f"sm_{k.arch} {k.name}" for k in kernels if k.spill_bytes],
            rows=list(rows.values()),
            hopper=hopper,
        )
    if faults:
        sys.exit("\n".join(["", "rules that do not hold:", *faults]))
    print(f"\n{len(kernels)} kernels, {sum(k.spill_bytes > 0 for k in kernels)} with spills; every rule holds")


if __name__ == "__main__":
    main()
