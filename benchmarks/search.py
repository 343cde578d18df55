"""How much faster is the reconstruction search than running a layer once a subset, and what does it cost and hold?

    python benchmarks/search.py [--only exact] [--dtype float32] [--output benchmarks/results/<date>-search.json]

Tables that the output file has already, and that are not measured this time, stay in it.

Four questions, each of one layer with random weights:

- exact: all subsets of E = 8, r = 4 over 4096 tokens. The brute force (NAEE's: transformers' eager layer with a masked
  router, once a subset) runs in the same process and must find the same losses. The whole search is one call of
  moe_ext.search on a model of that one layer; the dense forward runs all experts over all tokens, by the same kernels
  and by transformers' eager experts.
- greedy: E = 64, K = 8, keep 48 with swaps, 8192 tokens.
- fisher: the same layer as "exact", by what the model's predictions lose: the whole search with its forward and
  backward pass, beside the reconstruction search, the projections alone beside the dense forward by the same kernels,
  and autograd's forward and backward pass of the whole model.
- memory: a million tokens, batch by batch, exact and greedy, each in a process of its own: how far its peak of resident
  memory rises while it searches.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import moe_ext
from moe_ext import ops
from moe_ext.binary import _C
from moe_ext.models.dtypes import DTYPES
from moe_ext.reconstruction.losses import LayerErrors, ranked
from moe_ext.reconstruction.router_formula import route_among
from moe_ext.reconstruction.subsets import all_subsets
from moe_ext.storage.dated_results import table, write_result
from moe_ext.storage.machine import peak_resident_bytes, processor

MEMORY_TOKENS = 1 << 20


def one_layer_model(
    hidden: int, intermediate: int, num_experts: int, top_k: int, dtype: torch.dtype, layers: int = 1
) -> Any:
    """A random Mixtral. Its vocabulary and attention are small: the search is what is measured."""
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).to(dtype).eval()
    for layer in model.model.layers:
        for weight in layer.mlp.parameters():
            weight.data.normal_(std=weight.shape[-1] ** -0.5)
    model.set_experts_implementation("eager")
    return model


def token_batches(tokens: int, batch: int, window: int = 512) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (tokens // window, window), generator=generator)
    return [{"input_ids": part} for part in ids.split(max(1, batch // window))]


def router_inputs(model: Any, batches: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """x (T, H) and logits (T, E) of every batch."""
    seen: list[tuple[Tensor, Tensor]] = []
    router = model.model.layers[0].mlp.gate
    handle = router.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
    for batch in batches:
        model.base_model(**batch, use_cache=False)
    handle.remove()
    return seen


def seconds(function: Callable[[], Any], rounds: int) -> float:
    """Median."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def brute_force(block: Any, inputs: list[tuple[Tensor, Tensor]], subsets: Tensor, top_k: int) -> Tensor:
    """Losses as NAEE's published code computes them: the layer once a subset."""
    full = [block(x[None])[0] for x, _ in inputs]
    losses = []
    for keep in subsets:
        loss = 0.0
        for (x, logits), expected in zip(inputs, full, strict=True):
            weights, experts = route_among(logits, keep, top_k, None)
            loss += float((block.experts(x, experts, weights.to(x.dtype)).double() - expected.double()).norm())
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


def all_experts(experts: Any, x: Tensor, forward: Callable[..., Tensor]) -> Tensor:
    """All tokens through all experts, in one call."""
    tokens, num_experts = x.shape[0], experts.num_experts
    index = torch.arange(num_experts).expand(tokens, -1).contiguous()
    weights = torch.full((tokens, num_experts), 1 / num_experts)
    return forward(experts, x, index, weights)


