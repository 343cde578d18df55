"""Measures one layer's operators beside their peers and the machine's limit: what ``moe-ext bench`` runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moe_ext.bench import cpu, gpu
from moe_ext.bench.layer import Layer
from moe_ext.bench.weights import QuantisedWeights, WeightType, with_activations
from moe_ext.binary import _C
from moe_ext.checkpoints.read_config import model_built_from, read_config
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.boundary import output_width
from moe_ext.models.expert_width import width_of
from moe_ext.storage.machine import processor

CACHE_BYTES = 256 << 20  # read before every call, so that no cache holds the weights
MATMUL = 4096  # the square product that measures a GPU's rate
GPU_ROUNDS_A_SECOND = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer's experts: H, I, E and K."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``"H,I,E,K"``.

        Raises:
            ValueError: not four numbers of 1 or more, or K beyond E.
        """
        try:
            shape = cls(*(int(part) for part in text.split(",")))
        except (TypeError, ValueError):
            raise ValueError(f"shape {text!r}: expected H,I,E,K, such as 4096,14336,8,2") from None
        if min(shape.hidden, shape.intermediate, shape.num_experts, shape.top_k) < 1 or shape.top_k > shape.num_experts:
            raise ValueError(f"shape {text!r}: expected numbers of 1 or more, and at most E experts a token")
        return shape

    @classmethod
    def of_model(cls, checkpoint: str | Path, *, trust_remote_code: bool = False) -> Shape:
        """The experts of a model's first MoE layer. Only its ``config.json`` is read; no weights exist.

        Args:
            trust_remote_code: as for :func:`moe_ext.from_pretrained`.

        Raises:
            OSError: no such model.
            ValueError, TypeError: it has no MoE layer, or experts that are not of the form which the operators run.
        """
        config = read_config(checkpoint, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            block = moe_blocks(model_built_from(config, trust_remote_code=trust_remote_code))[0]
        down = dict(block.experts.named_parameters()).get("down_proj")
        if down is None or down.ndim != 3 or not getattr(block.experts, "has_gate", True):
            raise ValueError(f"{checkpoint}: the experts of {block.name} are not of the form that the operators run")
        return cls(output_width(block.experts), width_of(block), block.num_experts, block.top_k)


@dataclass(frozen=True)
class Measured:
    """One row: a number of tokens.

    Attributes:
        tokens: T.
        ours: milliseconds of the ``experts`` operator; on CUDA as a graph, without what Python and launches cost.
        peers: milliseconds of transformers' experts implementations that ran.
        limit: milliseconds that the machine needs at least: reading the active experts' weights at the bandwidth
            measured in the same run, or multiplying at the rate measured in it, whichever takes longer.
        record: all that was measured, as the scripts in benchmarks/ write it.
    """

    tokens: int
    ours: float
    peers: dict[str, float]
    limit: float
    record: dict[str, Any]


def measurements(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    tokens: Sequence[int],
    seconds: float,
    weights: WeightType | None = None,
    activations: Literal["int8"] | None = None,
) -> Iterator[Measured]:
    """Measures the operators with random weights and inputs, checking them against transformers' eager experts.

    Args:
        seconds: for each number of tokens, about.
        weights: quantised to this type; the peers are then the same operator on weights of ``dtype`` and transformers'
            fastest implementation. None: weights of ``dtype``.
        activations: "int8": in 8 bits, with quantised weights of whole numbers, on the CPU.

    Raises:
        ValueError: another device than "cpu" and "cuda", or CUDA without a device or without kernels; ``activations``
            with other weights than int8, int4 and mxfp4, or on CUDA.
        AssertionError: an operator disagrees with transformers.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and not (torch.cuda.is_available() and _C.cuda_archs):
        raise ValueError("device: cuda needs a CUDA device and a build of moe_ext with CUDA kernels")
    if activations is not None and (weights in (None, "fp8") or device != "cpu"):
        raise ValueError("activations: int8 is for int8, int4 and mxfp4 weights, on the CPU")
    with torch.no_grad():
        layer = Layer(shape.hidden, shape.intermediate, shape.num_experts, shape.top_k, dtype, device)
        quantised = [] if weights is None else [QuantisedWeights(layer, weights)]
        for each in quantised:
            each.check(layer)
        if device == "cpu":
            name = None if weights is None else weights if activations is None else with_activations(weights)
            yield from _on_cpu(layer, quantised, tokens, seconds, name)
        else:
            yield from _on_cuda(layer, quantised, tokens, seconds)


def _on_cpu(
    layer: Layer, quantised: Sequence[QuantisedWeights], tokens: Sequence[int], seconds: float, name: str | None
) -> Iterator[Measured]:
    rounds = cpu.Rounds(seconds, CACHE_BYTES)
    for count in tokens:
        if quantised:
            row = next(row for row in cpu.measure_quantised(layer, quantised, count, rounds) if row["weights"] == name)
            own = str(layer.dtype).removeprefix("torch.")
            yield Measured(
                count, row["ms"], {own: row[f"{own} ms"], "transformers": row["peer ms"]}, row["limit ms"], row
            )
        else:
            row = cpu.measure(layer, count, rounds)
            peers = {name: row[f"{name} ms"] for name in cpu.PEERS}
            yield Measured(count, row["experts ms"], _ran(peers), row["limit ms"], row)


def _on_cuda(
    layer: Layer, quantised: Sequence[QuantisedWeights], tokens: Sequence[int], seconds: float
) -> Iterator[Measured]:
    timer = gpu.Timer(max(5, round(seconds * GPU_ROUNDS_A_SECOND)), CACHE_BYTES)
    limits = gpu.measured_limits(timer, MATMUL, layer.dtype)
    for count in tokens:
        if quantised:
            row = gpu.measure_quantised(layer, quantised, count, timer, limits)[1]
            own = str(layer.dtype).removeprefix("torch.")
            peers = {own: row[f"{own} us"] / 1e3, "transformers": row["peer us"] / 1e3}
            yield Measured(count, row["us"] / 1e3, peers, row["roofline us"] / 1e3, row)
        else:
            row, _ = gpu.measure(layer, count, timer, limits)
            peers = {name: row[f"{name} us"] / 1e3 for name in gpu.PEERS}
            yield Measured(count, row["experts graph us"] / 1e3, _ran(peers), row["roofline us"] / 1e3, row)


def _ran(peers: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in peers.items() if value == value}


def machine(device: str) -> dict[str, Any]:
    """What the numbers hold for."""
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "cuda_archs": _C.cuda_archs}
    return {"device": processor(), "threads": torch.get_num_threads(), "variant": _C.active_cpu_variant()}
