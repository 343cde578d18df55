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
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_ext import ops
from moe_ext.bench.cpu import Rounds, measure
from moe_ext.bench.layer import Layer
from moe_ext.binary import _C
from moe_ext.models.dtypes import DTYPES
from moe_ext.storage.dated_results import table, write_result
from moe_ext.storage.machine import processor

SHAPES = ["1024,3584,8,2", "2048,768,64,8", "4096,14336,4,2"]  # H, I, E, K
TOKENS = [1, 2, 4, 8, 16, 64, 256, 1024]


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
