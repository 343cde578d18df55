"""How close do the CUDA kernels come to the bytes, FLOPs and wavefronts that the work needs? Exact counts, no times.

Runs the layer on the software GPU of ../shared/gpusim, whose counters are the same on every machine:

    python -m gpusim run --torch-mode -- python benchmarks/cuda_counters.py [--output FILE.json]

Prints one table for small batches (bytes), one for large ones (tensor FLOPs, shared memory, bytes), one that compares
the kernels of large batches that an H100 can take, mma.sync and wgmma, one for what observing adds, one for what
observing channels adds to that, one for quantised weights beside bf16, and a roofline computed from the counts. It
fails where a bound of BOUNDS does not hold. --tokens adds batches to the comparison and to the channels; --only-weights
leaves all tables out but that of quantised weights.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import gpusim  # type: ignore[import-not-found]  # the simulator's own module: there is none without it
import torch

from moe_ext import ops
from moe_ext.storage.dated_results import table, write_result

ROOT = Path(__file__).parents[1]
SHAPES = [(1024, 3584, 8, 2), (2048, 768, 64, 8)]  # H, I, E, K
SMALL_BATCHES = [1, 2, 4, 8, 16]
LARGE_BATCHES = [256, 1024]
CHANNEL_BATCHES = [64, *LARGE_BATCHES]  # beside SMALL_BATCHES, to which no bound applies
WEIGHT_BATCHES = [1, 8]
LARGE_WEIGHTS = ["int4-128", "fp8-blocks"]  # at the largest of LARGE_BATCHES; all have the same tiles
PATHS = {"portable": "mma.sync", "hopper": "wgmma"}  # by what MOE_EXT_CUDA_KERNELS calls them
SECTOR = 32

# Column of a table: the bound, whether it is an upper one, and the rows that it is for.
BOUNDS: dict[tuple[str, str], tuple[float, bool, Callable[[dict[str, Any]], bool]]] = {
    ("small", "launches"): (3, True, lambda row: True),
    ("small", "loaded / compulsory"): (1.03, True, lambda row: row["T"] <= 8),
    ("large", "useful / issued FLOPs"): (0.85, False, lambda row: row["T"] == 1024),
    ("large", "wavefronts / minimum"): (1.02, True, lambda row: True),
    ("large", "moved / schedule"): (1.1, True, lambda row: True),
    ("paths", "useful / issued FLOPs"): (0.85, False, lambda row: row["T"] >= 1024),
    ("paths", "moved / schedule"): (1.1, True, lambda row: True),
    ("observed", "added bytes"): (0.01, True, lambda row: True),
    ("observed", "added instructions"): (0.03, True, lambda row: True),
    ("channels", "added bytes"): (0.01, True, lambda row: row["T"] >= 64),
    ("channels", "added instructions"): (0.03, True, lambda row: row["T"] >= 64),
    ("weights", "missed in L2 / compulsory"): (1.03, True, lambda row: row["T"] <= 8),
    ("weights", "FLOPs / bf16's"): (0.9, False, lambda row: row["T"] == 1024),
    ("weights", "observed bytes / bf16's"): (0.01, True, lambda row: True),
}


@dataclass
class Format:
    """Quantised weights as the operators take them: ops.LayerOptions."""

    weight_type: str
    group_size: int
    scales: torch.dtype = torch.float32
    zeros: bool = False

    def bits(self) -> int:
        return 4 if self.weight_type in ("int4", "mxfp4") else 8

    def scale_shape(self, num_experts: int, rows: int, columns: int) -> tuple[int, ...]:
        if self.group_size == 0:
            return num_experts, rows
        return num_experts, ceil(rows / 128) if self.weight_type == "fp8" else rows, ceil(columns / self.group_size)


FORMATS = {
    "int8": Format("int8", 0),
    "int4-32": Format("int4", 32, torch.bfloat16),
    "int4-128": Format("int4", 128, torch.float16),
    "int4-128-zeros": Format("int4", 128, torch.float16, zeros=True),
    "fp8": Format("fp8", 0),
    "fp8-blocks": Format("fp8", 128),
    "mxfp4": Format("mxfp4", 32, torch.uint8),
}

# Peak rates from NVIDIA's data sheets: dense bf16 tensor FLOP/s with float32 accumulation, bytes/s of device memory.
GPUS = {
    "A100 SXM 80GB": (312e12, 2.039e12),
    "H100 SXM": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "RTX 4090": (165.2e12, 1.008e12),
}


@dataclass
class Layer:
    """One MoE layer's inputs and the counters of every launch that computing it took."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    tokens: int
    skipped: int
    experts: torch.Tensor  # (T, K), E in skipped slots
    launches: list[dict[str, Any]]
    expert_bytes: int  # of an expert's weights, with their scales and zero points

    def total(self, *names: str) -> int:
        return sum(int(launch[name]) for launch in self.launches for name in names)

    def of(self, kernel: str) -> list[dict[str, Any]]:
        return [launch for launch in self.launches if kernel in launch["kernel"]]

    def slots(self) -> int:
        return self.tokens * self.top_k - self.skipped

    def counts(self) -> list[int]:
        """Slots of every expert that has one."""
        counts = torch.bincount(self.experts.flatten(), minlength=self.num_experts)[: self.num_experts]
        return [n for n in counts.tolist() if n]

    def weight_bytes(self) -> int:
        return len(self.counts()) * self.expert_bytes

    def compulsory_bytes(self) -> int:
        """The active experts' weights, x and h, each read once."""
        return self.weight_bytes() + 2 * (self.tokens * self.hidden + self.slots() * self.intermediate)

    def useful_flops(self) -> int:
        return 6 * self.hidden * self.intermediate * self.slots()


