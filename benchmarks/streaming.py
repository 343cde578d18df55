"""How much memory does it take to prune, calibrate, thin and search a checkpoint from disk, and how fast does it go?

Makes random checkpoints of several gigabytes, a Mixtral with an expert a tensor, a GraniteMoe with a layer's experts a
tensor, a Mixtral of four-bit words as compressed-tensors packs them, and a GGUF file of Q8_0. Lets ``moe-ext``'s
library do each job in a process of its own, and reads that process's peak resident memory from the system.

    python benchmarks/streaming.py --write benchmarks/results/DATE-streaming.json

In parts, of which each adds its rows to the file:

    python benchmarks/streaming.py --folder /tmp/made --jobs
    python benchmarks/streaming.py --folder /tmp/made --jobs import prune calibrate --write DATE-streaming.json
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from moe_ext.checkpoints.stored_tensors import INDEX, stored_tensors
from moe_ext.storage.dated_results import write_result

LAYERS, EXPERTS = {"hub": 16, "fused": 16, "packed": 32, "gguf": 16}, 8  # packed: of more than 3 GB, too
CONFIG: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "dtype": "bfloat16",
}
MODEL_TYPES = {"hub": "mixtral", "fused": "granitemoe", "packed": "mixtral", "gguf": "mixtral"}  # by layout
BLOCKS = {"hub": "mlp", "fused": "block_sparse_moe", "packed": "mlp", "gguf": "mlp"}
GROUP = 128  # columns of a packed weight that share a scale

TOKENS = (2, 2, 256)  # batches, sequences, tokens

PRUNE = """
import moe_ext
from moe_ext.decision.pruning_plan import PruningPlan
layers = tuple(f"model.layers.{layer}.{BLOCK}" for layer in range(LAYERS))
plan = PruningPlan(MODEL_TYPE, 8, 2, layers, ((0, 2, 3, 4, 6, 7),) * LAYERS)
moe_ext.prune_checkpoint(SOURCE, plan, OUT, progress=False)
"""
PRUNE_GGUF = PRUNE.replace("prune_checkpoint(SOURCE", "prune_gguf(SOURCE + '/model.gguf'")
# The layers' times: of loading (which waits for the disk unless it was read ahead) and of computing.
CALIBRATE = """
import json, os, time
import torch
import moe_ext
from moe_ext.checkpoints.streamed_model import LayersOnDisk
batches = [{"input_ids": torch.randint(0, 8192, TOKENS[1:])} for _ in range(TOKENS[0])]
need, loading = LayersOnDisk.need, []
def timed(self, layer):
    begin = time.perf_counter()
    need(self, layer)
    loading.append(time.perf_counter() - begin)
LayersOnDisk.need = timed
begin = time.perf_counter()
if "scratch" in OPTIONS:
    os.makedirs(OPTIONS["scratch"])
stats = moe_ext.calibrate(SOURCE, batches, progress=False, **OPTIONS)
seconds = time.perf_counter() - begin
if "channels" in OPTIONS:
    stats.save(BESIDE + ".safetensors")
print(json.dumps({"calibration_seconds": round(seconds, 2), "loading_seconds": round(sum(loading), 2),
                  "computing_seconds": round(seconds - sum(loading), 2)}))
