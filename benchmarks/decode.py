"""How fast does a whole Mixtral decode on the CPU, whole, pruned, thinned and skipping, and what does patching take?

    python benchmarks/decode.py [--output benchmarks/results/<date>-decode.json]

A Mixtral of random weights, larger than any cache. Every variant generates the same number of tokens from the same
prompt, greedily, batch 1, in interleaved rounds; tokens/s are medians. Thresholds for skipping are the medians of a
calibration on random tokens, so that about half of the second experts are skipped. Thinner experts keep random
channels: what they compute is of no matter here. The share of the time that they save is compared with the share of the
bytes of weights that a token reads. Memory is the peak resident set of a process that loads the model from its folder
and runs one forward of 256 tokens, patched or not.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import moe_ext
from moe_ext.binary import _C
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.layout import layout_of
from moe_ext.runtime.skipping import count_skips
from moe_ext.storage.dated_results import table, write_result
from moe_ext.storage.machine import processor

WIDTHS = (0.75, 0.5)
"""Shares of the channels that thinner experts keep."""

FORWARD = """
import sys, torch, moe_ext
from moe_ext.storage.machine import peak_resident_bytes
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", experts_implementation="grouped_mm")
if sys.argv[2] == "patched":
    moe_ext.patch(model)
with torch.no_grad():
    model(input_ids=torch.arange(256)[None])