class Case:
    """Random weights of one shape, in bf16 or quantised, on the device; layers of any number of tokens run on them."""

    def __init__(
        self, hidden: int, intermediate: int, num_experts: int, top_k: int, form: Format | None = None
    ) -> None:
        self.hidden, self.intermediate, self.num_experts, self.top_k = hidden, intermediate, num_experts, top_k
        generator = torch.Generator().manual_seed(0)
        self.options: dict[str, Any] = {}
        if form is not None:
            self.options = {"weight_type": form.weight_type, "group_size": form.group_size}

        def weights(name: str, *shape: int) -> torch.Tensor:
            if form is None:
                return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16).to("cuda")
            scale_shape = form.scale_shape(*shape)
            scales = torch.full(scale_shape, 120) if form.weight_type == "mxfp4" else torch.full(scale_shape, 0.01)
            self.options[f"{name}_scales"] = scales.to(form.scales).to("cuda")
            if form.zeros:
                self.options[f"{name}_zeros"] = torch.full(scale_shape, 7, dtype=torch.uint8).to("cuda")
            row_bytes = ceil(shape[-1] * form.bits() / 512) * 64
            # 0x00 to 0x77: no NaN of fp8.
            codes = torch.randint(0, 0x78, (*shape[:2], row_bytes), dtype=torch.uint8, generator=generator)
            return codes.to("cuda")

        self.gate_up = weights("gate_up", num_experts, 2 * intermediate, hidden)
        self.down = weights("down", num_experts, hidden, intermediate)
        tensors = [self.gate_up, self.down, *(one for one in self.options.values() if isinstance(one, torch.Tensor))]
        self.expert_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) // num_experts

    def run(
        self,
        tokens: int,
        kernels: str = "portable",
        *,
        observed: bool = False,
        channels: bool = False,
        threshold: float | None = None,
    ) -> Layer:
        os.environ["MOE_EXT_CUDA_KERNELS"] = kernels
        generator = torch.Generator().manual_seed(tokens)
        logits = torch.randn(tokens, self.num_experts, generator=generator).to("cuda")
        x = torch.randn(tokens, self.hidden, generator=generator).to(torch.bfloat16).to("cuda")
        thresholds = None if threshold is None else torch.full((self.top_k - 1,), threshold, device="cuda")
        moments = torch.zeros(self.num_experts, 3, 3, dtype=torch.float64, device="cuda")
        energies = torch.zeros(self.num_experts, self.intermediate, dtype=torch.float64, device="cuda")
        gpusim.reset_counters()
        weights, experts = ops.route(logits, self.top_k, thresholds)
        arguments = (x, self.gate_up, self.down, experts, weights, "silu")
        if observed:
            ops.experts_observed(*arguments, moments, None, energies if channels else None, **self.options)
        else:
            ops.experts(*arguments, **self.options)
        launches = gpusim.counters()
        experts = experts.cpu()
        skipped = int((experts == self.num_experts).sum())
        shape = (self.hidden, self.intermediate, self.num_experts, self.top_k)
        return Layer(*shape, tokens, skipped, experts, launches, self.expert_bytes)


