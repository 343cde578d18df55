"""Times one layer's CUDA operators beside transformers' experts and the limits measured in the same run."""

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ext.bench.layer import GATHERED_BYTES, Layer
from moe_ext.bench.weights import QuantisedWeights, on_every_weights

PEERS = ["eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe"]
PATHS = ["small_batch", "tall", "flat", "narrow", "hopper", "hopper_pairs"]  # what MOE_EXT_CUDA_KERNELS forces
MOST_IN_A_SMALL_BATCH = 64  # tokens: beyond, it takes many times as long as the others
GRAPHED = ["experts", "grouped_mm", "batched_mm"]  # also timed as CUDA graphs: without what Python and launches cost


class Timer:
    """Times functions in turn. Before each call L2 is filled by reading: written lines would cost the call time."""

    def __init__(self, rounds: int, flush_bytes: int) -> None:
        self.rounds = rounds
        self.flush = torch.zeros(max(1, flush_bytes // 4), device="cuda")

    def medians(self, functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each function."""
        times: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()  # warm up
        for _ in range(self.rounds):
            for name, function in functions.items():
                self.flush.sum()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                function()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) / 1e3)
        return {name: statistics.median(values) for name, values in times.items()}


def graphed(function: Callable[[], Any]) -> Callable[[], None]:
    """A function that replays what `function` launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # what is set up once must not be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(_kept: object = function) -> None:  # what the graph reads must stay where it is
        graph.replay()

    return replay


def measured_limits(timer: Timer, matmul: int, dtype: torch.dtype) -> dict[str, float]:
    """Read bandwidth over a buffer of matmul^2 * 32 bytes, and the rate of a square matrix product."""
    buffer = torch.ones(matmul * matmul * 8, dtype=torch.float32, device="cuda")
    a, b = (torch.randn(matmul, matmul, device="cuda").to(dtype) for _ in range(2))
    seconds = timer.medians({"read": lambda: buffer.sum(), "matmul": lambda: a @ b})
    return {
        "read bytes/s": buffer.numel() * 4 / seconds["read"],
        "matmul FLOP/s": 2 * matmul**3 / seconds["matmul"],
    }


def peers_that_run(
    layer: Layer, names: Sequence[str], x: Tensor, experts: Tensor, weights: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Those of transformers' implementations, and of the others the reason why not."""
    functions, missing = {}, {}
    for name in names:
        if name == "batched_mm" and experts.numel() * layer.expert_bytes > GATHERED_BYTES:
            missing[name] = f"would copy {experts.numel() * layer.expert_bytes / 1e9:.0f} GB of weights"
            continue
        function = layer.peer(name, x, experts, weights)
        try:
            function()
        except Exception as error:  # a peer that does not run here is named in the result, whatever its reason
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            functions[name] = function
    return functions, missing


def measure(layer: Layer, tokens: int, timer: Timer, limits: dict[str, float]) -> tuple[dict[str, Any], dict[str, str]]:
    """A row of the result, and the peers that did not run with the reason."""
    x, logits, weights, experts = layer.inputs(tokens)
    functions = layer.operators(x, logits, weights, experts)
    peers, missing = peers_that_run(layer, PEERS, x, experts, weights)
    functions |= peers
    for name in GRAPHED:
        if name in functions:
            functions[f"{name} graph"] = graphed(functions[name])
    seconds = timer.medians(functions)

    hidden, intermediate = layer.hidden, layer.intermediate
    active = int(experts.unique().numel())
    size = x.element_size()
    needed = active * 3 * hidden * intermediate * size + 2 * tokens * hidden * size
    flops = 6 * hidden * intermediate * experts.numel()
    roofline = max(needed / limits["read bytes/s"], flops / limits["matmul FLOP/s"])
    row: dict[str, Any] = {
        "H": hidden,
        "I": intermediate,
        "E": layer.num_experts,
        "K": layer.top_k,
        "T": tokens,
        "active": active,
        "roofline us": roofline * 1e6,
        "fraction": roofline / seconds["experts graph"],
    }
    columns = ["route", "experts", "experts_observed", *PEERS, *(f"{name} graph" for name in GRAPHED)]
    row |= {f"{name} us": seconds.get(name, float("nan")) * 1e6 for name in columns}
    return row, missing


def measure_quantised(
    layer: Layer, quantised: Sequence[QuantisedWeights], tokens: int, timer: Timer, limits: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for the layer's own weights and one for each of the quantised, on the same inputs in the same rounds; every
    function as a graph. The peer is transformers' faster implementation of those that a graph can hold."""
    x, _, weights, experts = layer.inputs(tokens)
    own = str(layer.dtype).removeprefix("torch.")
    functions, expert_bytes = on_every_weights(layer, quantised, x, experts, weights)
    peers, _ = peers_that_run(layer, [name for name in GRAPHED if name in PEERS], x, experts, weights)
    seconds = timer.medians({name: graphed(function) for name, function in (functions | peers).items()})
    peer = min(peers, key=lambda name: seconds[name])

    active = int(experts.unique().numel())
    multiply = 6 * layer.hidden * layer.intermediate * experts.numel() / limits["matmul FLOP/s"]
    rows = []
    for name, size in expert_bytes.items():
        read = (active * size + 2 * tokens * layer.hidden * x.element_size()) / limits["read bytes/s"]
        rows.append(
            {
                "H, I, E, K": f"{layer.hidden}, {layer.intermediate}, {layer.num_experts}, {layer.top_k}",
                "T": tokens,
                "weights": name,
                "MB read": active * size / 1e6,
                "us": seconds[name] * 1e6,
                "roofline us": max(read, multiply) * 1e6,
                "fraction": max(read, multiply) / seconds[name],
                f"{own} / this": seconds[own] / seconds[name],
                "peer / this": seconds[peer] / seconds[name],
                "peer": peer,
                f"{own} us": seconds[own] * 1e6,
                "peer us": seconds[peer] * 1e6,
            }
        )
    return rows


def measure_paths(
    layer: Layer, quantised: Sequence[QuantisedWeights], tokens: int, timer: Timer, limits: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for the layer's own weights and one for each of the quantised: the operator by every set of kernels that it
    can be made to take, as graphs, beside what it takes by itself. NaN where a set does not take the layer."""
    x, _, weights, experts = layer.inputs(tokens)
    functions, _ = on_every_weights(layer, quantised, x, experts, weights)
    forced: dict[str, Callable[[], Any]] = {}
    for name, function in functions.items():
        for path in ["", *PATHS]:
            if path == "small_batch" and tokens > MOST_IN_A_SMALL_BATCH:
                continue
            os.environ["MOE_EXT_CUDA_KERNELS"] = path
            try:
                forced[f"{name}/{path}"] = graphed(function)
            except RuntimeError:
                continue  # the kernels do not take this layer
            finally:
                del os.environ["MOE_EXT_CUDA_KERNELS"]
    seconds = timer.medians(forced)
    rows = []
    for name in functions:
        times = {path: seconds.get(f"{name}/{path}", float("nan")) for path in PATHS}
        chosen, best = (
            seconds[f"{name}/"],
            min((path for path in PATHS if times[path] > 0), key=lambda path: times[path]),
        )
        rows.append(
            {
                "H, I, E, K": f"{layer.hidden}, {layer.intermediate}, {layer.num_experts}, {layer.top_k}",
                "T": tokens,
                "weights": name,
                "us": chosen * 1e6,
                **{f"{path} us": times[path] * 1e6 for path in PATHS},
                "best": best,
                "us / best": chosen / times[best],
                "TFLOP/s": 6 * layer.hidden * layer.intermediate * experts.numel() / times[best] / 1e12,
                "of matmul": 6
                * layer.hidden
                * layer.intermediate
                * experts.numel()
                / times[best]
                / limits["matmul FLOP/s"],
            }
        )
    return rows