print(peak_resident_bytes())
"""


def random_mixtral(
    layers: int, hidden: int, intermediate: int, dtype: torch.dtype, device: str = "cpu"
) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        num_local_experts=8,
        num_experts_per_tok=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    with torch.device(device):
        model.model.rotary_emb.__init__(config)  # its frequencies are a buffer, not a parameter
    return model.eval()


def thinned(model: MixtralForCausalLM, width: int) -> MixtralForCausalLM:
    """A copy whose experts keep so many channels, at random."""
    config, generator = model.config, torch.Generator().manual_seed(2)
    experts, channels = config.num_local_experts, config.intermediate_size
    kept = [
        torch.rand(experts, channels, generator=generator).argsort(1)[:, :width].sort(1).values
        for _ in range(config.num_hidden_layers)
    ]
    keep = (tuple(range(experts)),) * config.num_hidden_layers
    layout = layout_of(model, moe_blocks(model))
    plan = PruningPlan.of(layout, keep, {"select": "random"}, KeptChannels.of(kept, channels))
    return moe_ext.prune(copy.deepcopy(model), plan)


def bytes_read(model: MixtralForCausalLM, skipped: float) -> tuple[int, int]:
    """Weights that a token of a batch of one reads: those of its experts, and all."""
    config = model.config
    # Quantised experts are buffers.
    experts = sum(
        tensor.nbytes for name, tensor in (*model.named_parameters(), *model.named_buffers()) if ".experts." in name
    )
    embeddings = model.get_input_embeddings().weight.nbytes  # of which it reads a row
    others = sum(tensor.nbytes for name, tensor in model.named_parameters() if ".experts." not in name) - embeddings
    chosen = round(experts * config.num_experts_per_tok / config.num_local_experts * (1 - skipped))
    return chosen, chosen + others


def generate(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds to generate `tokens` tokens after the prompt was read."""
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        start = time.perf_counter()
        model.generate(
            input_ids=torch.cat([prompt, prompt[:, :1]], dim=1),
            past_key_values=cache,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        return time.perf_counter() - start


def saved(name: str, times: dict[str, list[float]], read: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What a thinned model saves of the whole one's time and bytes, both patched."""
    # The two stand beside each other in a round: what slows the machine down slows both.
    time_saved = 1 - statistics.median(thin / whole for thin, whole in zip(times[name], times["moe_ext"], strict=True))
    bytes_saved = 1 - read[name][1] / read["moe_ext"][1]
    return {
        "variant": name,
        "expert bytes a token": read[name][0],
        "of the whole model's": read["moe_ext"][0],
        "time saved": time_saved,
        "bytes saved": bytes_saved,
        "saved time / saved bytes": time_saved / bytes_saved,
    }


def peak_memory(folder: Path, how: str) -> int:
    """Bytes."""
    command = [sys.executable, "-c", FORWARD, str(folder), how]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    model = random_mixtral(options.layers, options.hidden, options.intermediate, getattr(torch, options.dtype))
    batches = [{"input_ids": torch.randint(0, 1024, (4, 128), generator=torch.Generator().manual_seed(1))}]
    stats = moe_ext.calibrate(model, batches, progress=False)
    scores = moe_ext.score(stats)
    models = {"whole": model}
    models |= {f"{keep} kept": moe_ext.prune(copy.deepcopy(model), moe_ext.plan(scores, keep=keep)) for keep in (6, 4)}
    models |= {f"{share:.0%}": thinned(model, round(share * options.intermediate)) for share in WIDTHS}
    thresholds = {"whole": moe_ext.skip_thresholds(stats)}
    for name in ("6 kept", "4 kept"):
        thresholds[name] = moe_ext.skip_thresholds(moe_ext.calibrate(models[name], batches, progress=False))

    def variant(name: str, implementation: str, skip: bool) -> Callable[[], Any]:
        """A function that brings a model into the state of a variant, and returns it."""
        chosen = models[name]

        def ready() -> Any:
            moe_ext.unpatch(chosen)
            if implementation == "moe_ext":
                return moe_ext.patch(chosen, skip=thresholds[name] if skip else None)
            chosen.set_experts_implementation(implementation)
            return chosen

        return ready

    variants = {
        "transformers eager": variant("whole", "eager", False),
        "transformers grouped_mm": variant("whole", "grouped_mm", False),
        "moe_ext": variant("whole", "moe_ext", False),
        "moe_ext, 6 experts kept": variant("6 kept", "moe_ext", False),
        "moe_ext, 4 experts kept": variant("4 kept", "moe_ext", False),
        **{f"moe_ext, {share:.0%} of the width": variant(f"{share:.0%}", "moe_ext", False) for share in WIDTHS},
        "moe_ext, skipping": variant("whole", "moe_ext", True),
        "moe_ext, 6 kept and skipping": variant("6 kept", "moe_ext", True),
        "moe_ext, 4 kept and skipping": variant("4 kept", "moe_ext", True),
    }
    prompt = batches[0]["input_ids"][:1, :32]
    times: dict[str, list[float]] = {name: [] for name in variants}
    skipped: dict[str, float] = {}
    read: dict[str, tuple[int, int]] = {}
    for name, ready in variants.items():  # a round to warm up, which also counts what is skipped
        with count_skips(ready()) as count:
            generate(ready(), prompt, options.tokens)
        skipped[name] = count.rate()
        read[name] = bytes_read(ready(), skipped[name])
    for _ in range(options.rounds):
        for name, ready in variants.items():
            times[name].append(generate(ready(), prompt, options.tokens))
    base = statistics.median(times["transformers grouped_mm"])
    rows = [
        {
            "variant": name,
            "tokens/s": options.tokens / statistics.median(seconds),
            "/ grouped_mm": base / statistics.median(seconds),
            "slots skipped": skipped[name],
            "expert MB a token": read[name][0] / 1e6,
        }
        for name, seconds in times.items()
    ]
    print(table(rows))
    thin = [saved(f"moe_ext, {share:.0%} of the width", times, read) for share in WIDTHS]
    print(table(thin))

    with tempfile.TemporaryDirectory() as folder:
        moe_ext.unpatch(model).save_pretrained(folder)
        # Alternately, the least of three: what the allocator leaves differs from run to run.
        peaks = [(peak_memory(Path(folder), "unpatched"), peak_memory(Path(folder), "patched")) for _ in range(3)]
    memory = dict(zip(["unpatched", "patched"], map(min, zip(*peaks, strict=True)), strict=True))
    memory["patched / unpatched"] = memory["patched"] / memory["unpatched"]
    print(json.dumps(memory))
    if options.output is not None:
        write_result(
            options.output,
            f"greedy decoding of {options.tokens} tokens, batch 1, medians of {options.rounds} interleaved rounds",
            machine=f"{processor()}, {torch.get_num_threads()} threads",
            variant=_C.active_cpu_variant(),
            model=f"Mixtral of random weights: {options.layers} layers, H {options.hidden}, I {options.intermediate}, "
            f"8 experts, top-2, {options.dtype}",
            rows=rows,
            thin=thin,
            memory=memory,
        )


if __name__ == "__main__":
    main()