"""
PLAN_THIN = """
import warnings
import moe_ext
warnings.simplefilter("ignore")  # random text leaves experts without tokens
stats = moe_ext.ExpertStatistics.load(BESIDE + ".safetensors")
moe_ext.thin_plan(stats, fit=CHECKPOINT_BYTES * 6 // 10, model=SOURCE).save(BESIDE + ".json")
"""
PRUNE_THIN = """
import json
import moe_ext
from moe_ext.decision.pruning_plan import PruningPlan
plan = PruningPlan.load(BESIDE + ".json")
written = moe_ext.prune_checkpoint(SOURCE, plan, OUT, progress=False)
print(json.dumps({"weight_bytes": written.weight_bytes, "width": plan.channels.width(0)}))
"""
# The same, and the kept channels' down projections fitted to what the thinned layers before give, on random text.
PRUNE_REFIT = """
import json, time, warnings
import torch
import moe_ext
from moe_ext.decision.pruning_plan import PruningPlan
warnings.simplefilter("ignore")  # few tokens for so wide experts
plan = PruningPlan.load(BESIDE + ".json")
batches = [{"input_ids": torch.randint(0, 8192, TOKENS[1:])} for _ in range(TOKENS[0])]
begin = time.perf_counter()
moe_ext.prune_checkpoint(SOURCE, plan, OUT, refit=batches, progress=False)
print(json.dumps({"refit_seconds": round(time.perf_counter() - begin, 2)}))
"""
SEARCH = """
import torch
import moe_ext
batches = [{"input_ids": torch.randint(0, 8192, TOKENS[1:])} for _ in range(TOKENS[0])]
moe_ext.search(SOURCE, batches, keep=6, progress=False)
"""
JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "import": ("hub", "import moe_ext", {}),
    "prune": ("hub", PRUNE, {}),
    "calibrate": ("hub", CALIBRATE, {}),
    "calibrate, no reading ahead": ("hub", CALIBRATE, {"read_ahead": False}),
    "calibrate, scratch folder": ("hub", CALIBRATE, {"scratch": "OUT"}),
    # Each takes what the one before it leaves beside the checkpoints.
    "calibrate, channels": ("hub", CALIBRATE, {"channels": "energy"}),
    "plan, thin": ("hub", PLAN_THIN, {}),
    "prune, thin": ("hub", PRUNE_THIN, {}),
    "prune, thin, refit": ("hub", PRUNE_REFIT, {}),
    "search": ("hub", SEARCH, {}),
    "prune, fused": ("fused", PRUNE, {}),
    "calibrate, fused": ("fused", CALIBRATE, {}),
    "calibrate, channels, fused": ("fused", CALIBRATE, {"channels": "energy"}),
    "plan, thin, fused": ("fused", PLAN_THIN, {}),
    "prune, thin, fused": ("fused", PRUNE_THIN, {}),
    "prune, thin, refit, fused": ("fused", PRUNE_REFIT, {}),
    "search, fused": ("fused", SEARCH, {}),
    "prune, packed": ("packed", PRUNE, {}),
    "calibrate, packed": ("packed", CALIBRATE, {}),
    "search, packed": ("packed", SEARCH, {}),
    "prune, gguf": ("gguf", PRUNE_GGUF, {}),
    "calibrate, gguf": ("gguf", CALIBRATE, {}),
    "search, gguf": ("gguf", SEARCH, {}),
}


def make_checkpoint(folder: Path, layout: str) -> None:
    """A random model, one layer a shard: "hub", Mixtral with an expert's projections one by one; "fused", GraniteMoe
    with those of all experts in one tensor; "packed", "hub" with experts of four bits. Shapes are the same."""
    layers = LAYERS[layout]
    config = AutoConfig.for_model(MODEL_TYPES[layout], num_hidden_layers=layers, **CONFIG)
    if layout == "packed":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
        config.quantization_config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    config.save_pretrained(folder)
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.hidden_size // 16
    noise = torch.randn(inner * hidden, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)) * 0.02
    made, total, weight_map = 0, 0, {}

    def random(*shape: int) -> torch.Tensor:
        """Other numbers every time, without the cost of drawing them anew."""
        nonlocal made
        made += 1
        size = math.prod(shape)
        repeated = noise.roll(made * 7919)[:size] if size <= noise.numel() else noise.repeat(-(-size // noise.numel()))
        return repeated[:size].reshape(shape).clone()

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{prefix}.self_attn.q_proj.weight": random(hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": random(8 * head, hidden),
            f"{prefix}.self_attn.v_proj.weight": random(8 * head, hidden),
            f"{prefix}.self_attn.o_proj.weight": random(hidden, hidden),
        }
        experts = f"{prefix}.block_sparse_moe"
        if layout == "fused":
            tensors[f"{experts}.router.layer.weight"] = random(EXPERTS, hidden)
            tensors[f"{experts}.input_linear.weight"] = random(EXPERTS, 2 * inner, hidden)
            tensors[f"{experts}.output_linear.weight"] = random(EXPERTS, hidden, inner)
        else:
            tensors[f"{experts}.gate.weight"] = random(EXPERTS, hidden)
            for expert in range(EXPERTS):
                for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                    module = f"{experts}.experts.{expert}.{name}"
                    if layout == "hub":
                        tensors[f"{module}.weight"] = random(*shape)
                        continue
                    words = random(shape[0], shape[1] // 4).view(torch.int32)
                    tensors[f"{module}.weight_packed"] = words
                    tensors[f"{module}.weight_scale"] = random(shape[0], shape[1] // GROUP).abs_()
                    tensors[f"{module}.weight_shape"] = torch.tensor(shape)
        write(f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors", tensors)
    ends = {
        "model.embed_tokens.weight": random(config.vocab_size, hidden),
        "lm_head.weight": random(config.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    write(f"model-{layers + 1:05d}-of-{layers + 1:05d}.safetensors", ends)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def make_gguf(folder: Path) -> None:
    """The same shapes as llama.cpp's "llama" with experts, in Q8_0, beside the config; all layers are of one layer's
    numbers, and all experts of one expert's."""
    import gguf
    import numpy
    from gguf.quants import quantize

    layers, hidden, inner, head = LAYERS["gguf"], *(CONFIG[f"{name}_size"] for name in ("hidden", "intermediate")), 128
    AutoConfig.for_model("mixtral", num_hidden_layers=layers, **CONFIG).save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(CONFIG["num_experts_per_tok"])
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (8 * head, hidden),
        "attn_v": (8 * head, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate_inp": (EXPERTS, hidden),
        "ffn_gate_exps": (inner, hidden),
        "ffn_up_exps": (inner, hidden),
        "ffn_down_exps": (hidden, inner),
        "ends": (CONFIG["vocab_size"], hidden),
    }
    generator = numpy.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = {}
    for name, shape in shapes.items():
        numbers = generator.standard_normal(shape, dtype=numpy.float32) * numpy.float32(0.02)
        quantised = quantize(numbers, kind)
        blocks[name] = numpy.tile(quantised, (EXPERTS, 1, 1)) if name.endswith("exps") else quantised
    ends, norm = blocks.pop("ends"), numpy.ones(hidden, numpy.float32)
    writer.add_tensor("token_embd.weight", ends, raw_dtype=kind)
    for layer in range(layers):
        for name, tensor in blocks.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", tensor, raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    writer.add_tensor("output.weight", ends, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sizes_of(folder: Path) -> dict[str, int]:
    if (folder / "model.gguf").is_file():
        return {"checkpoint_bytes": (folder / "model.gguf").stat().st_size}
    stored = stored_tensors(folder).values()
    return {
        "checkpoint_bytes": sum(tensor.size for tensor in stored),
        "largest_layer_bytes": max(file.stat().st_size for file in folder.glob("*.safetensors")),
        "largest_tensor_bytes": max(tensor.size for tensor in stored),
    }


def measured(code: str) -> dict[str, Any]:
    """Seconds, peak resident memory and what a Python program printed as JSON in its last line."""
    watch = "\nfrom moe_ext.storage.machine import peak_resident_bytes\nprint()\nprint(peak_resident_bytes())\n"
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code + watch], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    printed = json.loads(lines[-2]) if len(lines) > 1 else {}
    return {"seconds": round(seconds, 1), "peak_rss_bytes": int(lines[-1]), **printed}


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache, so that reading them takes the disk's time."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS))
    parser.add_argument("--folder", type=Path, help="where the checkpoints stay; a temporary folder if absent")
    arguments = parser.parse_args()
    rows, checkpoints = {}, {}
    if arguments.write is not None and arguments.write.exists():
        earlier = json.loads(arguments.write.read_text())
        rows, checkpoints = earlier["jobs"], earlier["checkpoints"]
    made = tempfile.TemporaryDirectory(prefix="moe_ext-") if arguments.folder is None else nullcontext(arguments.folder)
    with made as folder:
        for layout in dict.fromkeys(JOBS[name][0] for name in arguments.jobs) or MODEL_TYPES:
            source = Path(folder) / layout
            if not source.exists():
                source.mkdir(parents=True)
                if layout == "gguf":
                    make_gguf(source)
                else:
                    make_checkpoint(source, layout)
            checkpoints[layout] = sizes_of(source)
            print(layout, json.dumps(checkpoints[layout]), flush=True)
        for name in arguments.jobs:
            layout, code, options = JOBS[name]
            source, out = Path(folder) / layout, Path(folder) / name
            forget(source)
            values = {
                "LAYERS": LAYERS[layout],
                "SOURCE": str(source),
                "OUT": str(out),
                "BESIDE": str(Path(folder) / f"{layout}, channels"),
                "CHECKPOINT_BYTES": checkpoints[layout]["checkpoint_bytes"],
                "TOKENS": TOKENS,
                "MODEL_TYPE": MODEL_TYPES[layout],
                "BLOCK": BLOCKS[layout],
                "OPTIONS": {key: str(out) if value == "OUT" else value for key, value in options.items()},
            }
            rows[name] = measured("".join(f"{key} = {value!r}\n" for key, value in values.items()) + code)
            if out.is_dir():
                shutil.rmtree(out)
            else:
                out.unlink(missing_ok=True)
            print(name, json.dumps(rows[name]), flush=True)
    if arguments.write is not None:
        write_result(
            arguments.write,
            "Peak resident memory and time of jobs on a checkpoint that stays on disk, each in a process of its "
            "own after the checkpoint was dropped from the page cache; 'import': a process that does nothing else.",
            calibration_tokens=TOKENS[0] * TOKENS[1] * TOKENS[2],
            hidden_state_bytes=TOKENS[0] * TOKENS[1] * TOKENS[2] * 2048 * 2,
            machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            checkpoints=checkpoints,
            jobs=rows,
        )


if __name__ == "__main__":
    main()
