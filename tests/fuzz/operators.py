"""Ten thousand calls of the operators, half of them wrong somewhere: ``make fuzz``, with the day as the seed.

A right call is compared with float64 brute force, in any CPU variant, and a token alone has the same bits. A wrong one,
made from a right one by one change, either is refused in a line that names the operator, by the kernel and by its fake
kernel alike, or was right after all: then both give the same shapes and dtypes. What was passed is not changed.

hypothesis shrinks what fails and prints it; it becomes a test in tests/ops. MOE_EXT_FUZZ_CALLS is the number of calls.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_ext import ops
from tests.support.operators import FORMULAS, RUNNABLE_VARIANTS, assert_gram_equals_brute_force
from tests.support.quantised_layers import FORMATS, QuantisedCase, quantised_case, random_values
from tests.support.reference import (
    ACTIVATIONS,
    DTYPES,
    ExpertsCase,
    arithmetic_of,
    assert_moments_within,
    assert_within,
    experts_case,
    experts_reference,
    route_reference,
)

CALLS = int(os.environ.get("MOE_EXT_FUZZ_CALLS", "10000"))
LONGEST_MESSAGE = 500

torch.set_num_threads(1)


def fuzz(share: float) -> settings:
    """Settings of a test that makes this share of the calls; conftest's are the same examples in every run."""
    return settings(
        max_examples=max(1, round(share * CALLS)),
        derandomize=False,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def cases(draw: st.DrawFn) -> ExpertsCase:
    num_experts = draw(st.integers(1, 5))
    return experts_case(
        draw(st.integers(0, 20)),
        num_experts,
        draw(st.integers(1, num_experts)),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 50)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**31)),
        sentinels=draw(st.sampled_from([0.0, 0.3, 1.0])),
        **draw(formulas()),
    )


def formulas() -> st.SearchStrategy[dict[str, Any]]:
    """Of experts_case: usual experts with any activation, or one of the others."""
    usual: list[dict[str, Any]] = [{"activation": name} for name in ACTIVATIONS]
    return st.sampled_from(usual) | st.sampled_from(list(FORMULAS.values()))


# ---- right calls


@fuzz(0.1)  # three calls each
@given(case=cases(), variant=st.sampled_from(RUNNABLE_VARIANTS), masked=st.booleans())
def test_experts_equal_brute_force_and_tokens_keep_their_bits(case: ExpertsCase, variant: str, masked: bool) -> None:
    tokens, num_experts = case.x.shape[0], case.down.shape[0]
    counted = torch.arange(tokens) % 3 != 1 if masked else None
    moments = torch.zeros(num_experts, 3, 3, dtype=torch.float64)
    with patch.dict(os.environ, MOE_EXT_ISA=variant):
        arithmetic = arithmetic_of(case, "cpu")
        out = ops.experts_observed(*case.arguments(), moments, counted, **case.options)
        assert torch.equal(ops.experts(*case.arguments(), **case.options), out)
        last = case.tokens(slice(tokens - 1, tokens))
        assert torch.equal(ops.experts(*last.arguments(), **case.options), out[-1:])
    expected = experts_reference(case, arithmetic)
    assert_within(out, expected.out, expected.bound)
    assert_moments_within(moments, experts_reference(case if counted is None else case.tokens(counted), arithmetic))


@st.composite
def quantised_cases(draw: st.DrawFn) -> QuantisedCase:
    num_experts = draw(st.integers(1, 4))
    return quantised_case(
        FORMATS[draw(st.sampled_from(sorted(FORMATS)))],
        draw(st.integers(0, 20)),
        num_experts,
        draw(st.integers(1, num_experts)),
        draw(st.integers(1, 300)),
        draw(st.integers(1, 200)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**31)),
        sentinels=draw(st.sampled_from([0.0, 0.3, 1.0])),
        **draw(formulas().filter(as_rows)),
    )


def as_rows(formula: dict[str, Any]) -> bool:
    return not formula.get("transposed", False)


@fuzz(0.05)  # two calls each
@given(case=quantised_cases(), variant=st.sampled_from(RUNNABLE_VARIANTS))
def test_experts_on_quantised_weights_equal_brute_force(case: QuantisedCase, variant: str) -> None:
    with patch.dict(os.environ, MOE_EXT_ISA=variant):
        expected = experts_reference(case.plain, case.arithmetic())
        out = ops.experts(*case.packed.arguments(), **case.packed.options)
        last = case.packed.tokens(slice(len(out) - 1, len(out)))
        assert torch.equal(ops.experts(*last.arguments(), **last.options), out[-1:])
    assert_within(out, expected.out, expected.bound)


