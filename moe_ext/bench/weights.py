"""Quantised weights for the benchmarks: random ones of a layer's sizes, packed, beside what they stand for."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_ext import ops
from moe_ext.bench.layer import TOLERANCE, Layer

WeightType = Literal["int8", "int4", "fp8", "mxfp4"]
WEIGHT_TYPES: tuple[WeightType, ...] = get_args(WeightType)
INT4_GROUP = 128  # as most checkpoints have it, with bfloat16 scales
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EIGHT_BITS = 0.03  # of the largest output: what activations in 8 bits may do to any
ROOT_MEAN_SQUARE = {"int8": 74.0, "int4": 4.6, "fp8": 157.0, "mxfp4": 2.9}  # of evenly distributed numbers


class QuantisedWeights:
    """The experts of a layer of the same sizes, in one weight type: evenly distributed numbers, drawn once for all
    experts, and one scale a matrix."""

    def __init__(self, layer: Layer, weight_type: WeightType) -> None:
        self.weight_type = weight_type
        self.group_size = {"int4": INT4_GROUP, "mxfp4": 32}.get(weight_type, 0)
        generator = torch.Generator(layer.device).manual_seed(0)
        self.packed: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        for name, plain in (("gate_up", layer.module.gate_up_proj), ("down", layer.module.down_proj)):
            experts, rows, columns = plain.shape
            self.packed[name] = self._random(1, rows, columns, generator).repeat(experts, 1, 1)
            scale = torch.tensor(1 / (ROOT_MEAN_SQUARE[weight_type] * columns**0.5))
            size = (experts, rows, -(-columns // self.group_size)) if self.group_size else (experts, rows)
            if weight_type == "mxfp4":
                stored = (127 + scale.log2().round()).to(torch.uint8)
            else:
                stored = scale.to(torch.bfloat16 if weight_type == "int4" else torch.float32)
            self.scales[name] = stored.to(layer.device).expand(size).contiguous()

    def _random(self, experts: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        width = columns if self.weight_type in ("int8", "fp8") else -(-columns // 2)
        shape = (experts, rows, width)
        values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=generator.device)
        if self.weight_type == "fp8":
            values[(values & 0x7F) == 0x7F] = 0  # NaN
        stored = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(self.weight_type, torch.uint8)
        return ops.pack_weights(values.view(stored), self.weight_type)

    @property
    def expert_bytes(self) -> int:
        """Of an expert's weights and scales."""
        return sum(
            tensor[0].numel() * tensor.element_size() for tensor in [*self.packed.values(), *self.scales.values()]
        )

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole ones, which activations in 8 bits can be multiplied by."""
        return self.weight_type != "fp8"

    def experts(
        self, x: Tensor, experts: Tensor, weights: Tensor, activations: Literal["int8"] | None = None
    ) -> Callable[[], Tensor]:
        """The experts operator on these inputs."""
        return lambda: ops.experts(
            x,
            self.packed["gate_up"],
            self.packed["down"],
            experts,
            weights,
            "silu",
            weight_type=self.weight_type,
            group_size=self.group_size,
            gate_up_scales=self.scales["gate_up"],
            down_scales=self.scales["down"],
            activation_type=activations,
        )

    def plain(self, name: str, expert: int, columns: int) -> Tensor:
        """(R, C) float32: what an expert's weights stand for."""
        values = ops.unpack_weights(self.packed[name][expert : expert + 1], self.weight_type, columns)[0]
        scales = self.scales[name][expert]
        if self.weight_type in ("int8", "fp8"):
            return values.float() * scales[:, None]
        numbers = torch.stack([values & 15, values >> 4], dim=-1).flatten(1)[:, :columns]
        if self.weight_type == "int4":
            real, factors = numbers.float() - 8, scales.float()
        else:
            real, factors = (
                torch.tensor([*E2M1, *(-value for value in E2M1)], device=numbers.device)[numbers.int()],
                2.0 ** (scales.float() - 127),
            )
        return real * factors.repeat_interleave(self.group_size, dim=1)[:, :columns]

    def check(self, layer: Layer) -> None:
        """Raises AssertionError where the operator disagrees with the formula in float32, for tokens of one expert; on
        the CPU also with activations in 8 bits, to within what rounding them may do."""
        tokens = 3
        x = layer.inputs(tokens)[0]
        experts = torch.zeros(tokens, 1, dtype=torch.int64, device=x.device)
        ones = torch.ones(tokens, 1, device=x.device)
        gate, up = (x.float() @ self.plain("gate_up", 0, layer.hidden).T).chunk(2, dim=-1)
        expected = (torch.nn.functional.silu(gate) * up) @ self.plain("down", 0, layer.intermediate).T
        most = float(expected.abs().max())
        out = self.experts(x, experts, ones)()
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=TOLERANCE[x.dtype] * most)
        if self.whole and x.device.type == "cpu":
            out = self.experts(x, experts, ones, "int8")()
            torch.testing.assert_close(out.float(), expected, rtol=0, atol=EIGHT_BITS * most)


def with_activations(name: str) -> str:
    """What a type of weights is called where activations are in 8 bits."""
    return f"{name}, int8 activations"


def on_every_weights(
    layer: Layer, quantised: Sequence[QuantisedWeights], x: Tensor, experts: Tensor, weights: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """The experts operator on these inputs, with the layer's own weights and with each of the quantised, on the CPU
    with activations in 8 bits, too, by the name of the type; and an expert's bytes of each."""
    own = str(layer.dtype).removeprefix("torch.")
    functions = {own: lambda: ops.experts(*layer.arguments(x, weights, experts))}
    expert_bytes = {own: layer.expert_bytes}
    for each in quantised:
        name = each.weight_type
        functions[name], expert_bytes[name] = each.experts(x, experts, weights), each.expert_bytes
        if each.whole and x.device.type == "cpu":
            functions[with_activations(name)] = each.experts(x, experts, weights, "int8")
            expert_bytes[with_activations(name)] = each.expert_bytes
    return functions, expert_bytes
