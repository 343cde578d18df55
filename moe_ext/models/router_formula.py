"""How routers turn logits into routing weights: one description, which the ``route`` operator computes.

Which one a family's router has is not written down but found, by numbers: its own code runs on random rows, and of the
formulas there are the one is taken that gives the same experts and weights. Without one, or where none fits, the
family's own code routes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ext.models.blocks import MoeBlock, tensors_of
from moe_ext.models.direct_experts import direct_experts, passed_on
from moe_ext.models.sliced_router import router_twin

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]


@dataclass(frozen=True)
class RouterFormula:
    """What a router computes of a token's logits; the arguments of :func:`moe_ext.ops.route` beside them.

    Attributes:
        score: of every expert.
        renormalise: whether the chosen scores are divided by ``max(sum + epsilon, least)``.
        by_logits: whether the choice is by logits rather than scores.
        groups: contiguous groups of experts.
        groups_per_token: of these, that a token's experts come from.
        group_best: experts that rank a group.
        outside_zero: whether choices in other groups are 0 rather than minus infinity.
        epsilon, least: as above.
        scale: of all weights.
    """

    score: Score = "softmax"
    renormalise: bool = True
    by_logits: bool = False
    groups: int = 1
    groups_per_token: int = 1
    group_best: int = 1
    outside_zero: bool = False
    epsilon: float = 0.0
    least: float = 0.0
    scale: float = 1.0

    @property
    def is_selected_softmax(self) -> bool:
        """Whether it is the softmax over the K largest logits, times ``scale``; a correction bias aside."""
        return self.score == "softmax" and self.renormalise and self.groups == 1

    def scores(self, logits: Tensor) -> Tensor:
        """(T, E) scores in the dtype of the logits (T, E)."""
        if self.score == "softmax":
            return logits.softmax(-1)
        return logits.sigmoid() if self.score == "sigmoid" else F.softplus(logits).sqrt()

    def choices(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """(T, E), of which the K largest are chosen.

        Args:
            logits: (T, E).
            bias: (E,), or None.
        """
        choices = logits if self.by_logits else self.scores(logits)
        if bias is not None:
            choices = choices + bias
        if self.groups == 1:
            return choices
        members = choices.view(len(choices), self.groups, -1)
        best = members.topk(self.group_best, dim=-1).values.sum(-1)
        chosen = torch.zeros_like(best, dtype=torch.bool)
        chosen.scatter_(1, best.topk(self.groups_per_token, dim=-1).indices, True)
        outside = 0.0 if self.outside_zero else -math.inf
        return members.masked_fill(~chosen.unsqueeze(-1), outside).view_as(choices)

    def weights(self, logits: Tensor, experts: Tensor) -> Tensor:
        """(T, K) weights of chosen experts (T, K), in the dtype of the logits (T, E)."""
        chosen = self.scores(logits).gather(1, experts)
        if self.renormalise:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + self.epsilon).clamp(min=self.least)
        return chosen * self.scale

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`moe_ext.ops.route`, without thresholds and bias."""
        return dict(vars(self))


