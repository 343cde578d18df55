"""What an experts module computes between its projections, found by numbers: its own gate is evaluated on a grid of
values, the parameters of a known formula are read off the results, and the formula has to give the same on random rows.
Names in configs and attributes decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from moe_ext import ops
from moe_ext.models.boundary import eager_forward, is_transposed, num_experts
from moe_ext.models.direct_experts import direct_experts, passed_on
from moe_ext.models.packed_experts import (
    WeightFormat,
    dequantised,
    packed_format,
    packed_shape,
    unpacked_matrix,
    weight_names,
)
from moe_ext.models.sliced_router import twin_of

ROWS, WIDTH = 64, 16
"""Random rows, and channels of each, on which a formula has to agree with a module's own gate."""

TOLERANCE = 1e-5
"""Of the largest result of a row: some families compute in float32 whatever they are given."""

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class Formula:
    """What the operators on a layer's weights are told of it; see :class:`moe_ext.ops.LayerOptions`."""

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    up_offset: float = 0.0
    gate_cap: float | None = None
    up_cap: float | None = None

    def __post_init__(self) -> None:
        plain = {each.name: each.default for each in fields(self) if each.name != "activation"}
        changed = {name: getattr(self, name) for name in plain if getattr(self, name) != plain[name]}
        object.__setattr__(self, "_options", changed)  # once: a call of an operator takes microseconds

    def options(self) -> ops.LayerOptions:
        """Those that are not what the operators take them for when they are left out."""
        return cast(ops.LayerOptions, dict(self._options))  # type: ignore[attr-defined]

    def between(self, products: Tensor) -> Tensor:
        """h (R, I) of what the first projection gives, biases added: (R, 2I), or (R, I) without gate."""
        if not self.gated:
            return self._activated(products)
        if self.interleaved:
            gate, up = products[..., ::2], products[..., 1::2]
        else:
            gate, up = products.chunk(2, dim=-1)
        limit = math.inf if self.limit is None else self.limit
        a = self._activated(gate if self.limit_after else gate.clamp(max=limit))
        a = a.clamp(max=limit) if self.limit_after else a
        return a * (_capped(up.clamp(-limit, limit), self.up_cap) + self.up_offset)

    def _activated(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return _capped(x, self.gate_cap) * torch.sigmoid(self.alpha * x)
        return _FUNCTIONS[self.activation](x)

    def described(self) -> str:
        """For people: the activation, and what else is not the usual."""
        return ", ".join([self.activation, *(f"{key}={value}" for key, value in self.options().items())])


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


FORMULA = "_moe_ext_formula"
"""Attribute of an experts module: its :class:`Formula`, once that was found; of a patched model's as long as it is."""


def formula_of(experts: nn.Module) -> Formula:
    """The formula of an experts module, looked for once and kept on it.

    Raises:
        ValueError: its numbers are those of no known formula, or it cannot be evaluated.
    """
    found: Formula | None = getattr(experts, FORMULA, None)
    if found is None and torch.compiler.is_compiling():  # torch.compile cannot look at numbers
        return _named_formula(experts)
    if found is None:
        found = find_formula(experts)
        setattr(experts, FORMULA, found)
    return found


# transformers' names (config.hidden_act) of activations.
_NAMED = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _named_formula(experts: nn.Module) -> Formula:
    """That of an experts module whose class and config leave no doubt; ValueError for another."""
    name = getattr(getattr(experts, "config", None), "hidden_act", None)
    plain = getattr(experts, "has_gate", True) and getattr(experts, "is_concatenated", True)
    own = getattr(type(experts), "_apply_gate", None) is not _default_apply_gate
    if not plain or own or name not in _NAMED or type(ACT2FN[name]) is not type(experts.act_fn):
        raise ValueError(
            f"{type(experts).__name__}: what it computes is found by its numbers, which torch.compile hides; call "
            "moe_ext.patch(model) before torch.compile, or run the model once"
        )
    return Formula(_NAMED[name], transposed=is_transposed(experts))


def find_formula(experts: nn.Module) -> Formula:
    """As :func:`formula_of`, looked for again and kept nowhere."""
    layout = Formula(gated=bool(getattr(experts, "has_gate", True)), transposed=is_transposed(experts))
    gate: Callable[[Tensor], Tensor]
    if direct_experts(experts) is not None:
        gate = _gate_of_forward(experts, layout)
    else:
        gate = cast(Any, experts._apply_gate if layout.gated else experts.act_fn)

    def own(products: Tensor) -> Tensor:
        with torch.no_grad():
            return gate(products).double()

    generator = torch.Generator().manual_seed(0)
    width = 2 * WIDTH if layout.gated else WIDTH
    rows = torch.randn(ROWS, width, generator=generator, dtype=torch.float64, device="cpu")
    rows = rows * torch.logspace(-2, 2, ROWS, dtype=torch.float64, device="cpu")[:, None]
    try:
        expected = own(rows)
        candidates = list(_candidates(layout, own))
    except Exception as error:  # a family's code may do anything
        raise ValueError(
            f"{type(experts).__name__}: its gating function cannot be evaluated on rows of numbers "
            f"({type(error).__name__}: {error})"
        ) from error
    scale = expected.abs().amax(dim=-1, keepdim=True)
    turned = [replace(candidate, interleaved=True) for candidate in candidates] if layout.gated else []
    for candidate in (*candidates, *turned):
        got = candidate.between(rows)
        if got.shape == expected.shape and bool(((got - expected).abs() <= TOLERANCE * scale).all()):
            return candidate
    name = getattr(getattr(experts, "act_fn", None), "__name__", type(getattr(experts, "act_fn", None)).__name__)
    raise ValueError(
        f"{type(experts).__name__}: its gating function (activation {name}) gives the numbers of no formula that "
        f"moe_ext computes; known are {', '.join(ops.ACTIVATIONS)}, limited, capped, scaled or without gate"
    )


def _gate_of_forward(experts: nn.Module, layout: Formula) -> Callable[[Tensor], Tensor]:
    """What a module that has no function for it computes between its projections: its own forward on rows (R, 2I),
    with projections that pass them on."""
    twin, count = twin_of(experts), num_experts(experts)

    def gate(products: Tensor) -> Tensor:
        rows, width = products.shape
        first = torch.eye(width, dtype=products.dtype, device=products.device)
        weights = {"gate_up_proj": (first, count + passed_on(experts)), "down_proj": (first[:, : width // 2], count)}
        for name, (matrix, stacked) in weights.items():
            twin._parameters[name] = (matrix.T if layout.transposed else matrix).expand(stacked, -1, -1)
        one = torch.zeros(rows, 1, dtype=torch.int64, device=products.device)
        output: Tensor = eager_forward(twin)(twin, products, one, torch.ones_like(one).to(products))
        return output[:, : width // 2]

    return gate


def _candidates(layout: Formula, own: Callable[[Tensor], Tensor]) -> Iterator[Formula]:
    """Formulas to try, with the parameters that a few of the module's numbers give away."""

    def h(gate: float, up: float) -> float:
        pair = torch.tensor([[gate, up]] if layout.gated else [[up]], dtype=torch.float64, device="cpu")
        return float(own(pair)[0, 0])

    if not layout.gated:
        yield from (replace(layout, activation=name) for name in ops.ACTIVATIONS)
        alpha = _logit(h(0.0, 0.25) / 0.25) / 0.25
        yield from (replace(layout, alpha=value) for value in _snapped(alpha))
        return

    def act(gate: float) -> float:
        return (h(gate, 0.01) - h(gate, -0.01)) / 0.02

    slope = act(1.0)
    if slope == 0.0:
        return
    offset = next(iter(_snapped(h(1.0, 0.0) / slope)))
    highest = h(1.0, 1e4) / slope - offset  # of up, if it is bounded
    gate_highest = act(1e4)
    limits: list[float | None] = [None]
    caps: list[tuple[float | None, float | None]] = [(None, None)]
    if 0.0 < highest < 5e3:
        limits += _snapped(highest)
        caps += product((None, *_snapped(gate_highest)), _snapped(highest))
    elif 0.0 < gate_highest < 5e3:
        caps += [(value, None) for value in _snapped(gate_highest)]
    for name, limit, after in product(ops.ACTIVATIONS, limits, (False, True)):
        if limit is not None or not after:
            yield replace(layout, activation=name, limit=limit, limit_after=after, up_offset=offset)
    for gate_cap, up_cap in caps[1:]:
        yield replace(layout, gate_cap=gate_cap, up_cap=up_cap, up_offset=offset)
    alpha = _logit(act(0.25) / 0.25) / 0.25
    for limit, after, value in product(limits, (False, True), _snapped(alpha)):
        if limit is not None or not after:
            yield replace(layout, limit=limit, limit_after=after, alpha=value, up_offset=offset)


def _logit(share: float) -> float:
    return math.log(share / (1.0 - share)) if 0.0 < share < 1.0 else 1.0


def _snapped(value: float) -> list[float]:
    """A number that was read off results, as people write it, and as it is."""
    if not math.isfinite(value):
        return []
    if abs(value) < 1e-6:
        return [0.0]
    return list(dict.fromkeys((float(f"{value:.4g}"), float(f"{value:.6g}"), value)))


@dataclass(slots=True)
class ExpertsLayer:
    """An experts module as the operators take it; tensors are the module's own.

    Attributes:
        gate_up: (E, 2I, H), or as the formula says; of quantised weights the packed ones.
        down: (E, H, I), or as the formula says; of quantised weights the packed ones.
        gate_up_bias: (E, 2I) or None.
        down_bias: (E, H) or None.
        packed: the experts module, if its weights are quantised.
    """

    formula: Formula
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    packed: nn.Module | None = None

    @property
    def activation(self) -> str:
        return self.formula.activation

    def options(self) -> ops.LayerOptions:
        """What the operators take by keyword."""
        options = self.formula.options()
        if self.gate_up_bias is not None:
            options["gate_up_bias"] = self.gate_up_bias
        if self.down_bias is not None:
            options["down_bias"] = self.down_bias
        if self.packed is not None:
            options.update(_packed_options(self.packed))
        return options

    def taken(self, x: Tensor) -> Tensor:
        """Inputs in a type that the operators take with these weights: under autocast the two differ; transformers'
        grouped_mm casts alike."""
        return x if self.packed is not None else x.to(self.gate_up.dtype)

    def rows(self, expert: int) -> Tensor:
        """An expert's rows of ``gate_up``, (2I, H) or (I, H): a view; of quantised weights what they stand for."""
        if self.packed is not None:
            return _dequantised(self.packed, weight_names(self.packed)[0], expert)
        return self.gate_up[expert].T if self.formula.transposed else self.gate_up[expert]

    def up(self, expert: int) -> Tensor:
        """An expert's up projection (I, H), or its only one, as :meth:`rows`."""
        rows = self.rows(expert)
        if not self.formula.gated:
            return rows
        return rows[1::2] if self.formula.interleaved else rows[len(rows) // 2 :]

    def outputs(self, expert: int) -> Tensor:
        """An expert's down projection (H, I), as :meth:`rows`."""
        if self.packed is not None:
            return _dequantised(self.packed, "down_proj", expert)
        return self.down[expert].T if self.formula.transposed else self.down[expert]

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        """h of an expert for x (R, H): (R, I) float32; the products are in the weights' dtype."""
        rows = self.rows(expert)
        products = F.linear(x.to(rows.dtype), rows).float()
        if self.gate_up_bias is not None:
            products = products + self.gate_up_bias[expert].float()
        return self.formula.between(products)


def experts_layer(experts: nn.Module, formula: Formula | None = None) -> ExpertsLayer:
    """An experts module with its formula, which is looked for if it is not given.

    Raises:
        ValueError: as :func:`formula_of`.
    """
    formula = formula_of(experts) if formula is None else formula
    first = "gate_up_proj" if formula.gated else "up_proj"
    gate_up = cast(Tensor, getattr(experts, first))
    if passed_on(experts):
        gate_up = gate_up[: num_experts(experts)]
    layer = ExpertsLayer(formula, gate_up, cast(Tensor, experts.down_proj))
    if getattr(experts, "has_bias", False):
        layer.gate_up_bias = getattr(experts, f"{first}_bias")
        layer.down_bias = experts.down_proj_bias  # type: ignore[assignment]
    if packed_format(experts) is not None:
        layer.packed = experts
    return layer


def _packed_options(experts: nn.Module) -> ops.LayerOptions:
    form = cast(WeightFormat, packed_format(experts))
    first, down = weight_names(experts)
    options: ops.LayerOptions = {
        "weight_type": form.type,
        "group_size": form.group_size,
        "gate_up_scales": cast(Tensor, getattr(experts, f"{first}_scales")),
        "down_scales": cast(Tensor, getattr(experts, f"{down}_scales")),
    }
    if not form.symmetric:
        options["gate_up_zeros"] = cast(Tensor, getattr(experts, f"{first}_zeros"))
        options["down_zeros"] = cast(Tensor, getattr(experts, f"{down}_zeros"))
    return options


def _dequantised(experts: nn.Module, name: str, expert: int) -> Tensor:
    """An expert's weight (R, C), float32."""
    form, (_, columns) = cast(WeightFormat, packed_format(experts)), packed_shape(experts, name)
    return dequantised(unpacked_matrix(experts, name, expert), form, columns)
