"""How fast does a whole Mixtral decode on the CPU, patched and compiled, beside llama.cpp?

    make llama-bench    # once: minutes
    python benchmarks/llamacpp.py [--weights bfloat16 int8 int4] [--output benchmarks/results/<date>-llamacpp.json]

Mixtrals of random weights, and GGUF files of the same shapes, with the same weights in bfloat16 and with one expert's,
quantised by the gguf package, in the place of all in Q8_0 (beside int8) and Q4_0 (beside int4): there every matrix is
quantised, here the experts alone, and bytes a token are those that each reads. llama.cpp rounds activations to 8 bits
beside quantised weights; ours are shown with floats and with activations="int8". Batch 1, after a prompt of 32 tokens,
the same number of threads, in alternating rounds; tokens/s are medians, ratios medians of rounds. Ours are the tokens
that ``generate`` gives, with choosing them and all of transformers' Python; llama-bench counts its model's steps alone,
with a cache of float16 and its own defaults. Its weights are pages of a file; THP_MEM_ALLOC_ENABLE=1 in the environment
has torch ask for huge pages for ours.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from decode import bytes_read, random_mixtral
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from torch import Tensor
from transformers import MixtralForCausalLM
from transformers.generation import BaseStreamer

import moe_ext
from moe_ext.bench.weights import with_activations
from moe_ext.binary import _C
from moe_ext.storage.dated_results import table, write_result
from moe_ext.storage.machine import processor

SHAPES = {"small": (8, 1024, 3584), "large": (2, 4096, 14336)}
"""Layers, H and I; 8 experts, top-2."""

KINDS = {"bfloat16": Kind.BF16, "int8": Kind.Q8_0, "int4": Kind.Q4_0}
"""llama.cpp's formats beside ours."""

PROMPT = 32
Array = numpy.ndarray[Any, Any]


class Clock(BaseStreamer):
    """When a token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def rate(self) -> float:
        """Tokens/s after the first new one; what comes first is the prompt."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])


def stored(matrix: Tensor, kind: Kind) -> Array:
    """A matrix (..., N, K) as the bytes of a type of ggml; of several, the first in the place of all but in BF16."""
    if kind == Kind.BF16:
        return matrix.contiguous().view(torch.uint8).numpy()
    if matrix.dim() == 2:
        return quantize(matrix.float().numpy(), kind)
    return numpy.repeat(quantize(matrix[:1].float().numpy(), kind), len(matrix), axis=0)