def by_our_kernels(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return ops.experts(x, experts.gate_up_proj, experts.down_proj, index, weights, "silu")


def by_eager(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    eager: Tensor = type(experts).forward.__wrapped__(experts, x, index, weights.to(x.dtype))
    return eager


def exact_row(dtype_name: str, tokens: int, hidden: int, intermediate: int, rounds: int) -> dict[str, Any]:
    dtype, num_experts, top_k, keep = DTYPES[dtype_name], 8, 2, 4
    model = one_layer_model(hidden, intermediate, num_experts, top_k, dtype)
    batches = token_batches(tokens, batch=tokens)
    inputs = router_inputs(model, batches)
    block = model.model.layers[0].mlp
    subsets = all_subsets(num_experts, [keep])

    start = time.perf_counter()
    expected = brute_force(block, inputs, subsets, top_k)
    brute = time.perf_counter() - start
    result = moe_ext.search(model, batches, keep=keep, progress=False)
    apart = float(((result.losses[0].losses - expected).abs() / expected).max())

    (x, logits), depth = inputs[0], top_k + num_experts - keep
    parts = list(ranked(block.experts, x, logits, depth))

    def enumerate_subsets() -> None:
        errors = LayerErrors(subsets, top_k, None, store=False)
        errors.add_batch(iter(parts))

    times: dict[str, list[float]] = {name: [] for name in ("dense", "search", "gram", "enumeration")}
    for _ in range(rounds):  # interleaved: the machine is not always as fast
        times["dense"].append(seconds(lambda: all_experts(block.experts, x, by_our_kernels), 1))
        times["search"].append(seconds(lambda: moe_ext.search(model, batches, keep=keep, progress=False), 1))
        times["gram"].append(seconds(lambda: list(ranked(block.experts, x, logits, depth)), 1))
        times["enumeration"].append(seconds(enumerate_subsets, 5))
    medians = {name: statistics.median(values) for name, values in times.items()}
    eager = seconds(lambda: all_experts(block.experts, x, by_eager), rounds)
    return {
        "H, I, E, K": f"{hidden}, {intermediate}, {num_experts}, {top_k}",
        "keep": keep,
        "subsets": len(subsets),
        "dtype": dtype_name,
        "T": tokens,
        "brute force s": brute,
        "enumeration s": medians["enumeration"],
        "brute force / enumeration": brute / medians["enumeration"],
        "search s": medians["search"],
        "Gram matrices s": medians["gram"],
        "dense forward s": medians["dense"],
        "search / dense": medians["search"] / medians["dense"],
        "eager dense s": eager,
        "search / eager dense": medians["search"] / eager,
        "brute force / search": brute / medians["search"],
        "largest difference of a loss": apart,
        "same subset": result.plan.keep[0] == tuple(subsets[expected.argmin()].nonzero().flatten().tolist()),
    }


def fisher_row(dtype_name: str, tokens: int, hidden: int, intermediate: int, rounds: int) -> dict[str, Any]:
    dtype, num_experts, top_k, keep = DTYPES[dtype_name], 8, 2, 4
    model = one_layer_model(hidden, intermediate, num_experts, top_k, dtype)
    batches = token_batches(tokens, batch=512)
    inputs = router_inputs(model, batches)
    experts = model.model.layers[0].mlp.experts

    def whole_model() -> None:
        for batch in batches:
            with torch.enable_grad():
                model(**batch, labels=batch["input_ids"]).loss.backward()
            model.zero_grad()

    def projections() -> None:
        for x, _ in inputs:
            ops.expert_projection(x, experts.gate_up_proj, experts.down_proj, x, "silu")

    timed: dict[str, Callable[[], Any]] = {
        "fisher search s": lambda: moe_ext.search(model, batches, keep=keep, loss="fisher", progress=False),
        "search s": lambda: moe_ext.search(model, batches, keep=keep, budget="model", progress=False),
        "projections s": projections,
        "dense forward s": lambda: [all_experts(experts, x, by_our_kernels) for x, _ in inputs],
        "autograd s": whole_model,
    }
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):  # interleaved: the machine is not always as fast
        for name, function in timed.items():
            times[name].append(seconds(function, 1))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "H, I, E, K": f"{hidden}, {intermediate}, {num_experts}, {top_k}",
        "dtype": dtype_name,
        "T": tokens,
        **medians,
        "projections / dense": medians["projections s"] / medians["dense forward s"],
        "fisher / autograd": medians["fisher search s"] / medians["autograd s"],
    }