@dataclass(frozen=True)
class KnownRouter:
    """A router whose code :func:`known_router` understood.

    Attributes:
        formula: of its weights.
        weight: name of the (E, H) matrix that gives logits.
        offset: name of the (E,) vector that is added to them, or None.
        bias: name of the correction bias (E,) or (1, E), added for the choice only; None: none, or an argument.
        argument: name of a further argument of the router's forward, or None.
        corrects: whether that is a correction bias.
        wide: whether logits are computed in float32 whatever the model's dtype.
        dtype: of the logits that it returns.
        multiplier: of the logits.
        softcap: c, where logits are ``c tanh(logits / c)``; 0: none.
        flattens: whether it takes (B, S, H) and returns (B * S, ...).
    """

    formula: RouterFormula
    weight: str
    offset: str | None
    bias: str | None
    argument: str | None
    corrects: bool
    wide: bool
    dtype: torch.dtype
    multiplier: float
    softcap: float
    flattens: bool

    @property
    def is_corrected(self) -> bool:
        """Whether a bias is added to what is chosen by."""
        return self.bias is not None or self.corrects

    def runs(self, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call is one that is understood. Under autocast the router's own code decides what is wide."""
        if hidden.dim() != 2 and not self.flattens:
            return False
        if len(args) + len(kwargs) > (0 if self.argument is None else 1):
            return False
        return not torch.is_autocast_enabled(hidden.device.type)

    def logits(self, router: nn.Module, hidden: Tensor) -> Tensor:
        """(T, E) logits, as the router returns them, of hidden states (..., H)."""
        offset = None if self.offset is None else _at(router, self.offset)
        return self.logits_by(hidden.reshape(-1, hidden.shape[-1]), _at(router, self.weight), offset)

    def tensors(self, router: nn.Module) -> list[Tensor]:
        """The router's tensors that its output depends on."""
        return [_at(router, name) for name in (self.weight, self.offset, self.bias) if name is not None]

    def logits_by(self, flat: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
        """(T, E) logits of hidden states (T, H) by these tensors."""
        if self.wide:
            flat, weight = flat.float(), weight.float()
            offset = None if offset is None else offset.float()
        else:
            flat = flat.to(weight.dtype)
        logits = F.linear(flat, weight, offset).to(self.dtype)
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def correction(self, router: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """(E,) float32 correction bias of a call of the router with these arguments after the hidden states."""
        if self.bias is not None:
            return _at(router, self.bias).reshape(-1).float()
        if not self.corrects or self.argument is None:
            return None
        given = kwargs.get(self.argument, args[0] if args else None)
        return None if given is None else cast(Tensor, given).reshape(-1).float()


def _at(module: nn.Module, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    return cast(Tensor, module)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# ---- recognising


_FOUND: dict[tuple[Any, ...], KnownRouter | None] = {}

_ROWS = 96

_EPSILONS = (0.0, 1e-20, 1e-15, 1e-12, 1e-9, 1e-8, 1e-6, 1e-5)


def known_router(block: MoeBlock) -> KnownRouter | None:
    """What a layer's router computes; None if that is no formula there is here, or if the router is no plain module.

    The router's own code runs on random rows in the place of its weights, which may be on the meta device.
    """
    router, experts = block.router, next(iter(tensors_of(block.experts).values()), None)
    if experts is None or any(
        type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) for tensor in tensors_of(router).values()
    ):
        return None
    plain = (bool, int, float, str)
    fields = {**vars(getattr(router, "config", router)), **vars(router)}  # what the code may read
    dtype = experts.dtype if experts.is_floating_point() and experts.itemsize > 1 else next(router.parameters()).dtype
    key = (
        type(router),
        type(router).forward,
        tuple((name, value) for name, value in fields.items() if isinstance(value, plain) and name != "training"),
        tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(router).items()),
        (dtype, _choices(block), block.top_k),
    )
    if key not in _FOUND:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _FOUND[key] = _Probe(block, dtype).known()
    return _FOUND[key]


def _choices(block: MoeBlock) -> int:
    """What a layer's router chooses from: its experts, and what passes a token on."""
    return block.num_routed + passed_on(block.experts)


def gate_of(block: MoeBlock) -> str:
    """What the routing weight g_e is, as written into statistics files."""
    record = direct_experts(block.experts)
    if record is not None and record.weighs_inputs:
        return "1: the experts are given the hidden states times the router's weights"
    known = known_router(block)
    if known is None:
        return "weights as the family's router gives them"
    formula = known.formula
    if replace(formula, renormalise=True) == RouterFormula() and not known.is_corrected:
        return f"softmax over {'the selected' if formula.renormalise else 'all'} logits"
    return f"{formula.score} scores{', renormalised' if formula.renormalise else ''}, as the family's router gives them"


def shown_router(block: MoeBlock) -> str:
    """What runs a patched layer's router, in words."""
    known = known_router(block)
    if known is None:
        return f"its own code: the route operator has no formula that gives what {type(block.router).__name__} computes"
    formula = known.formula
    parts = [f"{formula.score} scores"]
    if known.is_corrected:
        parts.append("a correction bias")
    if formula.groups > 1:
        parts.append(f"{formula.groups_per_token} of {formula.groups} groups")
    if formula.renormalise:
        parts.append("renormalised")
    if formula.scale != 1.0:
        parts.append(f"scaled by {formula.scale:g}")
    return f"the route operator: {', '.join(parts)}"


class _Probe:
    """A router's own code on random tensors."""

    def __init__(self, block: MoeBlock, dtype: torch.dtype) -> None:
        self._block, self._dtype = block, dtype
        self._twin = router_twin(block)
        self._twin.eval()
        self._experts, self._top_k = _choices(block), block.top_k
        self._generator = torch.Generator().manual_seed(0)

    def known(self) -> KnownRouter | None:
        shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(self._block.router).items()}
        matrices = [
            name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == self._experts and shape[1] > 1
        ]
        vectors = [name for name, shape in shapes.items() if math.prod(shape) == self._experts and name not in matrices]
        if len(matrices) != 1 or len(matrices) + len(vectors) != len(shapes) or len(vectors) > 2:
            return None
        parameters = list(inspect.signature(type(self._block.router).forward).parameters.values())[2:]
        arguments = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
        if len(arguments) > 1:
            return None
        argument = arguments[0] if arguments else None
        for offset in [None, *vectors]:
            others = [name for name in vectors if name != offset]
            if len(others) + len(arguments) > 1:
                continue
            # A correction bias may be there and not be used.
            for bias, given in dict.fromkeys([(others[0] if others else None, argument), (None, None)]):
                try:
                    found = self._of(matrices[0], offset, bias, given, argument)
                except Exception:  # code that does not run on its own is not understood, and runs as it is
                    continue
                if found is not None:
                    return found
        return None

    def _of(
        self, weight: str, offset: str | None, bias: str | None, used: str | None, argument: str | None
    ) -> KnownRouter | None:
        """What the router computes if ``bias`` or the argument ``used`` corrects its choice; ``argument`` is given."""
        formulas: list[RouterFormula] | None = None
        found: KnownRouter | None = None
        for dtype in {torch.float32: None, self._dtype: None}:  # formulas in float32; then as the model runs
            tensors, hidden = self._random(weight, wide=dtype == torch.float32)
            kwargs = {} if argument is None else {argument: tensors.pop("")}
            correction = tensors[bias].reshape(-1).float() if bias else kwargs.get(used or "")
            output, flattens = self._run(tensors, hidden, kwargs)
            if output is None:
                return None
            logits, weights, experts = output
            for wide, multiplier, softcap in product((False, True), self._attributes(1.0, "multiplier"),
                                                     self._attributes(0.0, "softcap")):  # fmt: skip
                found = KnownRouter(
                    RouterFormula(), weight, offset, bias, argument, used is not None, wide, logits.dtype, multiplier,
                    softcap, flattens,
                )  # fmt: skip
                ours = found.logits_by(hidden, tensors[weight], tensors[offset] if offset else None)
                if _close(ours, logits, 1e-6):
                    break
            else:
                return None
            logits = logits.float()
            if formulas is None:
                formulas = list(self._candidates(logits, weights, experts, correction))
            else:
                formulas = [each for each in formulas if self._fits(each, logits, weights, experts, correction)]
            if not formulas:
                return None
            found = replace(found, formula=formulas[0])
        return found

    def _random(self, weight: str, *, wide: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Tensors of the router, under "" one for an argument, and rows: of ordinary logits, of high ones, of spread
        ones, of ones that are low."""
        tensors = {}
        for name, tensor in _tensors(self._block.router).items():
            values = torch.randn(tensor.shape, generator=self._generator)
            tensors[name] = values if wide else values.to(tensor.dtype)
        tensors[""] = torch.randn(self._experts, generator=self._generator) * 0.5
        width = self._block.router.get_parameter(weight).shape[1]
        common = torch.randn(width, generator=self._generator)
        matrix = torch.randn(self._experts, width, generator=self._generator) / width**0.5
        tensors[weight] = (matrix + common / width**0.5).to(tensors[weight].dtype)
        hidden = torch.randn(_ROWS, width, generator=self._generator)
        hidden[_ROWS // 3 :] *= 4.0
        hidden[-_ROWS // 3 :] *= 3.0
        low = torch.arange(_ROWS // 3) * -2.0 / min(map(abs, self._attributes(1.0, "multiplier")))
        hidden[-len(low) :] += low[:, None] * common / common.square().sum() * width**0.5
        hidden[_ROWS // 3 - 8 : _ROWS // 3] += 24.0 * common / common.square().sum() * width**0.5  # scores round to 1
        return tensors, hidden if wide else hidden.to(self._dtype)

    def _run(
        self, tensors: dict[str, Tensor], hidden: Tensor, kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, bool]:
        """What the router returns, and whether it flattens."""
        given = {name: tensor for name, tensor in tensors.items() if name}
        outputs: list[Any] = []
        for rows in (hidden, hidden[None]):
            try:
                outputs.append(torch.func.functional_call(self._twin, given, (rows,), kwargs))
            except Exception:  # of another shape than the code takes
                outputs.append(None)
        flat, batched = (each if _is_routing(each, _ROWS, self._experts, self._top_k) else None for each in outputs)
        return flat if flat is not None else batched, batched is not None

    def _attributes(self, neutral: float, word: str) -> list[float]:
        """The neutral value, and those of the router's attributes that are named like this."""
        values = [float(value) for name, value in vars(self._block.router).items()
                  if word in name and isinstance(value, int | float) and not isinstance(value, bool)]  # fmt: skip
        return [neutral, *(value for value in values if value != neutral)]

    def _candidates(
        self, logits: Tensor, weights: Tensor, experts: Tensor, bias: Tensor | None
    ) -> Iterator[RouterFormula]:
        """The formulas that give these weights and experts."""
        attributes = [value for value in vars(self._block.router).values() if isinstance(value, int | float)]
        named = [
            value
            for name, value in vars(self._block.router).items()
            if "group" in name and type(value) is int and value > 0
        ]
        groups = sorted({1, *(value for value in named if self._experts % value == 0 and value < self._experts)})
        small = [value for value in attributes if isinstance(value, float) and 0 < value < 0.01]
        scores: tuple[Score, ...] = ("softmax", "sigmoid", "sqrtsoftplus")
        # Without correction scores order as logits do, and where they round to one number, logits still differ.
        orders = (True, False) if bias is None else (False, True)
        for count, score, by_logits in product(groups, scores, orders):
            if bias is None and count == 1 and by_logits and score == "softmax":
                continue  # plain, which the operator chooses by logits anyhow
            size, of_groups = self._experts // count, [1] if count == 1 else [value for value in named if value < count]
            for per_token, best, outside in product(of_groups, (1,) if count == 1 else (2, 1), (False, True)):
                if best > size or per_token * size < self._top_k or (count == 1 and outside):
                    continue
                chooses = RouterFormula(score, False, by_logits, count, per_token, best, outside_zero=outside)
                if not self._chooses(chooses, logits, experts, bias):
                    continue
                for formula in self._weighing(chooses, logits, weights, experts, attributes, small):
                    if self._fits(formula, logits, weights, experts, bias):
                        yield formula

    def _weighing(
        self,
        chooses: RouterFormula,
        logits: Tensor,
        weights: Tensor,
        experts: Tensor,
        attributes: list[Any],
        small: list[float],
    ) -> Iterator[RouterFormula]:
        ordinary = slice(0, _ROWS // 3 - 8)
        for renormalise in (True, False):
            plain = replace(chooses, renormalise=renormalise)
            ratios = weights[ordinary].float() / plain.weights(logits[ordinary], experts[ordinary])
            scale = float(ratios.median())
            if not math.isfinite(scale) or not _close(ratios, torch.full_like(ratios, scale), 1e-2):
                continue
            known = [float(value) for value in (1.0, 1 / self._top_k, *attributes) if not isinstance(value, bool)]
            scale = min(known, key=lambda value: abs(value - scale))
            for epsilon in dict.fromkeys([*_EPSILONS, *small]) if renormalise else (0.0,):
                yield replace(plain, epsilon=epsilon, scale=scale)
            for least in small if renormalise else ():
                yield replace(plain, least=least, scale=scale)

    def _chooses(self, formula: RouterFormula, logits: Tensor, experts: Tensor, bias: Tensor | None) -> bool:
        """Whether these are the K largest choices; of equal ones any."""
        choices = formula.choices(logits, bias)
        ours = choices.topk(self._top_k, dim=-1).values
        theirs = choices.gather(1, experts).sort(-1, descending=True).values
        return torch.equal(ours, theirs)

    def _fits(
        self, formula: RouterFormula, logits: Tensor, weights: Tensor, experts: Tensor, bias: Tensor | None
    ) -> bool:
        rounding = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
        if weights.dtype not in rounding or not self._chooses(formula, logits, experts, bias):
            return False
        return _close(formula.weights(logits, experts).to(weights.dtype), weights, rounding[weights.dtype])


def _is_routing(output: object, rows: int, experts: int, top_k: int) -> bool:
    if not isinstance(output, tuple) or len(output) != 3 or not all(isinstance(each, Tensor) for each in output):
        return False
    shapes = [tuple(each.shape) for each in output]
    return shapes == [(rows, experts), (rows, top_k), (rows, top_k)] and not output[2].is_floating_point()


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Relative to each number."""
    if a.shape != b.shape:
        return False
    return bool(torch.isclose(a.float(), b.float(), rtol=tolerance, atol=1e-30, equal_nan=True).all())
