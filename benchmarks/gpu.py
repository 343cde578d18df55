"""How fast are the CUDA operators on this GPU, beside transformers' experts and the limits measured in the same run?

    python benchmarks/gpu.py [--output results/<date>-gpu-<name>.json]

For every shape and number of tokens: checks the operators against transformers' eager experts, then times them and
every experts implementation of transformers that runs here (eager, grouped_mm, batched_mm, and those from the Hub if
they are installed) with CUDA events: interleaved, medians, L2 emptied before every call. The roofline of a row is the
larger of (bytes of the active experts' weights and of x and out) / (measured read bandwidth) and FLOPs / (measured
matmul rate); the fraction says how near our time as a CUDA graph comes to it.

It also runs on the software GPU (with small --shape, --tokens and --matmul); times mean nothing there.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layer import DTYPES, Layer
from record import table, write_result

from moe_ext.binary import _C

SHAPES = ["1024,3584,8,2", "2048,768,64,8", "4096,14336,8,2"]  # H, I, E, K; the last is Mixtral-8x7B's layer
TOKENS = [1, 2, 4, 8, 16, 64, 256, 1024, 4096]
PEERS = ["eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe"]
GRAPHED = ["experts", "grouped_mm", "batched_mm"]  # also timed as CUDA graphs: without what Python and launches cost


class Timer:
    """Times functions in turn. Before each call L2 is filled by reading: written lines would cost the call time."""

    def __init__(self, rounds: int, flush_bytes: int) -> None:
        self.rounds = rounds
        self.flush = torch.zeros(max(1, flush_bytes // 4), device="cuda")

    def medians(self, functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each function."""
        times: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()  # warm up
        for _ in range(self.rounds):
            for name, function in functions.items():
                self.flush.sum()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                function()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) / 1e3)
        return {name: statistics.median(values) for name, values in times.items()}


def graphed(function: Callable[[], Any]) -> Callable[[], None]:
    """A function that replays what `function` launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # what is set up once must not be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measured_limits(timer: Timer, matmul: int, dtype: torch.dtype) -> dict[str, float]:
    """Read bandwidth over a buffer of matmul^2 * 32 bytes, and the rate of a square matrix product."""
    buffer = torch.ones(matmul * matmul * 8, dtype=torch.float32, device="cuda")
    a, b = (torch.randn(matmul, matmul, device="cuda").to(dtype) for _ in range(2))
    seconds = timer.medians({"read": lambda: buffer.sum(), "matmul": lambda: a @ b})
    return {
        "read bytes/s": buffer.numel() * 4 / seconds["read"],
        "matmul FLOP/s": 2 * matmul**3 / seconds["matmul"],
    }


def measure(layer: Layer, tokens: int, timer: Timer, limits: dict[str, float]) -> tuple[dict[str, Any], dict[str, str]]:
    """A row of the result, and the peers that did not run with the reason."""
    x, logits, weights, experts = layer.inputs(tokens)
    functions = layer.operators(x, logits, weights, experts)
    missing = {}
    for name in PEERS:
        function = layer.peer(name, x, experts, weights)
        try:
            function()
        except Exception as error:  # a peer that does not run here is named in the result, whatever its reason
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            functions[name] = function
    for name in GRAPHED:
        if name in functions:
            functions[f"{name} graph"] = graphed(functions[name])
    seconds = timer.medians(functions)

    hidden, intermediate = layer.hidden, layer.intermediate
    active = int(experts.unique().numel())
    size = x.element_size()
    needed = active * 3 * hidden * intermediate * size + 2 * tokens * hidden * size
    flops = 6 * hidden * intermediate * experts.numel()
    roofline = max(needed / limits["read bytes/s"], flops / limits["matmul FLOP/s"])
    row: dict[str, Any] = {
        "H": hidden,
        "I": intermediate,
        "E": layer.num_experts,
        "K": layer.top_k,
        "T": tokens,
        "active": active,
        "roofline us": roofline * 1e6,
        "fraction": roofline / seconds["experts graph"],
    }
    columns = ["route", "experts", "experts_observed", *PEERS, *(f"{name} graph" for name in GRAPHED)]
    row |= {f"{name} us": seconds.get(name, float("nan")) * 1e6 for name in columns}
    return row, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="H,I,E,K; may be given several times")
    parser.add_argument("--tokens", help="comma-separated")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--matmul", type=int, default=8192, help="size of the product that measures the matmul rate")
    parser.add_argument("--flush-mb", type=int, default=256, help="read before every call to empty L2")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available() or not _C.cuda_archs:
        sys.exit("this needs a CUDA device and a build of moe_ext with CUDA kernels")

    dtype = DTYPES[options.dtype]
    with torch.no_grad():
        timer = Timer(options.rounds, options.flush_mb << 20)
        limits = measured_limits(timer, options.matmul, dtype)
        print(", ".join(f"{name}: {value:.4g}" for name, value in limits.items()), flush=True)
        rows: list[dict[str, Any]] = []
        missing: dict[str, str] = {}
        for text in options.shape or SHAPES:
            hidden, intermediate, num_experts, top_k = map(int, text.split(","))
            layer = Layer(hidden, intermediate, num_experts, top_k, dtype, "cuda")
            for tokens in map(int, options.tokens.split(",")) if options.tokens else TOKENS:
                row, reasons = measure(layer, tokens, timer, limits)
                rows.append(row)
                missing |= reasons
                print(table([row]) if len(rows) == 1 else table([row]).splitlines()[-1], flush=True)
            del layer
    for name, reason in missing.items():
        print(f"{name} did not run: {reason}")
    if options.output is not None:
        properties = torch.cuda.get_device_properties(0)
        write_result(
            options.output,
            f"seconds by CUDA events, medians of {options.rounds} interleaved rounds, L2 emptied before every call",
            device=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            cuda_archs=_C.cuda_archs,
            dtype=options.dtype,
            limits=limits,
            not_run=missing,
            rows=rows,
        )


if __name__ == "__main__":
    main()
