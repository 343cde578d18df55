"""Rounding of weights, against float64 brute force over all numbers of a format and against compressed-tensors."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize

from moe_ext.models.packed_experts import QuantisedMatrix, WeightFormat, dequantised, nibbles, paired
from moe_ext.quantisation import rounding
from moe_ext.quantisation.rounding import rounded
from tests.support.packed import FORMATS, same_bits

ROWS, COLUMNS = 40, 200  # neither groups nor blocks divide them
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def weight(seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, one of zeros."""
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    values *= torch.logspace(-3, 1, ROWS)[:, None]
    values[7] = 0
    return values.bfloat16()


def numbers_of(form: WeightFormat) -> torch.Tensor:
    """All numbers that a format without zero points has, float64."""
    if form.type == "int8":
        return torch.arange(-127, 128).double()
    if form.type == "int4":
        return torch.arange(-8, 8).double()
    if form.type == "mxfp4":
        return torch.tensor([*E2M1, *(-value for value in E2M1)]).double()
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return every[every.isfinite()]


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.symmetric])
def test_every_number_is_the_nearest_under_its_scale(name: str) -> None:
    form, values = FORMATS[name], weight()
    made = rounded(values, form, torch.bfloat16)
    scales = made.scales.double() if form.type != "mxfp4" else torch.exp2(made.scales.double() - 127)
    at = form.spread(scales, ROWS, COLUMNS).expand(ROWS, COLUMNS)
    errors = (at[..., None] * numbers_of(form) - values.double()[..., None]).abs()
    got = (dequantised(made, form, COLUMNS).double() - values.double()).abs()
    # Products of a scale and a number of so few bits are exact in float32; so is all but the last bit of a quotient.
    assert bool((got <= errors.amin(-1) * (1 + 1e-6) + at * 1e-6).all())


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_number_of_a_scale_uses_the_formats_range(name: str) -> None:
    form, values = FORMATS[name], weight()
    error = (dequantised(rounded(values, form, torch.bfloat16), form, COLUMNS) - values.float()).abs()
    size = form.group_size or COLUMNS
    largest = torch.nn.functional.pad(values.float().abs(), (0, -COLUMNS % size)).unflatten(1, (-1, size)).amax(-1)
    bound = largest.amax() if form.blocks else largest.repeat_interleave(size, 1)[:, :COLUMNS]
    # Half a step, and for scales in bfloat16 2^-8 of the largest number. e4m3 has steps of 1/14 at most; mxfp4 makes 6
    # of what is just below 8.
    steps = {"int8": 1 / 254, "int4": 1 / 15, "fp8": 1 / 28, "mxfp4": 1 / 4}[form.type]
    assert bool((error <= bound * (steps + 2**-8) * (1.0 if form.symmetric else 2.0)).all())


def test_mxfp4_takes_the_power_of_two_with_the_least_squared_error() -> None:
    form, values = FORMATS["mxfp4"], weight()[:, :192].double()
    groups, table = values.unflatten(1, (-1, 32)), numbers_of(form)
    made = rounded(values.bfloat16(), form, torch.bfloat16)
    got = (dequantised(made, form, 192).double() - values).square().unflatten(1, (-1, 32)).sum(-1)
    for power in range(-20, 6):
        scaled = groups[..., None] - table * 2.0**power
        assert bool((got <= scaled.square().amin(-1).sum(-1) * (1 + 1e-6)).all()), power


@pytest.mark.parametrize("name", ["int4, groups of 32", "int4, zero points", "fp8, rows"])
def test_compressed_tensors_rounds_to_the_same_numbers_with_these_scales(name: str) -> None:
    form, values = FORMATS[name], weight()[:, :192]
    made = rounded(values.float(), form, torch.float32)
    grouped = {"strategy": "group", "group_size": form.group_size} if form.group_size else {"strategy": "channel"}
    kind = "float" if form.type == "fp8" else "int"
    args = QuantizationArgs(num_bits=8 if kind == "float" else 4, type=kind, symmetric=form.symmetric, **grouped)
    scales = made.scales if form.group_size else made.scales[:, None]
    zeros = None if made.zeros is None else (made.zeros.int() - 8).to(torch.int8)
    expected = quantize(values.float(), scales, zeros, args).float()
    got = made.values.float() if kind == "float" else nibbles(made.values, 192).float() - 8
    # Half-way cases may go to either side: their quotients differ in the last bit.
    assert float((got != expected).float().mean()) < 1e-3


