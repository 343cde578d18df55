"""Do the compiled CUDA kernels hold what the source promises: no spills, tensor-core loops, fences and waits?

Compiles csrc/cuda for every architecture of setup.py's default list (or those named), reads ptxas's report and the
SASS, prints a table of registers and shared memory, and exits with 1 where a rule does not hold:

    python -m tools.sass.report [--arch 80 --arch 90a] [--output FILE.json]

- no kernel of HOT spills a register or has a stack frame;
- the main loop of grouped_gemm_kernel holds HMMA, LDSM and LDGSTS.128 and touches no local memory;
- that of packed_gemm_kernel holds HMMA, LDS.128 and LDGSTS.128 and touches no local memory;
- the main loop of small_batch_kernel holds HMMA and eight loads of 128 bits (four-bit weights: four), and no narrower
  global load but those of scales and zero points of quantised weights;
- from sm_90 on, a kernel that launch_next() launches touches no global memory before its wait for the kernel before it,
  and does not end without it; small_batch_kernel alone may read first (`experts`, an input of the call);
- in hopper_gemm_kernel, which is empty but for sm_90a, wgmma's accumulators and the copies into its operands are fenced
  and waited for on every path, blocks of a cluster meet before and after they reach each other's shared memory
  (rules.py), and ptxas had to add nothing for that; so are in hopper_packed_gemm_kernel its accumulators, and what
  converters store.

No GPU is needed.
"""

import argparse
import concurrent.futures
import functools
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe_ext.storage.dated_results import table, write_result
from tools.sass.compiled import ROOT, Kernel, compile_one, count, default_archs, output_of
from tools.sass.flow import UnreadableError, instructions, successors
from tools.sass.rules import (
    WAIT,
    accumulator_faults,
    cluster_faults,
    copy_faults,
    fence_faults,
    overlap_faults,
    producer_copy_faults,
    release_faults,
    store_faults,
)

HOT = (
    "hopper_gemm_kernel",
    "hopper_packed_gemm_kernel",
    "grouped_gemm_kernel",
    "packed_gemm_kernel",
    "small_batch_kernel",
    "combine_kernel",
    "route_kernel",
    "plain_gemm_kernel",
    "products_kernel",
    "dots_kernel",
    "energy_weights_kernel",
    "energy_sums_kernel",
)


def faults_of(kernel: Kernel) -> list[str]:
    faults = [f"ptxas: {remark}" for remark in kernel.remarks]
    if kernel.name.startswith(HOT) and (kernel.spill_bytes or kernel.stack_bytes):
        faults.append(f"{kernel.spill_bytes} bytes of spills, {kernel.stack_bytes} bytes of stack")
    loop = kernel.main_loop()
    if kernel.name.startswith(("grouped_gemm_kernel", "packed_gemm_kernel")):
        reads = "LDSM" if kernel.name.startswith("grouped") else r"LDS\.\S*128\b"
        needed = ("HMMA", reads, r"LDGSTS\.\S*\.128\b")
        faults += [f"no {name} in the main loop" for name in needed if not count(loop, name)]
        faults += [f"{name} (local memory)" for name in ("LDL", "STL") if count(loop, name)]
    if kernel.name.startswith("small_batch_kernel"):
        wide, loads = count(loop, r"LDG\.\S*\.128\b"), count(loop, r"LDG\.")
        least = 4 if re.search("int4|mxfp4", kernel.name) else 8
        if wide < least or (wide != loads and "PackedWeights" not in kernel.name):
            faults.append(f"{wide} of {loads} loads in the main loop are 128 bits wide")
    if kernel.name.startswith("hopper_") and not loop:
        faults.append("no HGMMA of the widest tile's columns in a loop")
    if kernel.name.startswith("hopper_packed_gemm_kernel") and not kernel.conversion_loop():
        faults.append("no loop that copies and converts")
    return faults + order_faults(kernel)


def order_faults(kernel: Kernel) -> list[str]:
    """What breaks the rules of rules.py that are for this kernel."""
    if int(kernel.arch.rstrip("af")) < 90:
        return []
    code = instructions(kernel.sass)
    try:
        edges = successors(code, kernel.branch_tables)
        faults = []
        if kernel.name.split("<")[0] in kernels_launched_next():
            faults += overlap_faults(code, edges, loads_first=kernel.name.startswith("small_batch_kernel"))
        elif any(one.opcode == WAIT for one in code):
            faults.append("waits for the previous kernel, but no launch_next<> names it")
        if kernel.name.startswith("hopper_gemm_kernel"):
            for rule in (accumulator_faults, fence_faults, copy_faults, release_faults, cluster_faults):
                faults += rule(code, edges)
        if kernel.name.startswith("hopper_packed_gemm_kernel"):
            for rule in (accumulator_faults, fence_faults, producer_copy_faults, store_faults, release_faults):
                faults += rule(code, edges)
    except UnreadableError as error:
        return [f"cannot be read: {error}"]
    return faults


@functools.cache
def kernels_launched_next() -> frozenset[str]:
    """The kernels that overlap with the one before them on the stream (csrc/cuda/next_kernel.cuh)."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.cu*"))
    return frozenset(re.findall(r"\blaunch_next<(\w+)", sources))


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


def conversion_row(kernel: Kernel) -> dict[str, Any]:
    """What a thread of hopper_packed_gemm_kernel's converters issues for a line of a row."""
    loop = kernel.conversion_loop()
    stores = count(loop, r"STS\.128")
    return {
        "kernel": f"`{kernel.name}`",
        "instructions a line": len(loop),
        "a weight": round(len(loop) / (8 * stores), 2) if stores else None,
        "LDS.128": count(loop, r"LDS\.128"),
        "STS.128": stores,
    }


def examined(source: Path, arch: str, folder: Path) -> list[tuple[Kernel, list[str]]]:
    """The kernels of a file, each with the rules that it breaks."""
    return [(kernel, faults_of(kernel)) for kernel in compile_one(source, arch, folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="such as 90a; default: all of setup.py's list")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    archs = options.arch or default_archs()

    # Processes: to read the code of large kernels takes about as long as to compile them. The longest files come first.
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        work = {
            (source, arch): pool.submit(examined, source, arch, Path(folder))
            for source in sorted(sources, key=lambda source: -source.stat().st_size)
            for arch in archs
        }
        results = [result for source in sources for arch in archs for result in work[source, arch].result()]
    kernels = [kernel for kernel, _ in results]

    rows: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        none = dict.fromkeys((f"sm_{arch}" for arch in archs), "-")
        first = {"kernel": f"`{kernel.name}`", "static shared": kernel.static_shared_bytes, **none}
        row = rows.setdefault(kernel.name, first)
        row[f"sm_{kernel.arch}"] = kernel.registers
    print(table(list(rows.values())))

    faults = [f"sm_{kernel.arch} {kernel.name}: {fault}" for kernel, broken in results for fault in broken]
    multiplying = [
        k for k in kernels if k.name.startswith(("grouped_gemm_kernel", "packed_gemm_kernel", "small_batch_kernel"))
    ]
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
    converting = [conversion_row(k) for k in kernels if k.name.startswith("hopper_packed_gemm_kernel")]
    if converting:
        print(f"\nhopper_packed_gemm_kernel on sm_90a, converters:\n{table(converting)}")
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
