"""Models whose experts are quantised in memory: they compute what their numbers stand for, and stay models."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_ext
from moe_ext.models.blocks import expert_tensors, moe_blocks
from moe_ext.models.packed_experts import WeightFormat, packed_format
from tests.support.batches import padded_batches, random_tokens
from tests.support.families import FIELDS, build, keep_of, plan_for
from tests.support.packed import FORMATS, SIZES, arguments, same_state, thin_plan_for, with_floats

# Gated and not, biases, transposed, interleaved, a latent width of its own: one family each.
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"]


@pytest.fixture(params=list(FORMATS))
def form(request: pytest.FixtureRequest) -> WeightFormat:
    return FORMATS[request.param]


def quantised(family: str, form: WeightFormat, **sizes: Any) -> PreTrainedModel:
    return moe_ext.quantize(build(family, **{**SIZES, **sizes}), **arguments(form))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(random_tokens(2, 12)).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_its_numbers_stand_for(family: str, form: WeightFormat) -> None:
    model = quantised(family, form)
    expected = logits(with_floats(model, build(family, **SIZES)))
    scale = float(expected.abs().max())
    # float32 sums of up to 128 products in another order, through two layers.
    for got in (logits(model), logits(moe_ext.patch(model)), logits(moe_ext.unpatch(model))):
        assert float((got - expected).abs().max()) <= 2e-4 * scale


@pytest.mark.parametrize("width", [40, 72])
def test_groups_may_be_cut_short_by_the_end_of_a_row(form: WeightFormat, width: int) -> None:
    model = quantised("mixtral", form, intermediate_size=width, hidden_size=96)
    expected = logits(with_floats(model, build("mixtral", **{**SIZES, "intermediate_size": width, "hidden_size": 96})))
    assert float((logits(model) - expected).abs().max()) <= 2e-4 * float(expected.abs().max())


@pytest.mark.parametrize("family", [name for name in FIELDS if name not in ("jamba", "olmoe")])
def test_pruning_before_is_pruning_after(family: str) -> None:
    form = FORMATS["int4, zero points"]
    plan = plan_for(build(family, **SIZES), keep_of(build(family, **SIZES), family))
    after = moe_ext.prune(quantised(family, form), plan)
    before = moe_ext.quantize(moe_ext.prune(build(family, **SIZES), plan), **arguments(form))
    assert same_state(after, before)
    assert torch.equal(logits(after), logits(before))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("name", ["int4, groups of 32", "int4, zero points", "fp8, blocks", "mxfp4"])
def test_thinning_whole_groups_before_is_thinning_after(family: str, name: str) -> None:
    form, sizes = FORMATS[name], {**SIZES, "intermediate_size": 256}
    plan = thin_plan_for(build(family, **sizes), 128, form.group_size)
    after = moe_ext.prune(moe_ext.quantize(build(family, **sizes), **arguments(form)), plan)
    before = moe_ext.quantize(moe_ext.prune(build(family, **sizes), plan), **arguments(form))
    assert same_state(after, before)
    assert after.config.intermediate_size == 128
    assert torch.equal(logits(after), logits(before))


def test_thinning_with_a_scale_a_row_keeps_the_numbers() -> None:
    model = quantised("mixtral", FORMATS["int8"])
    plan = thin_plan_for(model, 40, 1)
    expected = logits(moe_ext.prune(with_floats(model, build("mixtral", **SIZES)), plan))
    got = logits(moe_ext.prune(model, plan))
    assert float((got - expected).abs().max()) <= 2e-4 * float(expected.abs().max())


def test_channels_that_tear_groups_are_refused_with_the_multiple() -> None:
    model = quantised("mixtral", FORMATS["int4, groups of 32"])
    before = copy.deepcopy(model)
    plan = thin_plan_for(model, 64, 16, seed=1)
    with pytest.raises(ValueError, match=r"keeps parts of blocks of 32 channels.*blocks=32"):
        moe_ext.prune(model, plan)
    assert same_state(model, before)


def test_calibration_sees_what_the_numbers_stand_for(form: WeightFormat) -> None:
    model = quantised("mixtral", form)
    plain = with_floats(model, build("mixtral", **SIZES))
    found, expected = (
        moe_ext.calibrate(each, padded_batches(), channels="energy", progress=False) for each in (model, plain)
    )
    torch.testing.assert_close(found.moments, expected.moments, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.channel_errors, expected.channel_errors, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.channel_norms, expected.channel_norms, rtol=1e-5, atol=0)
    searched = [moe_ext.search(each, padded_batches(), keep=3, progress=False).plan.keep for each in (model, plain)]
    assert searched[0] == searched[1]


def test_a_model_keeps_its_scales_when_it_is_cast_copied_and_pickled() -> None:
    for form in FORMATS.values():
        model = quantised("mixtral", form)
        expected = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), expected)
        assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
        packed = {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}
        cast = copy.deepcopy(model).to(torch.bfloat16)
        assert cast.dtype == torch.bfloat16
        assert all(torch.equal(tensor, cast.state_dict()[name]) for name, tensor in packed.items())
        assert bool(logits(cast).isfinite().all())
        assert torch.equal(logits(model), expected)


def test_only_routed_experts_change() -> None:
    model, before = build("qwen2_moe", **SIZES), build("qwen2_moe", **SIZES)
    moe_ext.quantize(model, "int8")
    inside = tuple(f"{block.name}.experts." for block in moe_blocks(model))
    others = {name for name in before.state_dict() if not name.startswith(inside)}
    assert all(torch.equal(model.state_dict()[name], before.state_dict()[name]) for name in others)
    assert not [name for name, _ in model.named_parameters() if name.startswith(inside)]
    biased = moe_ext.quantize(build("gpt_oss", **SIZES), "mxfp4")
    kept = {name for name, _ in moe_blocks(biased)[0].experts.named_parameters()}
    assert kept == {"gate_up_proj_bias", "down_proj_bias"}


def test_what_is_not_possible_is_refused_and_changes_nothing() -> None:
    model = build("mixtral", **SIZES)
    expert_tensors(moe_blocks(model)[1])["down_proj"].data[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: down_proj holds numbers that are not finite"):
        moe_ext.quantize(model, "int8")
    assert packed_format(moe_blocks(model)[0].experts) is None
    for asked, said in ((("int3",), "weight type is 'int3'"), (("int4", 48), "group_size is 48")):
        with pytest.raises(ValueError, match=said):
            moe_ext.quantize(model, asked[0], group_size=asked[1] if len(asked) > 1 else None)
    model = quantised("mixtral", FORMATS["int8"])
    before = copy.deepcopy(model)
    plan = plan_for(model, keep_of(model, "mixtral"))
    jobs: dict[str, Any] = {
        "quantise": lambda: moe_ext.quantize(model, "int4"),
        "score": lambda: moe_ext.aimer(model),
        "refit": lambda: moe_ext.prune(model, plan, refit=padded_batches()),
    }
    for job, run in jobs.items():
        with pytest.raises(ValueError, match=rf"its experts are quantised \(int8\); {job} the model with float"):
            run()
    with pytest.raises(NotImplementedError, match="gradients are required"):
        model(random_tokens(1, 4))
    assert same_state(model, before)


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("fp8")])
def test_activations_in_eight_bits_are_near_and_patching_again_leaves_them_as_they_are(name: str) -> None:
    model = moe_ext.patch(quantised("mixtral", FORMATS[name]))
    expected = logits(model)
    moe_ext.patch(model, activations="int8")
    got = logits(model)
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.05
    copied = logits(copy.deepcopy(model))
    assert torch.equal(copied, got)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(random_tokens(2, 12)).logits
    torch.testing.assert_close(compiled, got, rtol=1e-2, atol=1e-3)
    assert torch.equal(logits(moe_ext.patch(model)), expected)


def test_activations_in_eight_bits_are_refused_where_no_kernel_takes_them() -> None:
    for model, held in (
        (build("mixtral", **SIZES), "float weights"),
        (quantised("mixtral", WeightFormat.of("fp8")), "fp8 weights"),
    ):
        with pytest.raises(ValueError, match=rf"activations is 'int8', and model\.layers\.0\.mlp has {held}: quantise"):
            moe_ext.patch(model, activations="int8")
        assert not hasattr(moe_blocks(model)[0].experts, "_moe_ext")
    with pytest.raises(ValueError, match="activations is 'int4'; expected 'int8' or None"):
        moe_ext.patch(quantised("mixtral", FORMATS["int8"]), activations="int4")  # type: ignore[arg-type]


def test_generation_runs_compiled_and_without_gradients() -> None:
    model = quantised("mixtral", FORMATS["int4, groups of 32"], num_hidden_layers=1).eval()
    tokens = random_tokens(1, 6)
    eager = model.generate(tokens, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        expected = model(tokens).logits
        got = torch.compile(moe_ext.patch(model), fullgraph=True, backend="eager")(tokens).logits
    assert eager.shape == (1, 10)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