@pytest.mark.parametrize("size", [32, 128])
def test_scales_that_are_searched_for_have_the_least_squared_error_of_those_tried(size: int) -> None:
    form, values = WeightFormat("int4", size), weight()[:, :128]
    plain, searched = (rounded(values, form, torch.float32, search) for search in (False, True))

    def errors(scales: torch.Tensor) -> torch.Tensor:
        """Brute force: every number to the nearest of the sixteen under its scale."""
        at = form.spread(scales.double(), ROWS, 128)[..., None] * numbers_of(form)
        return (at - values.double()[..., None]).abs().amin(-1).square().unflatten(1, (-1, size)).sum(-1)

    tried = torch.stack([errors(plain.scales * factor) for factor in rounding.SEARCHED])
    torch.testing.assert_close(errors(searched.scales), tried.amin(0), rtol=1e-5, atol=1e-12)
    assert bool((errors(searched.scales) < errors(plain.scales)).any())
    with pytest.raises(
        ValueError, match="search_scales is True; scales are searched for in symmetric int4, not in fp8"
    ):
        rounding.check_search(FORMATS["fp8, rows"], search_scales=True)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_does_not_depend_on_how_many_rows_are_done_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.cat([weight(seed) for seed in range(7)])
    whole = rounded(values, FORMATS[name], torch.bfloat16)
    monkeypatch.setattr(rounding, "_AT_ONCE", 3 * COLUMNS)
    parts = rounded(values, FORMATS[name], torch.bfloat16)
    assert same_bits(whole.values, parts.values)
    assert same_bits(whole.scales, parts.scales)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_numbers_of_the_type_that_stores_them(dtype: torch.dtype) -> None:
    values = weight().float().mul(1e-4).to(dtype)
    for form in FORMATS.values():
        made = rounded(values, form, dtype)
        if form.type != "mxfp4":
            assert torch.equal(made.scales.to(dtype).float(), made.scales.float())
            assert bool((made.scales > 0).all())
        assert bool(dequantised(made, form, COLUMNS)[7].eq(0).all())


def test_numbers_that_are_not_finite_are_refused() -> None:
    values = weight()
    values[3, 5] = torch.inf
    for form in FORMATS.values():
        with pytest.raises(ValueError, match="not finite"):
            rounded(values, form, torch.bfloat16)


def test_halves_of_bytes_are_columns_in_order() -> None:
    numbers = torch.randint(0, 16, (3, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nibbles(paired(numbers), 7), numbers)
    assert paired(torch.tensor([[1, 2]], dtype=torch.uint8)).tolist() == [[0x21]]


def test_scales_of_powers_of_two_reach_their_ends() -> None:
    matrix = QuantisedMatrix(torch.full((3, 16), 0x22, dtype=torch.uint8), torch.tensor([[0], [254], [255]]).byte())
    values = dequantised(matrix, FORMATS["mxfp4"], 32)[:, 0]
    assert values[:2].tolist() == [2.0**-127, 2.0**127]
    assert bool(values[2].isnan())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("int5", None, True), "weight type is 'int5'; expected one of int8, int4, fp8, mxfp4"),
        (("int4", 16, True), "group_size is 16; int4 has 32, 64 or 128"),
        (("int8", 128, True), "group_size is 128; int8 has 0"),
        (("mxfp4", None, False), "symmetric is False; mxfp4 has no zero points"),
    ],
)
def test_formats_that_there_are_not_are_named(asked: tuple[str, int | None, bool], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WeightFormat.of(*asked)