@fuzz(0.05)
@given(case=cases(), variant=st.sampled_from(RUNNABLE_VARIANTS))
def test_gram_equals_brute_force(case: ExpertsCase, variant: str) -> None:
    with patch.dict(os.environ, MOE_EXT_ISA=variant):
        assert_gram_equals_brute_force(case, "cpu")


@fuzz(0.1)
@given(
    tokens=st.integers(0, 5),
    num_experts=st.integers(1, 90),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    renormalise=st.booleans(),
    skipping=st.booleans(),
)
def test_route_equals_brute_force(
    tokens: int, num_experts: int, data: st.DataObject, dtype: torch.dtype, renormalise: bool, skipping: bool
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = (torch.randn(tokens, num_experts, generator=generator) * 2).to(dtype)
    thresholds = torch.rand(top_k - 1, generator=generator) if skipping else None
    weights, experts = ops.route(logits, top_k, thresholds, renormalise)
    expected_weights, expected_experts = route_reference(logits, top_k, thresholds, renormalise)
    expected = torch.tensor(expected_weights, dtype=torch.float64).reshape(tokens, top_k)
    assert experts.tolist() == expected_experts
    # Differences of logits up to 32 round by 2^-20, which their exponentials take over: in up to four places.
    torch.testing.assert_close(weights.double(), expected, rtol=5 * 2.0**-20, atol=1e-30)


@fuzz(0.05)
@given(
    tokens=st.integers(0, 6),
    num_experts=st.integers(1, 7),
    data=st.data(),
    skipping=st.booleans(),
)
def test_subset_errors_equal_brute_force(tokens: int, num_experts: int, data: st.DataObject, skipping: bool) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    dropped = data.draw(st.integers(0, num_experts - top_k))
    depth = data.draw(st.integers(top_k + dropped, num_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    outputs = torch.randn(tokens, num_experts, 4, dtype=torch.float64, generator=generator)
    logits = torch.randn(tokens, num_experts, dtype=torch.float64, generator=generator)
    ranks = logits.argsort(dim=1, descending=True)[:, :depth]
    ranked = outputs.gather(1, ranks.unsqueeze(2).expand(-1, -1, 4))
    pairs = list(itertools.combinations(range(depth), 2))
    distances = torch.zeros(tokens, len(pairs), dtype=torch.float64)
    for index, (i, j) in enumerate(pairs):
        distances[:, index] = (ranked[:, i] - ranked[:, j]).square().sum(-1)
    keep = torch.ones(3, num_experts, dtype=torch.bool)
    for row in keep:
        row[torch.randperm(num_experts, generator=generator)[:dropped]] = False
    thresholds = torch.rand(top_k - 1, generator=generator) if skipping else None
    got = ops.subset_errors(distances, ranks, logits.gather(1, ranks).exp(), keep, top_k, thresholds)
    for subset, error in zip(keep, got.tolist(), strict=True):
        full = combined(outputs, logits, top_k, None)
        left = combined(outputs, logits.masked_fill(~subset, -torch.inf), top_k, thresholds)
        expected = float((full - left).square().sum())
        assert abs(error - expected) <= 1e-10 * expected + 1e-20


def combined(outputs: Tensor, logits: Tensor, top_k: int, thresholds: Tensor | None) -> Tensor:
    """A layer's output (T, H) of its experts' outputs (T, E, H)."""
    tokens, num_experts = logits.shape
    weights, experts = route_reference(logits, top_k, thresholds, renormalise=True)
    dense = torch.zeros(tokens, num_experts + 1, dtype=torch.float64)
    if tokens:
        dense.scatter_(1, torch.tensor(experts), torch.tensor(weights, dtype=torch.float64))
    return (dense[:, :-1, None] * outputs).sum(1)


# ---- wrong calls

Arguments = dict[str, Any]


@st.composite
def calls(draw: st.DrawFn) -> tuple[Callable[..., Any], Arguments]:
    """An operator and arguments that it takes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    operators: list[Callable[..., Any]] = [
        ops.route, ops.experts, ops.experts_observed, ops.expert_gram,
        ops.expert_projection, ops.subset_errors, ops.projected_errors, ops.pack_weights, ops.unpack_weights,
    ]  # fmt: skip
    operator = draw(st.sampled_from(operators))
    tokens, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    top_k = draw(st.integers(1, num_experts))
    thresholds = torch.rand(top_k - 1, generator=generator) if draw(st.booleans()) else None
    dtype = draw(st.sampled_from(DTYPES))
    arguments: Arguments
    if operator is ops.route:
        logits = torch.randn(tokens, num_experts, generator=generator).to(dtype)
        arguments = {"logits": logits, "top_k": top_k, "thresholds": thresholds, "renormalise": draw(st.booleans())}
        if draw(st.booleans()):
            groups = draw(st.sampled_from([count for count in (1, 2, 3, 4) if num_experts % count == 0]))
            arguments |= {
                "score": draw(st.sampled_from(ops.SCORES)),
                "bias": torch.randn(num_experts, generator=generator) if draw(st.booleans()) else None,
                "by_logits": draw(st.booleans()),
                "groups": groups,
                "groups_per_token": groups,
                "group_best": 1,
                "outside_zero": draw(st.booleans()),
                "epsilon": draw(st.sampled_from([0.0, 1e-20])),
                "least": draw(st.sampled_from([0.0, 1e-12])),
                "scale": 2.5,
            }
        return operator, arguments
    if operator in (ops.subset_errors, ops.projected_errors):
        ranks = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(tokens)])
        pairs = num_experts * (num_experts - 1) // 2
        return operator, {
            **(
                {"distances": torch.rand(tokens, pairs, generator=generator, dtype=torch.float64)}
                if operator is ops.subset_errors
                else {"projections": torch.rand(tokens, num_experts, generator=generator, dtype=torch.float64)}
            ),
            "ranks": ranks,
            "scores": torch.rand(tokens, num_experts, generator=generator, dtype=torch.float64),
            "keep": torch.ones(draw(st.integers(0, 3)), num_experts, dtype=torch.bool),
            "top_k": top_k,
            "thresholds": thresholds,
        }
    hidden, intermediate = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if operator in (ops.pack_weights, ops.unpack_weights):
        weight_type = draw(st.sampled_from(["int8", "int4", "mxfp4"]))  # little can be done to tensors of float8
        values = random_values(weight_type, (num_experts, hidden, intermediate), generator)
        if operator is ops.pack_weights:
            return operator, {"values": values, "weight_type": weight_type}
        packed = ops.pack_weights(values, weight_type)
        return operator, {"packed": packed, "weight_type": weight_type, "columns": intermediate}
    if draw(st.booleans()):
        case = experts_case(tokens, num_experts, top_k, hidden, intermediate, dtype=dtype, **draw(formulas()))
    else:
        form = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
        of_rows = draw(formulas().filter(as_rows))
        layer = quantised_case(form, tokens, num_experts, top_k, 40 * hidden, intermediate, dtype=dtype, **of_rows)
        case = layer.packed
    arguments = {"x": case.x, "gate_up": case.gate_up, "down": case.down}
    if operator is ops.expert_projection:
        arguments["g"] = torch.randn(case.x.shape, generator=generator)
    elif operator is not ops.expert_gram:
        arguments |= {"experts": case.experts, "weights": case.weights}
    arguments["activation"] = case.activation
    arguments |= {name: value for name, value in case.options.items() if value is not None}
    if operator is ops.experts_observed:
        arguments["moments"] = torch.zeros(num_experts, 3, 3, dtype=torch.float64)
        arguments["counted"] = torch.rand(tokens, generator=generator) < 0.7 if draw(st.booleans()) else None
        if draw(st.booleans()):
            arguments["pairs"] = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    return operator, arguments


ANY_DTYPE = [*DTYPES, torch.float64, torch.int32, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64]
EXTREMES = [0.0, -1.0, 1e30, torch.inf, -torch.inf, torch.nan]
SMALL = st.integers(-9, 9)
ODD_INTEGERS = [-(2**63), -1, 0, 2, 5, 2**31, 2**62, 2**70, True, 1.5, None, "2"]
ODD_NAMES = ["", "relu", "SILU", "silu\0", "s" * 1000, None, 1, "\ud800"]
ODD_OPTIONS = [0, "x", torch.zeros(()), torch.zeros(3), torch.zeros(2, dtype=torch.bool)]
Draw = st.DrawFn
Change = Callable[[Draw, Tensor, int], Any]  # of a tensor, in one of its dimensions


def with_odd_offset(draw: Draw, tensor: Tensor, dim: int) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def expanded(draw: Draw, tensor: Tensor, dim: int) -> Tensor:
    sizes = [-1] * tensor.dim()
    if tensor.shape[dim] > 0:
        sizes[dim] = draw(st.sampled_from([2, 2**40]))
    return tensor.narrow(dim, 0, min(tensor.shape[dim], 1)).expand(sizes)


def with_one_value(draw: Draw, tensor: Tensor, dim: int) -> Tensor:
    value = draw(st.sampled_from(EXTREMES) if tensor.is_floating_point() else SMALL)
    return torch.full(tensor.shape, float(value), dtype=torch.float64).to(tensor.dtype)


CHANGES: dict[str, Change] = {
    "dtype": lambda draw, tensor, dim: tensor.to(draw(st.sampled_from(ANY_DTYPE))),
    "one dimension more": lambda draw, tensor, dim: tensor.unsqueeze(dim),
    "one dimension less": lambda draw, tensor, dim: tensor.sum(dim).to(tensor.dtype),
    "flat": lambda draw, tensor, dim: tensor.flatten(),
    "twice as long": lambda draw, tensor, dim: torch.cat([tensor, tensor], dim),
    "shorter": lambda draw, tensor, dim: tensor.narrow(dim, 0, max(tensor.shape[dim] - 1, 0)),
    "empty": lambda draw, tensor, dim: tensor.narrow(dim, 0, 0),
    "transposed": lambda draw, tensor, dim: tensor.transpose(0, dim),
    "strided": lambda draw, tensor, dim: tensor.transpose(0, dim).contiguous().transpose(0, dim),
    "odd offset": with_odd_offset,
    "expanded": expanded,
    "meta": lambda draw, tensor, dim: tensor.to("meta"),
    "sparse": lambda draw, tensor, dim: tensor.to_sparse(),
    "gradients": lambda draw, tensor, dim: tensor.clone().requires_grad_(tensor.is_floating_point()),
    "one value": with_one_value,
    "negative view": lambda draw, tensor, dim: torch._neg_view(tensor) if tensor.is_floating_point() else tensor,
    "no tensor": lambda draw, tensor, dim: draw(st.sampled_from([None, 3, "x", [1.0], tensor.tolist()])),
}


@st.composite
def wrong_calls(draw: Draw) -> tuple[Callable[..., Any], Arguments]:
    operator, arguments = draw(calls())
    name = draw(st.sampled_from(sorted(arguments)))
    value = arguments[name]
    if isinstance(value, Tensor):
        dim = draw(st.integers(0, value.dim() - 1))
        arguments[name] = CHANGES[draw(st.sampled_from(sorted(CHANGES)))](draw, value, dim)
    elif isinstance(value, bool):
        arguments[name] = draw(st.sampled_from([0, 2, None, "x", 1.5]))
    else:
        odd = ODD_INTEGERS if isinstance(value, int) else ODD_NAMES if isinstance(value, str) else ODD_OPTIONS
        arguments[name] = draw(st.sampled_from(odd))
    return operator, arguments


def outcome(operator: Callable[..., Any], arguments: Arguments) -> tuple[str, Any]:
    """("refused", message) or ("returned", shapes and dtypes)."""
    try:
        result = operator(**arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        return "refused", str(error)
    results = result if isinstance(result, tuple) else (result,)
    return "returned", [(tuple(tensor.shape), tensor.dtype) for tensor in results]


# What a fake kernel, which sees no values and takes no memory, does not refuse.
BY_VALUE = ("' holds ", "' drops ", "gave no memory", "not enough memory")


def of_meta(value: Any) -> Any:
    """A tensor of the meta device that is like this one; what is no tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.layout != torch.strided:
        return value.to("meta")
    meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")  # to() makes it dense
    return torch._neg_view(meta) if value.is_neg() else meta.requires_grad_(value.requires_grad)


def same(tensor: Tensor, before: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return torch.equal(tensor.isnan(), before.isnan()) and torch.equal(tensor.nan_to_num(), before.nan_to_num())


@fuzz(0.5)
@given(call=wrong_calls())
def test_wrong_calls_are_refused_by_name_and_change_nothing(call: tuple[Callable[..., Any], Arguments]) -> None:
    operator, arguments = call
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    kept = {
        name: tensor.detach().clone()
        for name, tensor in tensors.items()
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.numel() < 2**20
    }
    kind, said = outcome(operator, arguments)
    for name, before in kept.items():
        assert same(tensors[name].detach(), before) or (name in ("moments", "pairs") and kind == "returned")
    if kind == "refused":
        assert said.startswith(f"{operator.__name__}: "), said
        assert len(said) <= LONGEST_MESSAGE, said
    if any(tensor.is_meta for tensor in tensors.values()) or any(mark in said for mark in BY_VALUE):
        return
    of_fake = outcome(operator, {name: of_meta(value) for name, value in arguments.items()})
    assert of_fake[0] == kind, f"{said}, but of meta tensors: {of_fake[1]}"
    assert kind == "refused" or of_fake[1] == said