# ---- small batches


def small_batch_row(layer: Layer) -> dict[str, Any]:
    return {
        "launches": len(layer.launches),
        "active experts": len(layer.counts()),
        "compulsory MB": layer.compulsory_bytes() / 1e6,
        "loaded MB": layer.total("global_load_sectors") * SECTOR / 1e6,
        "loaded / compulsory": layer.total("global_load_sectors") * SECTOR / layer.compulsory_bytes(),
    }


# ---- large batches


def gemm_shapes() -> list[tuple[int, int]]:
    """(rows, columns) of a block's tile, read from the table in shapes.h."""
    text = (ROOT / "csrc" / "cuda" / "shapes.h").read_text()
    table = text[text.index("kGemmShapes[] = {") : text.index("inline constexpr int kTall")]
    return [(int(rows), int(columns)) for rows, columns in re.findall(r"\{(\d+), (\d+),", table)]


def hopper_tile() -> tuple[int, int]:
    """The same of gemm_wgmma.cu."""
    text = (ROOT / "csrc" / "cuda" / "shapes.h").read_text()
    rows, columns = re.findall(r"kHopperRows = (\d+), kHopperColumns = (\d+);", text)[0]
    return int(rows), int(columns)


def tile_rows(counts: list[int], height: int) -> Iterator[int]:
    """Rows of every tile: an expert's rows are cut evenly, in multiples of 16, into as few tiles as can hold them."""
    for count in counts:
        tiles = ceil(count / height)
        rows = ceil(ceil(count / tiles) / 16) * 16
        yield from (min(rows, count - first) for first in range(0, count, rows))


def schedule_bytes(layer: Layer) -> int:
    """Global bytes that the two products' tiles need: each tile reads its rows of a and of b once and writes its c."""
    needed = 0
    for launch in layer.of("gemm_kernel"):
        product = int(re.search(r"\(moe_ext::cuda::Product\)(\d)", launch["kernel"])[1])  # type: ignore[index]
        shape = re.search(r", (\d), \(moe_ext::cuda::Product\)", launch["kernel"])
        height, width = hopper_tile() if shape is None else gemm_shapes()[int(shape[1])]
        inner, columns = (layer.hidden, layer.intermediate) if product == 0 else (layer.intermediate, layer.hidden)
        b_rows = 2 * columns if product == 0 else columns
        blocks = ceil(b_rows / width)
        for rows in tile_rows(layer.counts(), height):
            needed += 2 * (blocks * rows * inner + b_rows * inner + rows * columns)
    return needed


def large_batch_row(layer: Layer) -> dict[str, Any]:
    products = layer.of("grouped_gemm_kernel")
    # A warp's 16-byte accesses (ldmatrix.x4, cp.async, the epilogue's loads) take 4 wavefronts, its 4-byte stores 1.
    passes = {"ldmatrix": 4, "cp.async": 4, "ld.shared": 4, "st.shared": 1}
    minimum = sum(n * launch["warp_instructions"].get(name, 0) for launch in products for name, n in passes.items())
    return {
        "launches": len(layer.launches),
        "useful / issued FLOPs": layer.useful_flops() / sum(launch["tensor_flops"] for launch in products),
        "wavefronts / minimum": sum(launch["shared_wavefronts"] for launch in products) / minimum,
        "schedule MB": schedule_bytes(layer) / 1e6,
        "moved / schedule": moved(products) / schedule_bytes(layer),
        "DRAM MB (distinct)": sum(
            launch["unique_load_sectors"] + launch["unique_store_sectors"] for launch in layer.launches
        )
        * SECTOR
        / 1e6,
    }


