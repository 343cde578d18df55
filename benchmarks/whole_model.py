"""What do fewer bits, fewer and thinner experts and skipping do to a whole model's decode speed, and to perplexity?

    python benchmarks/whole_model.py [--weights bfloat16 int8 int4] [--compiled]
        [--output benchmarks/results/<date>-whole-model.json]

Speed is that of the Mixtral of random weights of decode.py, larger than any cache: every variant generates the same
number of tokens from the same prompt, greedily, batch 1, in interleaved rounds; tokens/s are medians. Perplexity beside
it is the demo model's on held-out text like the calibration text, treated alike: six of eight experts by weighted_ean,
thinner experts refitted, thresholds at the median. Experts are quantised last, by rounding to the nearest, the demo
model's int4 in groups of 32.
"""

import argparse
import copy
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from decode import bytes_read, random_mixtral, thinned
from llamacpp import PROMPT, rate
from torch import Tensor

import moe_ext
from moe_ext.bench.weights import with_activations
from moe_ext.binary import _C
from moe_ext.commands.demo import STRIDE, WINDOW, Demo
from moe_ext.evaluation.perplexity import perplexity
from moe_ext.runtime.skipping import count_skips
from moe_ext.storage.dated_results import table, write_result
from moe_ext.storage.machine import processor

Treatment = Literal["whole", "6 experts kept", "75% of the width", "50% of the width", "skipping", "75% and skipping"]
TREATMENTS: tuple[Treatment, ...] = (
    "whole", "6 experts kept", "75% of the width", "50% of the width", "skipping", "75% and skipping",
)  # fmt: skip
WEIGHTS = ("bfloat16", "int8", "int4", with_activations("int8"), with_activations("int4"))
DEMO_MULTIPLE = 32
"""Of the demo model's widths: int4 groups of so many."""


def kind_of(weights: str) -> tuple[str, bool]:
    """What the experts are stored as, and whether activations are multiplied in 8 bits."""
    kind, _, activations = weights.partition(", ")
    return kind, bool(activations)


def quantised(model: Any, kind: str, group_size: int | None = None) -> Any:
    """The model with experts of so many bits, in place."""
    if kind == "bfloat16":
        return model
    return moe_ext.quantize(model, kind, group_size=group_size if kind == "int4" else None)


def run_with(model: Any, skip: Tensor | None, eight_bits: bool) -> Any:
    return moe_ext.patch(model, skip=skip, activations="int8" if eight_bits else None)


def treated(
    whole: Any, treatment: Treatment, statistics_of: Callable[[Any], Any], thin: Callable[[float], Any]
) -> tuple[Any, Tensor | None]:
    """A copy of a model as a treatment leaves it, and its thresholds."""
    if treatment == "6 experts kept":
        plan = moe_ext.plan(moe_ext.score(statistics_of(whole), objective="task-specific"), keep=6)
        model = moe_ext.prune(copy.deepcopy(whole), plan)
    elif treatment.startswith(("75%", "50%")):
        model = thin(int(treatment[:2]) / 100)
    else:
        model = copy.deepcopy(whole)
    return model, moe_ext.skip_thresholds(statistics_of(model)) if treatment.endswith("skipping") else None


def demo_perplexities(folder: Path, weights: list[str]) -> dict[tuple[str, Treatment], float]:
    demo = Demo(folder)
    channels = moe_ext.calibrate(demo.model, demo.calibration, progress=False, channels="energy")

    def thin(size: float) -> Any:
        plan = moe_ext.thin_plan(channels, size=size, multiple=DEMO_MULTIPLE)
        return demo.pruned(plan, refit=True)

    found: dict[tuple[str, Treatment], float] = {}
    for treatment in TREATMENTS:
        model, thresholds = treated(demo.model, treatment, demo.statistics, thin)
        for each in weights:
            kind, eight_bits = kind_of(each)
            patched = run_with(quantised(copy.deepcopy(model), kind, DEMO_MULTIPLE), thresholds, eight_bits)
            quality = perplexity(patched, demo.texts, demo.tokenizer, window=WINDOW, stride=STRIDE, batch_size=16)
            found[each, treatment] = quality.mean
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["bfloat16"])
    parser.add_argument("--compiled", action="store_true", help="compile the decoding of every variant")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--demo", type=Path, default=Path("examples/demo_model"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    quality = demo_perplexities(options.demo, options.weights)
    whole = random_mixtral(options.layers, options.hidden, options.intermediate, torch.bfloat16)
    batches = [{"input_ids": torch.randint(0, 1024, (4, 128), generator=torch.Generator().manual_seed(1))}]

    def statistics_of(model: Any) -> Any:
        return moe_ext.calibrate(model, batches, progress=False)

    def thin(size: float) -> Any:
        return thinned(whole, round(size * options.intermediate))

    # Activations in 8 bits are a way to run the same weights: a kind of weights is in memory once.
    kinds = list(dict.fromkeys(kind_of(each)[0] for each in options.weights))
    models: dict[tuple[str, Treatment], Any] = {}
    skips: dict[Treatment, Tensor | None] = {}
    for treatment in TREATMENTS:
        model, skips[treatment] = treated(whole, treatment, statistics_of, thin)
        for kind in kinds:
            models[kind, treatment] = quantised(model if kind == kinds[-1] else copy.deepcopy(model), kind)

    def running(each: str, treatment: Treatment) -> Any:
        kind, eight_bits = kind_of(each)
        return run_with(models[kind, treatment], skips[treatment], eight_bits)

    names = [(each, treatment) for treatment in TREATMENTS for each in options.weights]
    arguments: dict[tuple[str, Treatment], dict[str, Any]] = {}
    skipped: dict[tuple[str, Treatment], float] = {}
    for name in names:
        model = running(*name)
        with count_skips(model) as count:  # before anything is compiled, which cannot be counted
            rate(model, options.tokens, {})
        skipped[name] = count.rate()
        arguments[name] = {}
        if options.compiled:
            arguments[name] = moe_ext.compile_decoding(model, length=PROMPT + options.tokens + 1)
    rates: dict[tuple[str, Treatment], list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            rates[name].append(rate(running(*name), options.tokens, arguments[name]))
    base = rates[options.weights[0], "whole"]
    rows = [
        {
            "experts": each,
            "variant": treatment,
            "tokens/s": statistics.median(found),
            "/ first row": statistics.median(one / other for one, other in zip(found, base, strict=True)),
            "MB a token": bytes_read(models[kind_of(each)[0], treatment], skipped[each, treatment])[1] / 1e6,
            "slots skipped": skipped[each, treatment],
            "demo model's perplexity": quality[each, treatment],
        }
        for (each, treatment), found in rates.items()
    ]
    rows.sort(key=lambda row: options.weights.index(row["experts"]))
    print(table(rows))
    if options.output is not None:
        write_result(
            options.output,
            f"greedy decoding of {options.tokens} tokens, batch 1, medians of {options.rounds} interleaved rounds, "
            f"{'compiled' if options.compiled else 'uncompiled'}",
            machine=f"{processor()}, {torch.get_num_threads()} threads",
            variant=_C.active_cpu_variant(),
            huge_pages=os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
            model=f"Mixtral of random weights: {options.layers} layers, H {options.hidden}, I {options.intermediate}, "
            "8 experts, top-2",
            rows=rows,
        )


if __name__ == "__main__":
    main()
