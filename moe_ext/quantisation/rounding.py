"""Float weights to few bits, every number to the nearest that its format has.

Scales are rounded to the type in which they are stored before the numbers are rounded by them, so that what is stored
is what was rounded. Rows are done a few million numbers at a time; the result does not depend on how many.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.models.packed_experts import E2M1, QuantisedMatrix, WeightFormat, paired

_AT_ONCE = 1 << 22  # numbers in float32 at a time

_LARGEST = 448.0  # of e4m3fn
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between e2m1's magnitudes
_TO_UPPER = (False, True, False, True, False, True, False)  # a tie goes to the number whose last bit is 0

SEARCHED = tuple(sign * number / 16 for number in (16, 17, 15, 14, 13, 12, 11, 10) for sign in (1, -1))
"""Multiples of the plain scale that are tried: a negative one turns -8 to 7 into -7 to 8."""

_SMALLEST_SCALE = {torch.float16: 2.0**-20}  # below, float16 has few bits left
_EXPONENT_BIAS = 127


def rounded(
    weight: Tensor, form: WeightFormat, scale_dtype: torch.dtype, search_scales: bool = False
) -> QuantisedMatrix:
    """A weight in few bits.

    - int8: scale = largest magnitude of the row / 127.
    - int4 symmetric: largest magnitude of the group / 7.5, numbers -8 to 7: as compressed-tensors rounds. Asymmetric:
      (largest - smallest) / 15 with 0 in between, and the zero point that is nearest.
    - fp8: largest magnitude of the row or block / 448.
    - mxfp4: of the two powers of two about largest magnitude / 6 the one with the smaller sum of squared errors.

    Args:
        weight: (R, C) floating point, finite.
        scale_dtype: the type of which scales are numbers, but for mxfp4: bfloat16, float16 or float32. Those of int8
            and fp8 are returned as float32.
        search_scales: of symmetric int4, takes the scale with the least sum of squared errors among SEARCHED of them,
            smaller ones mostly: a few of the largest numbers are then cut off.

    Raises:
        ValueError: numbers that are not finite.
    """
    rows, columns = weight.shape
    step = max(1, _AT_ONCE // max(columns, 1))
    if form.blocks:
        step = -(-step // form.group_size) * form.group_size
    parts = [
        _rounded_rows(weight[first : first + step].float(), form, scale_dtype, search_scales)
        for first in range(0, rows, step)
    ]
    zeros = None if form.symmetric else torch.cat([part.zeros for part in parts if part.zeros is not None])
    return QuantisedMatrix(
        torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]), zeros
    )


def check_search(form: WeightFormat, search_scales: bool) -> None:
    """ValueError if scales are to be searched for in a format where that is not done."""
    if search_scales and (form.type != "int4" or not form.symmetric):
        kind = form.type if form.symmetric else "int4 with zero points"
        raise ValueError(f"search_scales is True; scales are searched for in symmetric int4, not in {kind}")


def _rounded_rows(weight: Tensor, form: WeightFormat, scale_dtype: torch.dtype, search_scales: bool) -> QuantisedMatrix:
    low, high = torch.aminmax(weight)
    if not bool(low.isfinite() & high.isfinite()):
        raise ValueError("weights that are not finite cannot be quantised")
    match form.type:
        case "int8":
            scales = _usable(weight.abs().amax(-1) / 127, scale_dtype)
            return QuantisedMatrix((weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales)
        case "fp8":
            scales = _usable(_largest(weight, form) / _LARGEST, scale_dtype)
            scaled = weight / form.spread(scales, *weight.shape)
            return QuantisedMatrix(scaled.clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scales)
        case "int4":
            return _int4(weight, form, scale_dtype, search_scales)
        case _:
            return _mxfp4(weight, form)


def _int4(weight: Tensor, form: WeightFormat, scale_dtype: torch.dtype, search_scales: bool) -> QuantisedMatrix:
    columns = weight.shape[-1]
    groups = in_groups(weight, form.group_size)
    if form.symmetric:
        scales, zeros = _usable(groups.abs().amax(-1) / 7.5, scale_dtype), None
        if search_scales:
            scales = _searched(groups, scales, scale_dtype)
        numbers = _signed(groups, scales) + 8
    else:
        low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        scales = _usable((high - low) / 15, scale_dtype)
        offsets = (-low / scales).round_().clamp_(0, 15)
        numbers = ((groups / scales[..., None]).round_() + offsets[..., None]).clamp_(0, 15)
        zeros = offsets.to(torch.uint8)
    values = paired(numbers.to(torch.uint8).flatten(-2)[..., :columns])
    return QuantisedMatrix(values, scales.to(scale_dtype), zeros)


def _signed(groups: Tensor, scales: Tensor) -> Tensor:
    return (groups / scales[..., None]).round_().clamp_(-8, 7)


def _searched(groups: Tensor, plain: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Of multiples of plain scales, each group's with the least sum of squared errors; the first of equal ones."""
    best, least = plain, torch.full_like(plain, torch.inf)
    for factor in SEARCHED:
        scales = _usable(plain * abs(factor), scale_dtype) * (1 if factor > 0 else -1)
        errors = (_signed(groups, scales) * scales[..., None] - groups).square_().sum(-1)
        better = errors < least
        best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    return best