def path_row(layer: Layer, path: str) -> dict[str, Any]:
    """What the two products take by one of PATHS. Instructions are PTX, of a warp: machine code has fewer."""
    products = layer.of("gemm_kernel")
    instructions = sum(launch["warp_instructions_total"] for launch in products)
    name = "wgmma.mma_async" if path == "hopper" else "mma"
    multiplying = sum(launch["warp_instructions"].get(name, 0) for launch in products)
    flops = sum(launch["tensor_flops"] for launch in products)
    return {
        "path": PATHS[path],
        "useful / issued FLOPs": layer.useful_flops() / flops,
        "instructions / product": instructions / multiplying,
        "FLOPs / instruction": flops / instructions,
        "wavefronts / MFLOP": sum(launch["shared_wavefronts"] for launch in products) / flops * 1e6,
        "moved MB": moved(products) / 1e6,
        "moved / schedule": moved(products) / schedule_bytes(layer),
        **{name: time for name, time in roofline_row(layer).items() if name.startswith("H")},
    }


def moved(launches: list[dict[str, Any]]) -> int:
    """Bytes of global memory."""
    return sum(launch["global_load_sectors"] + launch["global_store_sectors"] for launch in launches) * SECTOR


def observed_row(plain: Layer, observed: Layer) -> dict[str, Any]:
    return {
        "added bytes": moved(observed.launches) / moved(plain.launches) - 1,
        "added instructions": observed.total("warp_instructions_total") / plain.total("warp_instructions_total") - 1,
    }


def weights_row(layer: Layer, observed: Layer, plain: Layer) -> dict[str, Any]:
    """Of quantised weights; `plain` is the same in bf16. Instructions are PTX, of a thread.

    Every block that works on an expert reads its tokens' activations, from L2 but for the first: beside a half and a
    quarter of the weights' bytes that is more of what is loaded, and no more of what comes from memory.
    """

    def efficiency(one: Layer) -> float:
        return one.useful_flops() / one.total("tensor_flops")

    return {
        "weight MB": layer.weight_bytes() / 1e6,
        "loaded / compulsory": layer.total("global_load_sectors") * SECTOR / layer.compulsory_bytes(),
        "missed in L2 / compulsory": layer.total("l2_miss_sectors") * SECTOR / layer.compulsory_bytes(),
        "instructions / weight byte": layer.total("warp_instructions_total") * 32 / layer.weight_bytes(),
        "bf16's": plain.total("warp_instructions_total") * 32 / plain.weight_bytes(),
        "FLOPs / bf16's": efficiency(layer) / efficiency(plain),
        "observed bytes / bf16's": (moved(observed.launches) - moved(layer.launches)) / moved(plain.launches),
    }


