"""Times one layer's CPU operators beside transformers' experts and the limits measured in the same rounds."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ext.bench.layer import GATHERED_BYTES, Layer
from moe_ext.bench.weights import QuantisedWeights, on_every_weights

PEERS = ["eager", "grouped_mm", "batched_mm"]


class Rounds:
    """Times functions in turn, in a process whose caches hold nothing of theirs."""

    def __init__(self, seconds: float, buffer_bytes: int, least: int = 5) -> None:
        """
        Args:
            least: rounds at least, however long they take.
        """
        self.seconds = seconds
        self.least = least
        self.buffer = torch.ones(buffer_bytes // 4)

    def read(self) -> float:
        """Seconds to read the buffer: by the reduction of torch that is fastest for one that no cache holds."""
        start = time.perf_counter()
        self.buffer.sum()
        return time.perf_counter() - start

    def medians(self, cold: dict[str, Callable[[], Any]], warm: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each function and of ``read``, in rounds of about ``seconds`` in all, ``least`` at least.
        Those in ``warm`` are timed right after a call of themselves."""
        times: dict[str, list[float]] = {name: [] for name in ["read", *cold, *warm]}
        for function in cold.values():
            function()  # what is set up once
        end = time.perf_counter() + self.seconds
        rounds = 0
        while rounds < self.least or time.perf_counter() < end:
            rounds += 1
            for name, function in {**cold, **warm}.items():
                times["read"].append(self.read())
                if name in warm:
                    function()
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in times.items()}


def linear(rows: int, hidden: int, intermediate: int, dtype: torch.dtype) -> Callable[[], None]:
    """torch's linear for the two products of an expert with `rows` tokens."""
    x, h = torch.randn(rows, hidden).to(dtype), torch.randn(rows, intermediate).to(dtype)
    gate_up, down = (torch.randn(*s).to(dtype) for s in ((2 * intermediate, hidden), (hidden, intermediate)))

    def both() -> None:
        torch.nn.functional.linear(x, gate_up)
        torch.nn.functional.linear(h, down)

    return both


def measure(layer: Layer, tokens: int, rounds: Rounds) -> dict[str, Any]:
    x, logits, weights, experts = layer.inputs(tokens)
    functions = layer.operators(x, logits, weights, experts)
    warm = {"route": functions.pop("route")}
    expert_bytes = layer.expert_bytes
    for name in PEERS:
        if name != "batched_mm" or experts.numel() * expert_bytes <= GATHERED_BYTES:
            functions[name] = layer.peer(name, x, experts, weights)
    active = int(experts.unique().numel())
    rows = max(1, experts.numel() // active)
    warm["linear"] = linear(rows, layer.hidden, layer.intermediate, layer.dtype)
    times = rounds.medians(functions, warm)

    bandwidth = rounds.buffer.numel() * 4 / times["read"]
    rate = 6 * rows * layer.hidden * layer.intermediate / times["linear"]
    read = active * expert_bytes / bandwidth
    multiply = 6 * layer.hidden * layer.intermediate * experts.numel() / rate
    fastest = min((name for name in PEERS if name in times), key=lambda name: times[name])
    ours = times["experts"]
    return {
        "H, I, E, K": f"{layer.hidden}, {layer.intermediate}, {layer.num_experts}, {layer.top_k}",
        "dtype": str(layer.dtype).removeprefix("torch."),
        "T": tokens,
        "active": active,
        **{f"{name} ms": times.get(name, float("nan")) * 1e3 for name in ["experts", *PEERS]},
        "fastest peer / ours": times[fastest] / ours,
        "read GB/s": bandwidth / 1e9,
        "linear GFLOP/s": rate / 1e9,
        "limit ms": max(read, multiply) * 1e3,
        "bound by": "read" if read > multiply else "linear",
        "weights read / bandwidth": read / ours,
        "FLOP/s / linear": multiply / ours,
        "of limit": max(read, multiply) / ours,
        "observed / experts": times["experts_observed"] / ours,
        "route us": times["route"] * 1e6,
    }


def fastest_peer(layer: Layer, x: Tensor, experts: Tensor, weights: Tensor) -> tuple[str, Callable[[], Tensor]]:
    """Transformers' implementation that takes least time, by a call after the first or a first one of over a second."""
    times: dict[str, float] = {}
    functions = {
        name: layer.peer(name, x, experts, weights)
        for name in PEERS
        if name != "batched_mm" or experts.numel() * layer.expert_bytes <= GATHERED_BYTES
    }
    for name, function in functions.items():
        for _ in range(2):
            start = time.perf_counter()
            function()
            times[name] = time.perf_counter() - start
            if times[name] > 1.0:
                break
    name = min(times, key=lambda name: times[name])
    return name, functions[name]


def measure_quantised(
    layer: Layer, quantised: Sequence[QuantisedWeights], tokens: int, rounds: Rounds
) -> list[dict[str, Any]]:
    """A row for the layer's own weights and one for each of the quantised, on the same inputs in the same rounds."""
    x, _, weights, experts = layer.inputs(tokens)
    own = str(layer.dtype).removeprefix("torch.")
    functions, expert_bytes = on_every_weights(layer, quantised, x, experts, weights)
    peer, functions["peer"] = fastest_peer(layer, x, experts, weights)
    active = int(experts.unique().numel())
    rows = max(1, experts.numel() // active)
    times = rounds.medians(functions, {"linear": linear(rows, layer.hidden, layer.intermediate, layer.dtype)})

    bandwidth = rounds.buffer.numel() * 4 / times["read"]
    rate = 6 * rows * layer.hidden * layer.intermediate / times["linear"]
    multiply = 6 * layer.hidden * layer.intermediate * experts.numel() / rate
    return [
        {
            "H, I, E, K": f"{layer.hidden}, {layer.intermediate}, {layer.num_experts}, {layer.top_k}",
            "T": tokens,
            "weights": name,
            "MB read": active * size / 1e6,
            "ms": times[name] * 1e3,
            "read / bandwidth": active * size / bandwidth / times[name],
            f"{own} / this": times[own] / times[name],
            "peer / this": times["peer"] / times[name],
            "peer": peer,
            f"{own} ms": times[own] * 1e3,
            "peer ms": times["peer"] * 1e3,
            "read GB/s": bandwidth / 1e9,
            "limit ms": max(active * size / bandwidth, multiply) * 1e3,
        }
        for name, size in expert_bytes.items()
    ]
