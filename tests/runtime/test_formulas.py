"""What experts compute is found by their numbers, and families whose experts are not the usual run on the operators."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_ext
from moe_ext import ops
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.boundary import eager_forward, is_experts
from moe_ext.runtime.formulas import ExpertsLayer, Formula, experts_layer, find_formula, formula_of
from moe_ext.runtime.patching import is_patched, layer_state
from moe_ext.runtime.supported import check_experts
from tests.support import every_family
from tests.support.families import build
from tests.support.operators import FORMULAS
from tests.support.reference import DEVICES, experts_case, experts_reference

CLAMPED = Formula(limit=10.0)
GPT_OSS = Formula(limit=7.0, alpha=1.702, up_offset=1.0)
CAPPED = Formula(gate_cap=4.0, up_cap=25.0)
UNUSUAL = {
    "aria": Formula(transposed=True),
    "deepseek_v4": CLAMPED,
    "gemma4": Formula("gelu_tanh"),
    "glm5_next": CLAMPED,
    "gpt_oss": Formula(limit=7.0, alpha=1.702, up_offset=1.0, interleaved=True, transposed=True),
    "hy_v4": CLAMPED,
    "inkling2": CAPPED,
    "lfm2_moe": Formula(),
    "minimax_m3_vl": GPT_OSS,
    "nemotron_h": Formula("relu2", gated=False),
    "openai_privacy_filter": Formula(limit=7.0, alpha=1.702, up_offset=1.0, transposed=True),
}


def experts_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_experts(module)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", UNUSUAL)
def test_experts_of_unusual_families_equal_transformers_eager(name: str, device: str) -> None:
    module = experts_modules(every_family.build(name))[0].to(device)
    assert formula_of(module) == UNUSUAL[name]
    layer = experts_layer(module)
    count, hidden = len(layer.down), layer.outputs(0).shape[0]
    generator = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(33, hidden, generator=generator)).to(device)
    experts = torch.rand(33, count, generator=generator).argsort(1)[:, :2].to(device)
    weights = torch.rand(33, 2, generator=generator).to(device)
    with torch.no_grad():
        expected = eager_forward(module)(module, x, experts, weights)
        got = ops.experts(x, layer.gate_up, layer.down, experts, weights, layer.activation, **layer.options())
    # The same float32 products in another order, h up to a few hundred where relu2 squares.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_found_by_its_numbers_alone(name: str) -> None:
    case = experts_case(5, 2, 1, 16, 12, **FORMULAS[name])
    options = {key: value for key, value in case.options.items() if not key.endswith("_bias")}
    wanted = Formula(case.activation, **options)
    module = nn.Module()
    module.has_gate, module.is_transposed = wanted.gated, wanted.transposed  # type: ignore[assignment]
    setattr(module, "_apply_gate" if wanted.gated else "act_fn", wanted.between)
    assert find_formula(module) == wanted
    # ...and computes what the brute force does.
    layer = ExpertsLayer(wanted, case.gate_up, case.down, case.options.get("gate_up_bias"))
    expected = experts_reference(case)
    energy = torch.zeros_like(expected.channels)
    for token in range(5):
        expert = int(case.experts[token, 0])
        energy[expert] += (float(case.weights[token, 0]) * layer.hidden(expert, case.x[token : token + 1])[0]) ** 2
    torch.testing.assert_close(energy, expected.channels, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "gate",
    [
        lambda rows: rows.chunk(2, -1)[0].relu() * rows.chunk(2, -1)[1],
        lambda rows: rows.chunk(2, -1)[0].sigmoid() * rows.chunk(2, -1)[1],
        lambda rows: torch.nn.functional.silu(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1].clamp(-50, 60),
        lambda rows: rows.chunk(2, -1)[0] * 0,
        lambda rows: rows,
    ],
    ids=["relu", "sigmoid", "an uneven limit", "nothing", "no gate"],
)
def test_a_formula_that_is_not_known_is_refused(gate: Any) -> None:
    module = nn.Module()
    module.act_fn = nn.ReLU()
    module._apply_gate = gate
    with pytest.raises(ValueError, match=r"its gating function \(activation ReLU\) gives the numbers of no formula"):
        find_formula(module)


def test_a_gate_that_fails_is_refused_with_what_it_said() -> None:
    module = nn.Module()

    def gate(rows: Tensor) -> Tensor:
        raise OSError("no kernel")

    module._apply_gate = gate  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"cannot be evaluated on rows of numbers \(OSError: no kernel\)"):
        find_formula(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt_oss", "lfm2_moe", "nemotron_h", "deepseek_v4"])
def test_a_patched_model_equals_the_unpatched_one(name: str, dtype: torch.dtype) -> None:
    model = every_family.build(name, dtype=dtype)
    text = every_family.inputs(model, seed=3)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(**text, use_cache=False).logits.float()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = moe_ext.patch(model)(**text, use_cache=False).logits.float()
    assert not any(layer_state(block).stock for block in moe_blocks(model))
    if dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    else:  # a token near a tie may take other experts: most agree
        error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(error.median()) < 0.05


def test_a_norm_after_each_expert_is_refused_with_the_reason() -> None:
    module = experts_modules(every_family.build("muse_spark"))[0]
    with pytest.raises(ValueError, match="a layer: MuseSparkExperts has a norm after each expert, which moe_ext does"):
        check_experts("a layer", module)


def test_a_formula_is_looked_for_once_and_leaves_with_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("gpt_oss"), torch.arange(5)[None]
    before = [dict(vars(block.experts)) for block in moe_blocks(model)]
    looked: list[nn.Module] = []

    def counted(module: nn.Module) -> Formula:
        looked.append(module)
        return find_formula(module)

    monkeypatch.setattr("moe_ext.runtime.formulas.find_formula", counted)
    moe_ext.patch(model)
    with torch.no_grad():
        model(tokens), model(tokens)
    assert not looked
    moe_ext.unpatch(model)
    assert not is_patched(model)
    assert [dict(vars(block.experts)) for block in moe_blocks(model)] == before
    model.set_experts_implementation("moe_ext")
    with torch.no_grad():
        model(tokens), model(tokens)
    assert len(looked) == len(before)