def greedy_row(tokens: int) -> dict[str, Any]:
    hidden, intermediate, num_experts, top_k, keep = 512, 256, 64, 8, 48
    model = one_layer_model(hidden, intermediate, num_experts, top_k, torch.float32)
    batches = token_batches(tokens, batch=4096)
    start = time.perf_counter()
    result = moe_ext.search(model, batches, keep=keep, method="greedy", progress=False)
    took = time.perf_counter() - start
    evaluated = result.losses[0]
    first = evaluated.losses[evaluated.keep.sum(1) == keep][: keep + 1].min()  # before the swaps
    return {
        "H, I, E, K": f"{hidden}, {intermediate}, {num_experts}, {top_k}",
        "keep": keep,
        "dtype": "float32",
        "T": tokens,
        "search s": took,
        "subsets evaluated": len(evaluated.losses),
        "loss": result.layer_losses()[0],
        "loss before swaps / after": float(first) / result.layer_losses()[0],
    }


def memory_of(method: str, tokens: int) -> dict[str, Any]:
    """Run in a process of its own."""
    num_experts, top_k, keep = (8, 2, 4) if method == "layerwise" else (32, 4, 24)
    model = one_layer_model(128, 32, num_experts, top_k, torch.float32, layers=2)
    batches = token_batches(tokens, batch=4096)
    # What torch sets up on the first call is not the search's: a few batches first, dropping to one size only.
    moe_ext.search(model, batches[:2], keep=keep, method=method, progress=False)  # type: ignore[arg-type]
    before = peak_resident_bytes()
    start = time.perf_counter()
    moe_ext.search(model, batches, keep=keep, method=method, progress=False)  # type: ignore[arg-type]
    took = time.perf_counter() - start
    after = peak_resident_bytes()
    assert before is not None
    assert after is not None
    return {
        "method": method,
        "H, I, E, K": f"128, 32, {num_experts}, {top_k}",
        "keep": keep,
        "layers": 2,
        "T": tokens,
        "search s": took,
        "peak rises by MiB": (after - before) / 2**20,
    }


def memory_row(method: str, tokens: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory-of", method, "--memory-tokens", str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(result.stderr)
    row: dict[str, Any] = json.loads(result.stdout)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of the exact search")
    parser.add_argument("--shape", default="1024,3584", help="H,I of the exact search")
    parser.add_argument("--greedy-tokens", type=int, default=8192)
    parser.add_argument("--memory-tokens", type=int, default=MEMORY_TOKENS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=["exact", "fisher", "greedy", "memory"])
    parser.add_argument("--memory-of", choices=["layerwise", "greedy"], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    hidden, intermediate = map(int, options.shape.split(","))
    tables: dict[str, list[dict[str, Any]]] = {}
    with torch.no_grad():
        if options.memory_of:
            print(json.dumps(memory_of(options.memory_of, options.memory_tokens)))
            return
        wanted = options.only or ["exact", "fisher", "greedy", "memory"]
        for question, row_of in (("exact", exact_row), ("fisher", fisher_row)):
            if question not in wanted:
                continue
            for name in options.dtype or ["float32", "bfloat16"]:
                row = row_of(name, options.tokens, hidden, intermediate, options.rounds)
                tables[f"{question}, {name}"] = [row]
        if "greedy" in wanted:
            tables["greedy"] = [greedy_row(options.greedy_tokens)]
        if "memory" in wanted:
            tables["memory"] = [memory_row(method, options.memory_tokens) for method in ("layerwise", "greedy")]
    for name, rows in tables.items():
        print(f"\n## {name}\n{table(rows)}", flush=True)
    if options.output is not None:
        if options.output.exists():
            tables = {**json.loads(options.output.read_text())["tables"], **tables}
        write_result(
            options.output,
            "medians of interleaved rounds in one process, but the brute force and the greedy search once",
            machine=f"{processor()}, {torch.get_num_threads()} threads",
            variant=_C.active_cpu_variant(),
            tables=tables,
        )


if __name__ == "__main__":
    main()
