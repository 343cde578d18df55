"""How much of a model's quality is left when its experts are quantised, by format and way of rounding?

    python benchmarks/rounding.py [--output benchmarks/results/<date>-rounding.json]

On the two small, really trained models of benchmarks/quality.py and its held-out text: perplexity, KL divergence from
the float model, and top-1 agreement. Small, undertrained models: what is measured here ranks formats on these two, and
nothing else.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from quality import BATCH, MODELS, STRIDE, WINDOW, Judge

import moe_ext
from moe_ext.binary import _C
from moe_ext.storage.dated_results import table, write_result
from moe_ext.storage.machine import processor

WAYS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "fp8, a scale a row": {"weights": "fp8"},
    "fp8, blocks of 128": {"weights": "fp8", "group_size": 128},
    "mxfp4": {"weights": "mxfp4"},
    **{
        f"int4, groups of {size}{name}": {"weights": "int4", "group_size": size, **options}
        for size in (32, 64, 128)
        for name, options in (("", {}), (", searched", {"search_scales": True}), (", zeros", {"symmetric": False}))
    },
}
EIGHT_BITS = ("int8", "mxfp4", "int4, groups of 32", "int4, groups of 128")
"""Of these ways, those also run with activations in 8 bits."""


def rows(judge: Judge) -> list[dict[str, Any]]:
    found = []
    ways: list[tuple[str, Literal["int8"] | None]] = [
        *((name, None) for name in WAYS),
        *((name, "int8") for name in EIGHT_BITS),
    ]
    for name, activations in ways:
        quantised = moe_ext.quantize(copy.deepcopy(judge.model), **WAYS[name])
        model = moe_ext.patch(quantised, activations=activations)
        result = moe_ext.divergence(
            model, judge.reference, judge.held_out, judge.tokenizer, window=WINDOW, stride=STRIDE, batch_size=BATCH
        )
        perplexity = result.perplexity.mean
        shown = name if activations is None else f"{name}; activations int8"
        found.append({"format": shown, "perplexity": perplexity, "KL": result.mean_kl, "top-1": result.mean_top1})
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    models: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            judge = Judge(Path(__file__).parent.parent / "examples" / name, Path(scratch))
            models[name] = {"float": judge.unpruned.mean, "rows": rows(judge)}
        print(f"\n{name}: {models[name]['float']:.2f} as it is\n\n{table(models[name]['rows'])}\n")
    if arguments.output is not None:
        write_result(
            arguments.output,
            "benchmarks/rounding.py: held-out text of five domains, as benchmarks/quality.py",
            machine=processor(),
            threads=torch.get_num_threads(),
            variant=_C.active_cpu_variant(),
            models=models,
        )


if __name__ == "__main__":
    main()
