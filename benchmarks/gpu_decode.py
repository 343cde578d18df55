"""How fast does a whole Mixtral decode and read a prompt on this GPU: whole, pruned, skipping and quantised?

    python benchmarks/gpu_decode.py [--output benchmarks/results/<date>-gpu-decode-<name>.json]

Layers of Mixtral-8x7B's sizes with random weights. A decode step is captured as a CUDA graph with a static cache, as
servers run it, for transformers' experts and for ours, and replayed in interleaved rounds; medians of CUDA events. A
prompt is one forward of `--prompt` tokens, without a graph; calibration is the same forward while it is observed.
Thresholds for skipping are the medians of a calibration on random tokens, so that about half of the second experts are
skipped.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode import random_mixtral
from torch import Tensor
from transformers import StaticCache

import moe_ext
from moe_ext.bench.gpu import Timer, graphed
from moe_ext.binary import _C
from moe_ext.runtime.skipping import count_skips
from moe_ext.storage.dated_results import table, write_result

LENGTH = 128  # of the cache
MOST_BATCHED = 8
PEERS = ["grouped_mm", "batched_mm"]


def decode_step(model: Any, batch: int) -> Callable[[], Any]:
    """A step of `batch` sequences, captured: it attends to all of the cache, whatever was read before."""
    token = torch.randint(0, 1024, (batch, 1), device="cuda")
    position = torch.ones(batch, 1, dtype=torch.int64, device="cuda")
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)

    def step() -> Tensor:
        logits: Tensor = model(token, past_key_values=cache, position_ids=position).logits
        return logits

    model(token, past_key_values=cache)
    return graphed(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available() or not _C.cuda_archs:
        sys.exit("this needs a CUDA device and a build of moe_ext with CUDA kernels")

    torch.manual_seed(0)
    model = random_mixtral(options.layers, options.hidden, options.intermediate, torch.bfloat16, "cuda")
    prompt = torch.randint(0, 1024, (1, options.prompt), device="cuda")
    tokens = [{"input_ids": torch.randint(0, 1024, (4, 128))}]
    stats = moe_ext.calibrate(model, tokens, progress=False)
    scores = moe_ext.score(stats)
    models = {"whole": model}
    for keep in (6, 4):
        models[f"{keep} kept"] = moe_ext.prune(copy.deepcopy(model), moe_ext.plan(scores, keep=keep))
    for weights in ("int8", "int4"):
        models[weights] = moe_ext.quantize(copy.deepcopy(model), weights)
    thresholds = moe_ext.skip_thresholds(stats)

    def ready(name: str) -> Any:
        """The model of a variant, in its state."""
        if name in PEERS:
            moe_ext.unpatch(model)
            model.set_experts_implementation(name)
            return model
        which, _, skipping = name.partition(", ")
        moe_ext.unpatch(models[which])
        return moe_ext.patch(models[which], skip=thresholds if skipping else None)

    variants = [*PEERS, "whole", "whole, skipping", *list(models)[1:]]
    timer = Timer(options.rounds, 256 << 20)
    rows = []
    with torch.no_grad():
        with count_skips(ready("whole, skipping")) as count:
            model(prompt)
        for batch in map(int, options.batches.split(",")):
            # batched_mm copies every slot's weights.
            names = [name for name in variants if name != "batched_mm" or batch <= MOST_BATCHED]
            seconds = timer.medians({name: decode_step(ready(name), batch) for name in names})
            for name in names:
                rows.append(
                    {
                        "batch": batch,
                        "variant": name,
                        "step us": seconds[name] * 1e6,
                        "tokens/s": batch / seconds[name],
                        "/ grouped_mm": seconds["grouped_mm"] / seconds[name],
                        "slots skipped": count.rate() if "skipping" in name else 0.0,
                    }
                )
            print(table(rows[-len(names) :]), flush=True)
        prompts = []
        for name in variants:
            if name == "batched_mm":
                continue
            functions: dict[str, Callable[[], Any]] = {"forward": partial(ready(name), prompt)}
            if name == "whole":
                functions["calibrate"] = partial(moe_ext.calibrate, model, [{"input_ids": prompt}], progress=False)
            for what, took in timer.medians(functions).items():
                prompts.append({"variant": name, "what": what, "ms": took * 1e3, "tokens/s": options.prompt / took})
        print(table(prompts), flush=True)
    if options.output is not None:
        write_result(
            options.output,
            f"CUDA events, medians of {options.rounds} interleaved rounds, L2 emptied before every call",
            device=torch.cuda.get_device_name(),
            cuda_archs=_C.cuda_archs,
            model=f"Mixtral of random weights: {options.layers} layers, H {options.hidden}, I {options.intermediate}, "
            "8 experts, top-2, bfloat16",
            steps=rows,
            prompts=prompts,
        )


if __name__ == "__main__":
    main()
