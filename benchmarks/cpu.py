"""How fast are the CPU operators beside transformers' experts, and how near the limits measured in the same run?

    python benchmarks/cpu.py [--output benchmarks/results/<date>-cpu.json]

Every row is one shape, dtype and number of tokens: medians of interleaved rounds in one process. Its limits are
measured with the same threads: the rate at which torch reads a buffer larger than the last-level cache (the best of
three reductions), and torch linear's FLOP/s at the per-expert shape of the row. The limit is the time that the active
experts' weights take at the one or the FLOPs at the other, whichever is longer; `of limit` is that over our time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layer import DTYPES, Layer
from record import table, write_result

from moe_ext.binary import _C
from moe_ext.demo import processor

SHAPES = ["1024,3584,8,2", "2048,768,64,8", "4096,14336,4,2"]  # H, I, E, K
TOKENS = [1, 2, 4, 8, 16, 64, 256, 1024]
PEERS = ["eager", "grouped_mm", "batched_mm"]
GATHERED_BYTES = 4 << 30  # batched_mm copies every slot's weights: not run where that takes more


def medians(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each function, called in turn for about `seconds` in all, at least five times each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()  # warm up
    end = time.perf_counter() + seconds
    while len(times[next(iter(times))]) < 5 or time.perf_counter() < end:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def read_bandwidth(gigabytes: float, seconds: float) -> float:
    """Bytes/s of torch's fastest reduction over a buffer that no cache holds."""
    buffer = torch.ones(int(gigabytes * 2**30) // 4)
    times = medians({"sum": buffer.sum, "dot": lambda: torch.dot(buffer, buffer), "max": buffer.max}, seconds)
    return buffer.numel() * 4 / min(times.values())


def linear_rate(rows: int, hidden: int, intermediate: int, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of torch's linear for the two products of an expert with `rows` tokens."""
    x, h = torch.randn(rows, hidden).to(dtype), torch.randn(rows, intermediate).to(dtype)
    gate_up, down = (torch.randn(*s).to(dtype) for s in ((2 * intermediate, hidden), (hidden, intermediate)))

    def both() -> None:
        torch.nn.functional.linear(x, gate_up)
        torch.nn.functional.linear(h, down)

    return 6 * rows * hidden * intermediate / medians({"linear": both}, seconds)["linear"]


def measure(layer: Layer, tokens: int, bandwidth: float, seconds: float) -> dict[str, Any]:
    x, logits, weights, experts = layer.inputs(tokens)
    functions = layer.operators(x, logits, weights, experts)
    expert_bytes = 3 * layer.hidden * layer.intermediate * x.element_size()
    for name in PEERS:
        if name != "batched_mm" or experts.numel() * expert_bytes <= GATHERED_BYTES:
            functions[name] = layer.peer(name, x, experts, weights)
    times = medians(functions, seconds)

    active = int(experts.unique().numel())
    rate = linear_rate(max(1, experts.numel() // active), layer.hidden, layer.intermediate, layer.dtype, seconds / 4)
    read = active * expert_bytes / bandwidth
    multiply = 6 * layer.hidden * layer.intermediate * experts.numel() / rate
    fastest = min(times[name] for name in PEERS if name in times)
    return {
        "H, I, E, K": f"{layer.hidden}, {layer.intermediate}, {layer.num_experts}, {layer.top_k}",
        "dtype": str(layer.dtype).removeprefix("torch."),
        "T": tokens,
        "active": active,
        **{f"{name} ms": times.get(name, float("nan")) * 1e3 for name in ["experts", *PEERS]},
        "fastest peer / ours": fastest / times["experts"],
        "limit ms": max(read, multiply) * 1e3,
        "bound by": "read" if read > multiply else "linear",
        "of limit": max(read, multiply) / times["experts"],
        "observed / experts": times["experts_observed"] / times["experts"],
        "route us": times["route"] * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="H,I,E,K; may be given several times")
    parser.add_argument("--tokens", help="comma-separated")
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row's functions together")
    parser.add_argument("--buffer-gb", type=float, default=2.0, help="read to measure the bandwidth")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        bandwidth = read_bandwidth(options.buffer_gb, options.seconds)
        print(f"{torch.get_num_threads()} threads, {_C.active_cpu_variant()}: reads {bandwidth / 1e9:.1f} GB/s")
        for text in options.shape or SHAPES:
            hidden, intermediate, num_experts, top_k = map(int, text.split(","))
            for name in options.dtype or ["bfloat16", "float32"]:
                layer = Layer(hidden, intermediate, num_experts, top_k, DTYPES[name], "cpu")
                for tokens in map(int, options.tokens.split(",")) if options.tokens else TOKENS:
                    rows.append(measure(layer, tokens, bandwidth, options.seconds))
                    print("\n".join(table(rows[-1:]).splitlines()[0 if len(rows) == 1 else -1 :]))
                    sys.stdout.flush()
                del layer
    if options.output is not None:
        write_result(
            options.output,
            "medians of interleaved rounds in one process",
            machine=f"{processor()}, {torch.get_num_threads()} threads",
            variant=_C.active_cpu_variant(),
            read_bandwidth=bandwidth,
            rows=rows,
        )


if __name__ == "__main__":
    main()
