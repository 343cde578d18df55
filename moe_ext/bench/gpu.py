"""Times one layer's CUDA operators beside transformers' experts and the limits measured in the same run."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from moe_ext.bench.layer import Layer

PEERS = ["eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe"]
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
    return graph.replay


def measured_limits(timer: Timer, matmul: int, dtype: torch.dtype) -> dict[str, float]:
    """Read bandwidth over a buffer of matmul^2 * 32 bytes, and the rate of a square matrix product."""
    buffer = torch.ones(matmul * matmul * 8, dtype=torch.float32, device="cuda")
    a, b = (torch.randn(matmul, matmul, device="cuda").to(dtype) for _ in range(2))
    seconds = timer.medians({"read": lambda: buffer.sum(), "matmul": lambda: a @ b})
    return {
        "read bytes/s": buffer.numel() * 4 / seconds["read"],
        "matmul FLOP/s": 2 * matmul**3 / seconds["matmul"],
    }


def measure(layer: Layer, tokens: int, timer: Timer, limits: dict[str, float]) -> tuple[dict[str, Any], dict[str, str]]:
    """A row of the result, and the peers that did not run with the reason."""
    x, logits, weights, experts = layer.inputs(tokens)
    functions = layer.operators(x, logits, weights, experts)
    missing = {}
    for name in PEERS:
        function = layer.peer(name, x, experts, weights)
        try:
            function()
        except Exception as error:  # a peer that does not run here is named in the result, whatever its reason
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            functions[name] = function
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
