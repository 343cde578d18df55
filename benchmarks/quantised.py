"""How fast are the experts with quantised weights, beside the read bandwidth, bfloat16 weights and transformers?

    python benchmarks/quantised.py [--output benchmarks/results/<date>-quantised.json]

The result is written after every number of tokens: what is stopped leaves what it had measured.

Every row is one shape, number of tokens and kind of weights, bfloat16 activations: medians of interleaved rounds in one
process, the caches emptied by reading a large buffer before every call. `read / bandwidth` is the time that the active
experts' weights and scales take at the rate at which torch reads that buffer in the same rounds, over ours; `peer` is
transformers' fastest implementation in bfloat16. int4 has groups of 128, mxfp4 of 32, int8 and fp8 a scale a row.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from moe_ext.bench.cpu import Rounds, measure_quantised
from moe_ext.bench.layer import Layer
from moe_ext.bench.measure import CACHE_BYTES, Shape
from moe_ext.bench.weights import WEIGHT_TYPES, QuantisedWeights
from moe_ext.binary import _C
from moe_ext.storage.dated_results import table, write_result
from moe_ext.storage.machine import processor

SHAPES = ["2048,768,128,8", "4096,14336,8,2", "1024,3584,8,2"]  # H, I, E, K
TOKENS = [1, 2, 4, 8, 256, 512]
MANY = 256  # tokens, of which a round takes seconds: two rounds will do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", action="append", help="H,I,E,K; may be given several times")
    parser.add_argument("--tokens", help="comma-separated")
    parser.add_argument("--weights", action="append", choices=WEIGHT_TYPES)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="for each number of tokens, about; five rounds at least, of many two"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        rounds = Rounds(options.seconds, CACHE_BYTES)
        few_rounds = Rounds(options.seconds, CACHE_BYTES, least=2)
        print(f"{processor()}, {torch.get_num_threads()} threads, {_C.active_cpu_variant()}")
        for text in options.shape or SHAPES:
            shape = Shape.parse(text)
            layer = Layer(shape.hidden, shape.intermediate, shape.num_experts, shape.top_k, torch.bfloat16, "cpu")
            quantised = [QuantisedWeights(layer, name) for name in options.weights or WEIGHT_TYPES]
            for each in quantised:
                each.check(layer)
            for tokens in map(int, options.tokens.split(",")) if options.tokens else TOKENS:
                found = measure_quantised(layer, quantised, tokens, few_rounds if tokens >= MANY else rounds)
                print("\n".join(table(found).splitlines()[0 if not rows else 2 :]))
                sys.stdout.flush()
                rows += found
                if options.output is not None:
                    write_result(
                        options.output,
                        "medians of interleaved rounds in one process, caches emptied before every call",
                        machine=f"{processor()}, {torch.get_num_threads()} threads",
                        variant=_C.active_cpu_variant(),
                        rows=rows,
                    )
            del layer, quantised


if __name__ == "__main__":
    main()
