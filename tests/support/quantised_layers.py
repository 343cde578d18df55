"""Layers with quantised weights, and the same with float64 weights, from the definitions of the formats alone."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_ext import ops
from tests.support.reference import FLOAT32, ROUNDING, WGMMA, Arithmetic, ExpertsCase, arithmetic_of, experts_case


@dataclass(frozen=True)
class Format:
    weight_type: str
    group_size: int = 0
    scales: torch.dtype = torch.float32
    zeros: bool = False


FORMATS = {
    "int8": Format("int8"),
    "int4-32": Format("int4", 32),
    "int4-64-bf16": Format("int4", 64, torch.bfloat16),
    "int4-128-fp16-zeros": Format("int4", 128, torch.float16, zeros=True),
    "int4-64-zeros": Format("int4", 64, zeros=True),
    "int4-32-bf16-zeros": Format("int4", 32, torch.bfloat16, zeros=True),
    "fp8": Format("fp8"),
    "fp8-blocks": Format("fp8", 128),
    "mxfp4": Format("mxfp4", 32, torch.uint8),
}
VALUE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8, "mxfp4": torch.uint8}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
LARGEST = {"int8": 127.0, "int4": 8.0, "fp8": 448.0, "mxfp4": 6.0}


def random_values(weight_type: str, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Values (E, R, C) in the form that pack_weights takes, every code that is a number among them. In the last byte of
    an odd row the half without a column holds anything."""
    num_experts, rows, columns = shape
    pairs = weight_type in ("int4", "mxfp4")
    shape = num_experts, rows, (columns + 1) // 2 if pairs else columns
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if weight_type == "fp8":  # 0x7f and 0xff are no numbers; 256 codes that are even in magnitude would rarely be small
        codes = codes.masked_fill((codes & 0x7F) == 0x7F, 0x7E)
    return codes.view(VALUE_DTYPES[weight_type])


def numbers_of(weight_type: str, values: Tensor, columns: int) -> Tensor:
    """(E, R, C) float64: what values stand for before zeros and scales."""
    if weight_type in ("int8", "fp8"):
        return values.double()
    nibbles = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)[..., :columns]
    return E2M1.double()[nibbles.long()] if weight_type == "mxfp4" else nibbles.double()


def dequantised(form: Format, values: Tensor, scales: Tensor, zeros: Tensor | None, columns: int) -> Tensor:
    """(E, R, C) float64 weights, element by element as the documentation of ops.LayerOptions says."""
    numbers = numbers_of(form.weight_type, values, columns)
    row, column = torch.arange(numbers.shape[1])[:, None], torch.arange(columns)[None, :]
    if form.weight_type == "int4":
        numbers = numbers - (8.0 if zeros is None else zeros[:, row, column // form.group_size].double())
    if form.weight_type == "mxfp4":
        of_group = torch.exp2(scales.double() - 127).masked_fill(scales == 255, torch.nan)
        return numbers * of_group[:, row, column // 32]
    if form.group_size == 0:
        return numbers * scales[:, :, None].double()
    if form.weight_type == "fp8":
        return numbers * scales[:, row // 128, column // 128].double()
    return numbers * scales[:, row, column // form.group_size].double()


@dataclass
class QuantisedCase:
    """``packed``: what the operators are given; ``plain``: the same layer with float64 weights, for the references."""

    packed: ExpertsCase
    plain: ExpertsCase

    def tokens(self, rows: slice | Tensor) -> "QuantisedCase":
        return QuantisedCase(self.packed.tokens(rows), self.plain.tokens(rows))

    def arithmetic(self, device: str = "cpu", kernels: str = "") -> Arithmetic:
        """That of the plain layer, but that a weight, or a sum of a group's products, is rounded once more when it is
        multiplied by its scale: on the CPU and by CUDA's wgmma to bfloat16 where dot products are of bfloat16 and the
        scale is a group's, which mxfp4's powers of two leave exact. The latter multiplies by a sum of two bfloat16,
        whose lower part, and the product by it, are rounded too."""
        plain, options = arithmetic_of(self.plain, device, kernels), self.packed.options
        wgmma = device == "cuda" and WGMMA and kernels in ("", "hopper")
        of_bfloat16 = (device == "cpu" or wgmma) and plain.h == torch.bfloat16
        narrow = of_bfloat16 and options["group_size"] > 0 and options["weight_type"] != "mxfp4"
        rounding = ROUNDING[torch.bfloat16] + (3 * ROUNDING[torch.bfloat16] ** 2 if wgmma else 0.0)
        return replace(plain, product=plain.product + (rounding if narrow else FLOAT32))


def quantised_weight(
    form: Format, shape: tuple[int, int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Values as pack_weights takes them, scales, zeros and the float64 weights, of the size of a usual layer's."""
    num_experts, rows, columns = shape
    values = random_values(form.weight_type, shape, generator)
    in_blocks = form.weight_type == "fp8" and form.group_size == 128
    of_scales: tuple[int, ...] = (num_experts, -(-rows // 128) if in_blocks else rows)
    if form.group_size:
        of_scales += (-(-columns // form.group_size),)
    spread = 0.5 + torch.rand(of_scales, generator=generator)
    scales = (spread / (LARGEST[form.weight_type] * math.sqrt(columns))).to(torch.float32)
    if form.weight_type == "mxfp4":
        scales = (127 + scales.log2().floor()).to(torch.uint8)
    scales = scales.to(form.scales)
    zeros = torch.randint(0, 16, of_scales, generator=generator, dtype=torch.uint8) if form.zeros else None
    return values, scales, zeros, dequantised(form, values, scales, zeros, columns)


def quantised_case(
    form: Format,
    tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    *,
    seed: int = 0,
    **more: Any,
) -> QuantisedCase:
    """:func:`experts_case` with random quantised weights."""
    plain = experts_case(tokens, num_experts, top_k, hidden, intermediate, seed=seed, **more)
    generator = torch.Generator().manual_seed(seed + 1)
    options: dict[str, Any] = {"weight_type": form.weight_type, "group_size": form.group_size}
    packed: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for name, columns in (("gate_up", hidden), ("down", intermediate)):
        shape = (*getattr(plain, name).shape[:2], columns)
        values, scales, zeros, weights[name] = quantised_weight(form, shape, generator)
        packed[name] = ops.pack_weights(values, form.weight_type)
        options[f"{name}_scales"], options[f"{name}_zeros"] = scales, zeros
    return QuantisedCase(
        replace(plain, **packed, options={**plain.options, **options}),
        replace(plain, **weights),
    )
