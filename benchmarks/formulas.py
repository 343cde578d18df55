"""What do other layouts and formulas of experts cost on the CPU, beside the usual ones of the same size?

    python benchmarks/formulas.py [--shape H,I,E,K] [--tokens 1,16,512] [--seconds 1] [--output FILE.json]

Times the `experts` operator in bfloat16 on random weights: the usual layer, then each formula and layout by name. The
forms take turns, so that what else the machine does meets all of them; a form's time is the least of its rounds.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ext import ops
from moe_ext.bench.measure import Shape
from moe_ext.storage.dated_results import table, write_result
from moe_ext.storage.machine import processor

CLAMPED = {"limit": 7.0, "alpha": 1.702, "up_offset": 1.0}
FORMS: dict[str, dict[str, Any]] = {
    "usual": {},
    "clamped": CLAMPED,
    "capped": {"gate_cap": 4.0, "up_cap": 25.0},
    "interleaved": {"interleaved": True},
    "transposed": {"transposed": True},
    "gpt_oss": {"transposed": True, "interleaved": True, **CLAMPED},
    "relu2, no gate, as wide": {"gated": False},
}


def call_of(shape: Shape, tokens: int, options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``ops.experts``; gpt_oss has biases, too."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16()

    hidden, inner, count = shape.hidden, shape.intermediate, shape.num_experts
    rows = 2 * inner if options.get("gated", True) else inner
    transposed = options.get("transposed", False)
    gate_up = random(count, hidden, rows) if transposed else random(count, rows, hidden)
    down = random(count, inner, hidden) if transposed else random(count, hidden, inner)
    experts = torch.rand(tokens, count, generator=generator).argsort(1)[:, : shape.top_k].contiguous()
    weights = torch.rand(tokens, shape.top_k, generator=generator)
    biases = {"gate_up_bias": random(count, rows), "down_bias": random(count, hidden)} if transposed else {}
    activation = "silu" if options.get("gated", True) else "relu2"
    return (random(tokens, hidden), gate_up, down, experts, weights, activation), {**options, **biases}


def measure(shape: Shape, tokens: int, seconds: float) -> list[dict[str, Any]]:
    calls = {name: call_of(shape, tokens, options) for name, options in FORMS.items()}
    least = dict.fromkeys(calls, float("inf"))
    end = time.monotonic() + seconds * len(calls)
    while time.monotonic() < end or float("inf") in least.values():
        for name, (arguments, options) in calls.items():
            start = time.perf_counter()
            ops.experts(*arguments, **options)
            least[name] = min(least[name], time.perf_counter() - start)
    return [
        {"T": tokens, "form": name, "ms": 1e3 * least[name], "of usual": least[name] / least["usual"]} for name in least
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="2880,2880,8,4", help="H,I,E,K")
    parser.add_argument("--tokens", default="1,16,512")
    parser.add_argument("--seconds", type=float, default=1.0, help="of every form and number of tokens")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    shape = Shape.parse(arguments.shape)
    print(f"{processor()}, {torch.get_num_threads()} threads, H, I, E, K = {arguments.shape}, bfloat16")
    rows = [row for tokens in arguments.tokens.split(",") for row in measure(shape, int(tokens), arguments.seconds)]
    print(table(rows))
    if arguments.output is not None:
        what = "the experts operator on other formulas and layouts, CPU, bfloat16"
        write_result(arguments.output, what, machine=processor(), shape=arguments.shape, rows=rows)


if __name__ == "__main__":
    main()
