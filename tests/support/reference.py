"""Float64 brute force, written from the definitions and sharing nothing with the package; bounds on rounding errors."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.binary import _C

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and _C.cuda_archs else [])
WGMMA = "cuda" in DEVICES and "9.0a" in _C.cuda_archs and torch.cuda.get_device_capability() == (9, 0)
MMA_SYNC = ["tall", "flat", "narrow"]  # what MOE_EXT_CUDA_KERNELS can force for large batches everywhere
GROUPED = MMA_SYNC + ["hopper"] * WGMMA  # hopper_pairs, which large experts take, has tests of its own
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu2"]


def activate(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name == "relu2":
        return x.clamp(min=0) ** 2
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@dataclass
class ExpertsCase:
    """Inputs of the experts operators; T, E, K, H, I as everywhere. ``options``: what the operators take by keyword."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    experts: Tensor
    weights: Tensor
    activation: str = "silu"
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, str]:
        return self.x, self.gate_up, self.down, self.experts, self.weights, self.activation

    def to(self, device: str) -> "ExpertsCase":
        moved = {name: getattr(self, name).to(device) for name in ("x", "gate_up", "down", "experts", "weights")}
        options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.options.items()}
        return replace(self, **moved, options=options)

    @property
    def transposed(self) -> bool:
        return bool(self.options.get("transposed", False))

    @property
    def intermediate(self) -> int:
        return self.down.shape[1 if self.transposed else 2]

    def projections(self, expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of an expert in float64: rows of gate and up (2I, H), gate before up, or (I, H) without gate; their biases;
        down (H, I) and its bias."""
        rows, down = self.gate_up[expert].double(), self.down[expert].double()
        if self.transposed:
            rows, down = rows.T, down.T
        bias, down_bias = (self.options.get(name) for name in ("gate_up_bias", "down_bias"))
        of_rows = torch.zeros(len(rows), dtype=torch.float64) if bias is None else bias[expert].double()
        of_down = torch.zeros(len(down), dtype=torch.float64) if down_bias is None else down_bias[expert].double()
        if self.options.get("interleaved", False):
            rows, of_rows = torch.cat((rows[::2], rows[1::2])), torch.cat((of_rows[::2], of_rows[1::2]))
        return rows, of_rows, down, of_down

    def tokens(self, rows: slice | Tensor) -> "ExpertsCase":
        """The same with some of its tokens."""
        return replace(self, x=self.x[rows], experts=self.experts[rows], weights=self.weights[rows])


def experts_case(
    tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sentinels: float = 0.0,
    activation: str = "silu",
    biases: bool = False,
    **options: Any,
) -> ExpertsCase:
    """Random inputs with distinct experts per token; a share ``sentinels`` of the slots beyond the first is empty.
    ``options``: of the operators, in which the weights are laid out; ``biases`` makes those."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    experts = torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :top_k].to(torch.int32)
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    empty = torch.rand(tokens, top_k, generator=generator) < sentinels
    empty[:, :1] = False
    rows = 2 * intermediate if options.get("gated", True) else intermediate
    x = normal(tokens, hidden).to(dtype)
    gate_up = (normal(num_experts, rows, hidden) / math.sqrt(hidden)).to(dtype)
    down = (normal(num_experts, hidden, intermediate) / math.sqrt(intermediate)).to(dtype)
    if options.get("transposed", False):
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    if biases:
        options["gate_up_bias"] = normal(num_experts, rows).to(dtype)
        options["down_bias"] = normal(num_experts, hidden).to(dtype)
    return ExpertsCase(
        x=x,
        gate_up=gate_up,
        down=down,
        experts=experts.masked_fill(empty, num_experts),
        weights=weights.masked_fill(empty, 0.0),
        activation=activation,
        options=options,
    )


def between(case: ExpertsCase, gate_up: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """h (R, I) of gate and up (R, 2I), gate before up, or of up alone (R, I); and how far a float32 computation from
    arguments with these errors can take it away."""
    options, silu = case.options, case.activation == "silu"

    def activated(x: Tensor, x_error: Tensor) -> tuple[Tensor, Tensor]:
        alpha, gate_cap = options.get("alpha", 1.0), options.get("gate_cap")
        a = cap(x, gate_cap) * torch.sigmoid(alpha * x) if silu else activate(case.activation, x)
        # No activation is steeper than 1.13, and with a cap x sigmoid(alpha x) than 1.25; but for the square, which is
        # where it is steeper. As computed it errs by up to 7 * 2^-24 |x|: CUDA's fast SiLU takes an exponential to
        # 2 + 1.18 |x| ulp, a sum and a division to 2 ulp; |x| * sigmoid * (1 - sigmoid) < 0.23. A cap adds 4 ulp.
        steepest = 2 * (x.abs() + x_error) if case.activation == "relu2" else torch.full_like(x, 1.25)
        size = torch.maximum(x.abs() + x_error, a.abs())
        return a, steepest.clamp(min=1.13) * x_error + 11 * FLOAT32 * size

    def cap(x: Tensor, bound: float | None) -> Tensor:
        return x if bound is None else bound * torch.tanh(x / bound)

    if not options.get("gated", True):
        return activated(gate_up, error)
    gate, up = gate_up.chunk(2, dim=-1)
    gate_error, up_error = error.chunk(2, dim=-1)
    limit, after = options.get("limit") or math.inf, options.get("limit_after", False)
    a, a_error = activated(gate if after else gate.clamp(max=limit), gate_error)
    a = a.clamp(max=limit) if after else a
    up = up.clamp(-limit, limit)
    capped = cap(up, options.get("up_cap")) + options.get("up_offset", 0.0)
    up_error = up_error + 8 * FLOAT32 * (up.abs() + up_error + abs(options.get("up_offset", 0.0)))
    return a * capped, a_error * (capped.abs() + up_error) + a.abs() * up_error


def expert_output(case: ExpertsCase, expert: int, token: int) -> Tensor:
    """f_e(x_t), (H,) float64."""
    rows, bias, down, down_bias = case.projections(expert)
    products = rows @ case.x[token].double() + bias
    h, _ = between(case, products, torch.zeros_like(products))
    return down @ h + down_bias


# Half a unit in the last place, relative: one rounding of a result to its dtype. float16 also has subnormals.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}

FLOAT32 = ROUNDING[torch.float32]
# What the tensor cores lose per product, relative to the sum of their magnitudes: they add 8 or more products and the
# sum so far at a time, cut off each below 2^-23 of the largest, then the result: (8 + 1 + 1) * 2^-23 / 8 = 2.5 * 2^-24.
TENSOR_CORES = 2.5 * 2.0**-24


@dataclass(frozen=True)
class Arithmetic:
    """How kernels compute: what a product in a dot product costs, in which dtype they keep h = act(gate x) * (up x) and
    y = f_e(x) in between, and what sums of g^2 h^2 lose."""

    product: float = FLOAT32
    h: torch.dtype = torch.float32
    y: torch.dtype = torch.float32
    energy: float = 0.0


# Of experts that the small batches' CUDA kernels take.
USUAL_LAYOUT = {"gated": True, "interleaved": False, "transposed": False}


def arithmetic_of(case: ExpertsCase, device: str, kernels: str = "") -> Arithmetic:
    """That of the named CUDA kernels, or of those that a call takes. On the CPU, dot products of bfloat16 keep h in
    bfloat16, all else float32. On CUDA, float32 and sizes that are no multiples of 8 keep float32 throughout; up to 16
    tokens, or 8 where they go by wgmma, h is kept in the dtype of x, beyond that h and y. CUDA sums energies in float32
    over at most 192 rows, by fewer than 64 roundings in a row, and of h before it is rounded: what an H100's tensor
    cores lose of a square, 2^-11, is less than that rounding would cost."""
    dtype, hidden, intermediate = case.x.dtype, case.x.shape[1], case.intermediate
    if device == "cpu" and dtype == torch.bfloat16 and _C.active_cpu_variant() == "avx512_bf16":
        return Arithmetic(h=dtype)
    if device == "cpu" or dtype == torch.float32 or hidden % 8 or intermediate % 8 or kernels == "plain":
        return Arithmetic(energy=0.0 if device == "cpu" else 64 * FLOAT32)
    usual = all(case.options.get(name, usual) == usual for name, usual in USUAL_LAYOUT.items())
    small_batch = kernels == "small_batch" or (kernels == "" and case.x.shape[0] <= (8 if WGMMA else 16) and usual)
    return Arithmetic(TENSOR_CORES, dtype, torch.float32 if small_batch else dtype, 64 * FLOAT32)


@dataclass
class Expected:
    """Results in float64, and how far an :class:`Arithmetic` can take them away, in whatever order it sums."""

    out: Tensor  # (T, H)
    bound: Tensor  # (T, H), before out is rounded to its dtype
    moments: Tensor  # (E, 3, 3)
    moments_bound: Tensor  # (E, 3, 3)
    channels: Tensor  # (E, I)
    channels_bound: Tensor  # (E, I)
    pairs: Tensor  # (E, E)
    pairs_bound: Tensor  # (E, E)


def in_eight_bits(rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R, C) with an error as whole numbers times a scale, 128 columns each, and the error of that: a number may
    be the next one where the row lies between two of them, to within what float32 and the error make of it."""
    width = rows.shape[1]
    parts, errors = (F.pad(each, (0, -width % 128)).unflatten(-1, (-1, 128)) for each in (rows, error))
    largest = parts.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    scale = largest / 127
    steps, relative = parts / scale, errors.amax(-1, keepdim=True) / largest + 4 * FLOAT32
    slack = errors / scale + 127 * relative
    between_two = ((steps - steps.floor() - 0.5).abs() <= slack) * (1 + slack.floor())
    numbers = steps.round()
    rounded, off = (scale * each for each in (numbers, between_two + (numbers.abs() + 1) * relative))
    return rounded.flatten(1)[:, :width], off.flatten(1)[:, :width]


def experts_reference(case: ExpertsCase, arithmetic: Arithmetic | None = None, *, eight_bits: bool = False) -> Expected:
    """The experts operators by brute force, one expert after the other; ``eight_bits``: of activations."""
    arithmetic = arithmetic or Arithmetic()
    product = arithmetic.product
    tokens, hidden = case.x.shape
    num_experts, intermediate = case.down.shape[0], case.intermediate
    out = torch.zeros(tokens, hidden, dtype=torch.float64)
    magnitude, bound = torch.zeros_like(out), torch.zeros_like(out)
    moments = torch.zeros(num_experts, 3, 3, dtype=torch.float64)
    moments_bound = torch.zeros_like(moments)
    channels = torch.zeros(num_experts, intermediate, dtype=torch.float64)
    channels_bound = torch.zeros_like(channels)
    shares = torch.zeros(tokens, num_experts, dtype=torch.float64)  # g ||y||
    shares_bound = torch.zeros_like(shares)

    def rounded(value: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
        """The error of a value with that error once it is rounded to a dtype."""
        return error + ROUNDING[dtype] * (value.abs() + error) + SMALLEST[dtype]

    for expert in range(num_experts):
        rows, slots = (case.experts == expert).nonzero(as_tuple=True)  # (R) each
        if len(rows) == 0:
            continue
        x, (gate_up, bias, down, down_bias) = case.x[rows].double(), case.projections(expert)
        weights = case.weights[rows, slots].double()

        x_error = torch.zeros_like(x)
        if eight_bits:
            x, x_error = in_eight_bits(x, x_error)
        products = x @ gate_up.T + bias  # (R, 2I), or (R, I) without gate
        of_products = (hidden + 1) * product * (x.abs() @ gate_up.abs().T + bias.abs()) + x_error @ gate_up.abs().T
        h, h_error = between(case, products, of_products)
        h_error = rounded(h, rounded(h, h_error, torch.float32), arithmetic.h)
        channels[expert] = (weights[:, None] ** 2 * h**2).sum(0)
        of_sums = arithmetic.energy * (h.abs() + h_error) ** 2
        channels_bound[expert] = (weights[:, None] ** 2 * ((2 * h.abs() + h_error) * h_error + of_sums)).sum(0)

        if eight_bits:
            h, h_error = in_eight_bits(h, h_error)
        y = h @ down.T + down_bias  # (R, H)
        of_sum = (h.abs() + h_error) @ down.abs().T + down_bias.abs()
        y_error = h_error @ down.abs().T + (intermediate + 1) * product * of_sum
        y_error = rounded(y, y_error, arithmetic.y)
        out.index_add_(0, rows, weights[:, None] * y)
        magnitude.index_add_(0, rows, weights.abs()[:, None] * (y.abs() + y_error))
        bound.index_add_(0, rows, weights.abs()[:, None] * y_error)

        # ||y|| is off by at most the norm of y's error; the sum of H squares in float32 by H + 1 roundings, its root
        # by half of that.
        norm, error = y.norm(dim=-1), y_error.norm(dim=-1)
        error = error + (hidden + 1) / 2 * FLOAT32 * (norm + error)
        errors = (torch.zeros_like(norm), error, (2 * norm + error) * error)
        shares[rows, expert], shares_bound[rows, expert] = weights * norm, weights.abs() * error
        for a in range(3):
            for b in range(3):
                moments[expert, a, b] = (weights**a * norm**b).sum()
                moments_bound[expert, a, b] = (weights.abs() ** a * errors[b]).sum()
    bound += (case.experts.shape[1] + 1) * FLOAT32 * magnitude
    pairs = torch.einsum("ti,tj->ij", shares, shares)
    cross = torch.einsum("ti,tj->ij", shares.abs() + shares_bound, shares_bound)
    return Expected(out, bound, moments, moments_bound, channels, channels_bound, pairs, cross + cross.T)


def gram_reference(case: ExpertsCase, arithmetic: Arithmetic | None = None) -> tuple[Tensor, Tensor]:
    """Gram matrices (T, E, E) of all experts' outputs, and how far an :class:`Arithmetic` can take them away once each
    output is rounded to the dtype of x. Their own float64 sums are lost in that: H 2^-53 beside 2^-24."""
    tokens, num_experts = case.x.shape[0], case.down.shape[0]
    outputs, errors = [], []
    for expert in range(num_experts):
        alone = replace(case, experts=torch.full((tokens, 1), expert), weights=torch.ones(tokens, 1))
        expected = experts_reference(alone, arithmetic)
        rounding = ROUNDING[case.x.dtype] * (expected.out.abs() + expected.bound) + SMALLEST[case.x.dtype]
        outputs.append(expected.out)
        errors.append(expected.bound + rounding)
    y, error = torch.stack(outputs, dim=1), torch.stack(errors, dim=1)  # (T, E, H)
    cross = torch.einsum("tih,tjh->tij", y.abs(), error)
    gram = torch.einsum("tih,tjh->tij", y, y)
    return gram, cross + cross.transpose(1, 2) + torch.einsum("tih,tjh->tij", error, error)


def projection_reference(case: ExpertsCase, g: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Projections (T, E) of all experts' outputs on g (T, H), and how far an :class:`Arithmetic` can take them away."""
    tokens, num_experts = case.x.shape[0], case.down.shape[0]
    values, bounds = [], []
    for expert in range(num_experts):
        alone = replace(case, experts=torch.full((tokens, 1), expert), weights=torch.ones(tokens, 1))
        expected = experts_reference(alone, arithmetic)
        values.append((expected.out * g.double()).sum(1))
        bounds.append((expected.bound * g.double().abs()).sum(1))
    return torch.stack(values, dim=1), torch.stack(bounds, dim=1)


def assert_within(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|got - expected| <= bound and one rounding to got's dtype, element by element."""
    allowed = bound + ROUNDING[got.dtype] * (expected.abs() + bound) + SMALLEST[got.dtype]
    excess = (got.cpu().double() - expected).abs() - allowed
    assert bool((excess <= 0).all()), f"off by up to {float(excess.max()):.3g} beyond the bound"


def assert_moments_within(got: Tensor, expected: Expected, start: Tensor | float = 0.0) -> None:
    """Moments that were added to ``start``; their own sums are float64."""
    want = start + expected.moments
    excess = (got.cpu() - want).abs() - expected.moments_bound - 1e-12 * want.abs()
    assert bool((excess <= 0).all()), f"off by up to {float(excess.max()):.3g} beyond the bound"


def assert_channels_within(got: Tensor, expected: Expected, start: Tensor | float = 0.0) -> None:
    """Energies of channels that were added to ``start``, in float64."""
    want = start + expected.channels
    excess = (got.cpu() - want).abs() - expected.channels_bound - 1e-12 * want.abs()
    assert bool((excess <= 0).all()), f"off by up to {float(excess.max()):.3g} beyond the bound"


def assert_pairs_within(got: Tensor, expected: Expected, start: Tensor | float = 0.0) -> None:
    """Products of pairs that were added to ``start``; their own sums are float64."""
    want = start + expected.pairs
    excess = (got.cpu() - want).abs() - expected.pairs_bound - 1e-12 * want.abs()
    assert bool((excess <= 0).all()), f"off by up to {float(excess.max()):.3g} beyond the bound"


def assert_histograms_close(got: Tensor, expected: Tensor) -> None:
    """Equal but for single ratios that rounding moves over the edge of a bin (a bin is 1/1024 wide, roundings 1e-6)."""
    moved = (got.cumsum(-1) - expected.cumsum(-1)).abs()
    assert int(moved.max()) <= 1
    assert not bool(moved[..., -1].any())


def route_reference(
    logits: Tensor, top_k: int, thresholds: Tensor | None, renormalise: bool
) -> tuple[list[list[float]], list[list[int]]]:
    """weights and experts by sorting, in plain Python floats."""
    num_experts = logits.shape[1]
    all_weights, all_experts = [], []
    for row in logits.double().tolist():
        order = sorted(range(num_experts), key=lambda e: (-row[e], e))[:top_k]
        total = sum(math.exp(value - max(row)) for value in row)
        weights = [math.exp(row[e] - max(row)) / total for e in order]
        if renormalise:
            weights = [weight / sum(weights) for weight in weights]
        if thresholds is not None:
            full = sum(weights)
            skipped = [rank > 0 and weights[rank] < float(thresholds[rank - 1]) * weights[0] for rank in range(top_k)]
            weights = [0.0 if skip else weight for weight, skip in zip(weights, skipped, strict=True)]
            order = [num_experts if skip else e for e, skip in zip(order, skipped, strict=True)]
            kept = sum(weights)
            weights = [weight * full / kept for weight in weights]
        all_weights.append(weights)
        all_experts.append(order)
    return all_weights, all_experts
