"""How fast are the CPU operators beside transformers' experts, and how near the limits measured in the same run?

    python benchmarks/cpu.py [--output benchmarks/results/<date>-cpu.json]

Every row is one shape, dtype and number of tokens: medians of interleaved rounds in one process, the caches emptied by
reading a large buffer before every call, as they are in a model whose layers follow each other. In the same rounds and
with the same threads its limits are measured: the rate at which torch reads a buffer larger than the last-level cache,
and the FLOP/s of torch's linear at the per-expert shape of the row (with caches as warm as it leaves them). The limit
is the time that the active experts' weights take at the one or the FLOPs at the other, whichever is longer; `of limit`
is that over our time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layer import DTYPES, Layer
from record import table, write_result

from moe_ext import ops
from moe_ext.binary import _C
from moe_ext.demo import processor

SHAPES = ["1024,3584,8,2", "2048,768,64,8", "4096,14336,4,2"]  # H, I, E, K
TOKENS = [1, 2, 4, 8, 16, 64, 256, 1024]
PEERS = ["eager", "grouped_mm", "batched_mm"]
GATHERED_BYTES = 4 << 30  # batched_mm copies every slot's weights: not run where that takes more


class Rounds:
    """Times functions in turn, in a process whose caches hold nothing of theirs."""

    def __init__(self, seconds: float, buffer_bytes: int) -> None:
        self.seconds = seconds
        self.buffer = torch.ones(buffer_bytes // 4)

    def read(self) -> float:
        """Seconds to read the buffer: by the reduction of torch that is fastest for one that no cache holds."""
        start = time.perf_counter()
        self.buffer.sum()
        return time.perf_counter() - start

    def medians(self, cold: dict[str, Callable[[], Any]], warm: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each function and of ``read``, in rounds of about ``seconds`` in all, five at least. Those
        in ``warm`` are timed right after a call of themselves."""
        times: dict[str, list[float]] = {name: [] for name in ["read", *cold, *warm]}
        for function in cold.values():
            function()  # what is set up once
        end = time.perf_counter() + self.seconds
        while len(times["read"]) < 5 or time.perf_counter() < end:
            for name, function in {**cold, **warm}.items():
                times["read"].append(self.read())
                if name in warm:
                    function()
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in times.items()}


def linear(rows: int, hidden: int, intermediate: int, dtype: torch.dtype) -> Callable[[], None]:
    """torch's linear for the two products of an expert with `rows` tokens."""
    x, h = torch.randn(rows, hidden).to(dtype), torch.randn(rows, intermediate).to(dtype)
    gate_up, down = (torch.randn(*s).to(dtype) for s in ((2 * intermediate, hidden), (hidden, intermediate)))

    def both() -> None:
        torch.nn.functional.linear(x, gate_up)
        torch.nn.functional.linear(h, down)

    return both


def measure(layer: Layer, tokens: int, rounds: Rounds) -> dict[str, Any]:
    x, logits, weights, experts = layer.inputs(tokens)
    functions = layer.operators(x, logits, weights, experts)
    warm = {"route": functions.pop("route")}
    expert_bytes = 3 * layer.hidden * layer.intermediate * x.element_size()
    for name in PEERS:
        if name != "batched_mm" or experts.numel() * expert_bytes <= GATHERED_BYTES:
            functions[name] = layer.peer(name, x, experts, weights)
    active = int(experts.unique().numel())
    rows = max(1, experts.numel() // active)
    warm["linear"] = linear(rows, layer.hidden, layer.intermediate, layer.dtype)
    times = rounds.medians(functions, warm)

    bandwidth = rounds.buffer.numel() * 4 / times["read"]
    rate = 6 * rows * layer.hidden * layer.intermediate / times["linear"]
    read = active * expert_bytes / bandwidth
    multiply = 6 * layer.hidden * layer.intermediate * experts.numel() / rate
    fastest = min((name for name in PEERS if name in times), key=lambda name: times[name])
    ours = times["experts"]
    return {
        "H, I, E, K": f"{layer.hidden}, {layer.intermediate}, {layer.num_experts}, {layer.top_k}",
        "dtype": str(layer.dtype).removeprefix("torch."),
        "T": tokens,
        "active": active,
        **{f"{name} ms": times.get(name, float("nan")) * 1e3 for name in ["experts", *PEERS]},
        "fastest peer / ours": times[fastest] / ours,
        "read GB/s": bandwidth / 1e9,
        "linear GFLOP/s": rate / 1e9,
        "limit ms": max(read, multiply) * 1e3,
        "bound by": "read" if read > multiply else "linear",
        "weights read / bandwidth": read / ours,
        "FLOP/s / linear": multiply / ours,
        "of limit": max(read, multiply) / ours,
        "observed / experts": times["experts_observed"] / ours,
        "route us": times["route"] * 1e6,
    }


def measure_skipping(layer: Layer, rounds: Rounds) -> list[dict[str, Any]]:
    """One token with 0, 1, ... of its slots skipped: the time saved beside the weight bytes saved."""
    x, _, weights, experts = layer.inputs(1)
    functions: dict[str, Callable[[], Any]] = {}
    for skipped in range(layer.top_k):
        left = experts.clone()
        left[:, layer.top_k - skipped :] = layer.num_experts
        arguments = layer.arguments(x, weights, left)
        functions[str(skipped)] = partial(ops.experts, *arguments)
    times = rounds.medians(functions, {})
    return [
        {
            "H, I, E, K": f"{layer.hidden}, {layer.intermediate}, {layer.num_experts}, {layer.top_k}",
            "dtype": str(layer.dtype).removeprefix("torch."),
            "slots skipped": skipped,
            "bytes saved": skipped / layer.top_k,
            "time saved": 1 - times[str(skipped)] / times["0"],
            "time saved / bytes saved": (1 - times[str(skipped)] / times["0"]) * layer.top_k / skipped,
        }
        for skipped in range(1, layer.top_k)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="H,I,E,K; may be given several times")
    parser.add_argument("--tokens", help="comma-separated")
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row's functions together")
    parser.add_argument("--buffer-mb", type=int, default=256, help="read to empty the caches, and for the bandwidth")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    skipping: list[dict[str, Any]] = []
    with torch.no_grad():
        rounds = Rounds(options.seconds, options.buffer_mb << 20)
        print(f"{processor()}, {torch.get_num_threads()} threads, {_C.active_cpu_variant()}")
        for text in options.shape or SHAPES:
            hidden, intermediate, num_experts, top_k = map(int, text.split(","))
            for name in options.dtype or ["bfloat16", "float32"]:
                layer = Layer(hidden, intermediate, num_experts, top_k, DTYPES[name], "cpu")
                for tokens in map(int, options.tokens.split(",")) if options.tokens else TOKENS:
                    rows.append(measure(layer, tokens, rounds))
                    print("\n".join(table(rows[-1:]).splitlines()[0 if len(rows) == 1 else -1 :]))
                    sys.stdout.flush()
                skipping += measure_skipping(layer, rounds)
                del layer
    print(table(skipping))
    if options.output is not None:
        write_result(
            options.output,
            "medians of interleaved rounds in one process, caches emptied before every call",
            machine=f"{processor()}, {torch.get_num_threads()} threads",
            variant=_C.active_cpu_variant(),
            rows=rows,
            skipping=skipping,
        )


if __name__ == "__main__":
    main()