def write_gguf(path: Path, model: MixtralForCausalLM, kind: Kind) -> int:
    """Writes a model as llama.cpp reads it; returns the bytes of weights that a token of a batch of one reads."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    read = 0

    def add(name: str, tensor: Tensor, held: Kind | None = None, share: float = 1.0) -> None:
        nonlocal read
        if held is None:
            held = kind if tensor.dim() > 1 else Kind.F32
        content = tensor.float().numpy() if held == Kind.F32 else stored(tensor, held)
        writer.add_tensor(f"{name}.weight", content, raw_dtype=held)
        read += round(content.nbytes * share)

    chosen = config.num_experts_per_tok / config.num_local_experts
    with torch.no_grad():
        add("token_embd", model.model.embed_tokens.weight, share=1 / config.vocab_size)
        add("output_norm", model.model.norm.weight)
        add("output", model.lm_head.weight)
        for number, layer in enumerate(model.model.layers):
            attention, experts = layer.self_attn, layer.mlp.experts
            add(f"blk.{number}.attn_norm", layer.input_layernorm.weight)
            add(f"blk.{number}.ffn_norm", layer.post_attention_layernorm.weight)
            for name, module in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
                add(f"blk.{number}.attn_{name}", getattr(attention, module).weight)
            add(f"blk.{number}.ffn_gate_inp", layer.mlp.gate.weight, Kind.F32)
            gate, up = experts.gate_up_proj.chunk(2, dim=1)
            for name, weights in (("gate", gate), ("up", up), ("down", experts.down_proj)):
                add(f"blk.{number}.ffn_{name}_exps", weights, share=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def llama_rate(program: Path, file: Path, tokens: int) -> float:
    """Tokens/s of llama-bench."""
    command = [program, "-m", file, "-p", 0, "-n", tokens, "-d", PROMPT, "-r", 1, "-t", torch.get_num_threads()]
    done = subprocess.run([*map(str, command), "-o", "json"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{program} failed: {done.stderr.strip()[-2000:]}")
    (test,) = json.loads(done.stdout)
    return float(test["avg_ts"])


def rate(model: MixtralForCausalLM, tokens: int, options: dict[str, Any]) -> float:
    """Tokens/s of ``generate``."""
    clock, prompt = Clock(), torch.arange(PROMPT)[None]
    lengths = {"max_new_tokens": tokens + 1, "min_new_tokens": tokens + 1}
    with torch.no_grad():
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, streamer=clock, **lengths, **options
        )
    return clock.rate()


def measure(shape: str, weights: str, program: Path, tokens: int, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """A row for llama.cpp and for every way of ours, of one shape and format of the experts."""
    layers, hidden, intermediate = SHAPES[shape]
    torch._dynamo.reset()  # which counts the models that it has compiled
    model = random_mixtral(layers, hidden, intermediate, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        theirs = write_gguf(file, model, KINDS[weights])
        if weights != "bfloat16":
            moe_ext.quantize(model, weights)
        moe_ext.patch(model)
        ours = bytes_read(model, skipped=0.0)[1]
        ways: dict[str, Callable[[], float]] = {
            f"llama.cpp {KINDS[weights].name}": lambda: llama_rate(program, file, tokens),
        }
        models = {f"moe_ext {weights}": model}
        if weights != "bfloat16":
            eight = moe_ext.patch(copy.deepcopy(model), activations="int8")
            models[f"moe_ext {with_activations(weights)}"] = eight
        seconds = {}
        for name, each in models.items():
            ways[name] = partial(rate, each, tokens, {})
            if compiled:
                start = time.perf_counter()
                options = moe_ext.compile_decoding(each, length=PROMPT + tokens + 1)
                seconds[f"{name}, compiled"] = time.perf_counter() - start
                ways[f"{name}, compiled"] = partial(rate, each, tokens, options)
        for way in ways.values():  # to warm up
            way()
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                rates[name].append(way())
    first = next(iter(ways))
    return [
        {
            "layers, H, I": f"{layers}, {hidden}, {intermediate}",
            "program": name,
            "tokens/s": statistics.median(found),
            "/ llama.cpp": statistics.median(one / other for one, other in zip(found, rates[first], strict=True)),
            "MB a token": (theirs if name == first else ours) / 1e6,
            "seconds to compile": seconds.get(name, 0.0),
        }
        for name, found in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-bench", type=Path, default=Path("build/llama-bench/bin/llama-bench"))
    parser.add_argument("--weights", nargs="+", choices=list(KINDS), default=["bfloat16"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uncompiled", action="store_true", help="leave compiled decoding out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not options.llama_bench.is_file():
        raise SystemExit(f"there is no {options.llama_bench}: make llama-bench")

    rows = []
    for shape in options.shapes:
        for weights in options.weights:
            found = measure(shape, weights, options.llama_bench, options.tokens, options.rounds, not options.uncompiled)
            print(table(found), flush=True)
            rows += found
            if options.output is not None:
                write_result(
                    options.output,
                    f"greedy decoding of {options.tokens} tokens after {PROMPT}, batch 1, {options.rounds} alternating "
                    "rounds",
                    machine=f"{processor()}, {torch.get_num_threads()} threads",
                    variant=_C.active_cpu_variant(),
                    huge_pages=os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
                    rows=rows,
                )


if __name__ == "__main__":
    main()
