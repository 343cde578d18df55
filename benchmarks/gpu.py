"""How fast are the CUDA operators on this GPU, beside transformers' experts and the limits measured in the same run?

    python benchmarks/gpu.py [--weights int8 --weights int4 ...] [--output results/<date>-gpu-<name>.json]

For every shape and number of tokens: checks the operators against transformers' eager experts, then times them and
every experts implementation of transformers that runs here (eager, grouped_mm, batched_mm, and those from the Hub if
they are installed) with CUDA events: interleaved, medians, L2 emptied before every call. The roofline of a row is the
larger of (bytes of the active experts' weights and of x and out) / (measured read bandwidth) and FLOPs / (measured
matmul rate); the fraction says how near our time as a CUDA graph comes to it. --weights measures experts with quantised
weights instead, as graphs, beside the same operator on weights of --dtype and transformers' fastest graph. --paths
measures the sets of kernels that MOE_EXT_CUDA_KERNELS forces beside the one that heuristics.h chooses.

It also runs on the software GPU (with small --shape, --tokens and --matmul); times mean nothing there.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from moe_ext.bench.gpu import Timer, measure, measure_paths, measure_quantised, measured_limits
from moe_ext.bench.layer import Layer
from moe_ext.bench.weights import WEIGHT_TYPES, QuantisedWeights
from moe_ext.binary import _C
from moe_ext.models.dtypes import DTYPES
from moe_ext.storage.dated_results import table, write_result

SHAPES = ["1024,3584,8,2", "2048,768,64,8", "4096,14336,8,2"]  # H, I, E, K; the last is Mixtral-8x7B's layer
TOKENS = [1, 2, 4, 8, 16, 64, 256, 1024, 4096]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="H,I,E,K; may be given several times")
    parser.add_argument("--tokens", help="comma-separated")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--weights", action="append", choices=WEIGHT_TYPES, default=[])
    parser.add_argument("--paths", action="store_true", help="every set of kernels that a layer can be made to take")
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
            quantised = [QuantisedWeights(layer, name) for name in options.weights]
            for each in quantised:
                each.check(layer)
            for tokens in map(int, options.tokens.split(",")) if options.tokens else TOKENS:
                if options.paths:
                    found = measure_paths(layer, quantised, tokens, timer, limits)
                elif quantised:
                    found = measure_quantised(layer, quantised, tokens, timer, limits)
                else:
                    row, reasons = measure(layer, tokens, timer, limits)
                    found = [row]
                    missing |= reasons
                print("\n".join(table(found).splitlines()[2 if rows else 0 :]), flush=True)
                rows += found
            del layer, quantised
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