def _mxfp4(weight: Tensor, form: WeightFormat) -> QuantisedMatrix:
    columns = weight.shape[-1]
    groups = in_groups(weight, form.group_size)
    # Largest = mantissa * 2^exponent, mantissa in [0.5, 1): 2^(exponent - 3) takes it into [4, 8), 2^(exponent - 2)
    # into [2, 4). 6 is the largest number.
    exponents = torch.frexp(groups.abs().amax(-1)).exponent - 3
    best = _e2m1(groups, exponents)
    wider = _e2m1(groups, exponents + 1)
    better = 4 * wider[1] < best[1]  # in its own units, twice as large
    codes = torch.where(better[..., None], wider[0], best[0])
    exponents = torch.where(better, wider[2], best[2])
    scales = (exponents + _EXPONENT_BIAS).to(torch.uint8)
    return QuantisedMatrix(paired(codes.flatten(-2)[..., :columns]), scales)


def _e2m1(groups: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of groups at a power of two, the sums of their squared errors in units of it, and that power."""
    exponents = exponents.clamp(-_EXPONENT_BIAS, _EXPONENT_BIAS)
    # In two steps: 2^127 and 2^-127 together are beyond float32.
    scaled = torch.ldexp(torch.ldexp(groups, -(exponents // 2)[..., None]), -(exponents - exponents // 2)[..., None])
    magnitude = scaled.abs()
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for middle, upper in zip(_MIDDLES, _TO_UPPER, strict=True):
        codes += magnitude >= middle if upper else magnitude > middle
    table = torch.tensor(E2M1, device=groups.device)
    errors = (table[codes.int()] - magnitude).square_().sum(-1)
    return codes | ((scaled < 0).to(torch.uint8) << 3), errors, exponents


def in_groups(weight: Tensor, size: int) -> Tensor:
    """(R, C) as (R, groups, size), zeros in what the last group lacks."""
    return F.pad(weight, (0, -weight.shape[-1] % size)).unflatten(-1, (-1, size))


def _largest(weight: Tensor, form: WeightFormat) -> Tensor:
    """The largest magnitude under every scale."""
    if not form.blocks:
        return weight.abs().amax(-1)
    size = form.group_size
    padded = F.pad(weight.abs(), (0, -weight.shape[1] % size, 0, -weight.shape[0] % size))
    return padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).amax((1, 3))


def _usable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales that the type can store, float32, none of them 0: of a group of zeros any scale will do."""
    smallest = _SMALLEST_SCALE.get(dtype, torch.finfo(dtype).tiny)
    return scales.clamp(min=smallest).to(dtype).float()