def weights_rows(shape: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    plain_case, most, rows = Case(*shape), max(LARGE_BATCHES), []
    for tokens in [*WEIGHT_BATCHES, most]:
        plain = plain_case.run(tokens)
        for name, form in FORMATS.items():
            if tokens == most and name not in LARGE_WEIGHTS:
                continue
            case = Case(*shape, form)
            row = weights_row(case.run(tokens), case.run(tokens, observed=True), plain)
            rows.append({"H, I, E, K": str(shape), "T": tokens, "weights": name} | row)
            print(f"{shape} T={tokens}: {name}", file=sys.stderr, flush=True)
    return rows


def skipped_row(unskipped: Layer, layer: Layer) -> dict[str, Any]:
    """At T = 1, where a skipped slot is a skipped expert. One mma multiplies 512 bytes of weights, nothing twice."""
    skipped = layer.skipped / layer.top_k
    sectors = [
        sum(launch["global_load_sectors"] for launch in one.of("small_batch_kernel")) for one in (unskipped, layer)
    ]
    return {
        "experts skipped": skipped,
        "weights saved (by tensor FLOPs)": 1 - layer.total("tensor_flops") / unskipped.total("tensor_flops"),
        "loaded bytes saved": 1 - sectors[1] / sectors[0],
    }


def roofline_row(layer: Layer) -> dict[str, Any]:
    """Predicted lower bound, not measured: the larger of distinct bytes / bandwidth and issued FLOPs / tensor rate."""
    distinct = layer.total("unique_load_sectors", "unique_store_sectors") * SECTOR
    flops = layer.total("tensor_flops")
    return {f"{gpu} us": max(distinct / memory, flops / rate) * 1e6 for gpu, (rate, memory) in GPUS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only-weights", action="store_true", help="the table of quantised weights only")
    parser.add_argument("--tokens", type=int, action="append", default=[1024], help="of the comparison of paths")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the layers' sizes, the first ones")
    options = parser.parse_args()

    names = (
        "small",
        "large",
        "paths",
        "observed",
        "channels",
        "skipped",
        "weights",
        "roofline (predicted lower bound, not measured)",
    )
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for shape in SHAPES[: options.shapes]:
        tables["weights"] += weights_rows(shape)
        if options.only_weights:
            continue
        case = Case(*shape)
        portable: dict[int, Layer] = {}
        for tokens in SMALL_BATCHES + LARGE_BATCHES:
            case_name: dict[str, Any] = {"H, I, E, K": str(shape), "T": tokens}
            layer = portable[tokens] = case.run(tokens)
            small = tokens in SMALL_BATCHES
            tables["small" if small else "large"].append(
                case_name | (small_batch_row if small else large_batch_row)(layer)
            )
            observed = case.run(tokens, observed=True)
            tables["observed"].append(case_name | {"path": PATHS["portable"]} | observed_row(layer, observed))
            tables[names[-1]].append(case_name | roofline_row(layer))
            print(f"{shape} T={tokens}: {len(layer.launches)} launches", file=sys.stderr, flush=True)
        for tokens in options.tokens:
            for path in PATHS:
                case_name = {"H, I, E, K": str(shape), "T": tokens}
                known = path == "portable" and tokens in portable
                layer = portable[tokens] if known else case.run(tokens, path)
                tables["paths"].append(case_name | path_row(layer, path))
                if path == "hopper":
                    observed = case.run(tokens, path, observed=True)
                    tables["observed"].append(case_name | {"path": PATHS[path]} | observed_row(layer, observed))
                print(f"{shape} T={tokens}: {PATHS[path]}", file=sys.stderr, flush=True)
        for tokens in [*SMALL_BATCHES, *sorted({*CHANNEL_BATCHES, *options.tokens})]:
            for path in ("portable",) if tokens in SMALL_BATCHES else PATHS:
                case_name = {"H, I, E, K": str(shape), "T": tokens, "path": PATHS[path]}
                runs = [case.run(tokens, path, observed=True, channels=channels) for channels in (False, True)]
                tables["channels"].append(case_name | observed_row(*runs))
                print(f"{shape} T={tokens}: channels, {PATHS[path]}", file=sys.stderr, flush=True)
        unskipped = case.run(1)
        for threshold in (0.5, 1.0):
            tables["skipped"].append(
                {"H, I, E, K": str(shape), "threshold": threshold}
                | skipped_row(unskipped, case.run(1, threshold=threshold))
            )

    for name, rows in tables.items():
        if rows:
            print(f"\n## {name}\n{table(rows)}")
    broken = [
        f"{name}, {column}: {row[column]:.4g} in {row}; the bound is {bound}"
        for (name, column), (bound, upper, applies) in BOUNDS.items()
        for row in tables[name]
        if applies(row) and (row[column] > bound if upper else row[column] < bound)
    ]
    if options.output is not None:
        write_result(
            options.output,
            "exact counters of the software GPU gpusim, which simulates an H100; no time was measured",
            bounds={f"{name}, {column}": bound for (name, column), (bound, _, _) in BOUNDS.items()},
            peaks=GPUS,
            tables=tables,
        )
    if broken:
        sys.exit("\n".join(["", "bounds that do not hold:", *broken]))


if __name__ == "__main__":
    main()
