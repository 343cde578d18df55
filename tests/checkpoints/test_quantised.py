"""Quantised folders are pruned, thinned and calibrated as what they stand for, and no number in them is computed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import Mxfp4Config

import moe_ext
from moe_ext.checkpoints.stored_tensors import CheckpointError
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.decision.checkpoint_size import checkpoint_size
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.expert_width import width_of
from tests.support.batches import padded_batches
from tests.support.checkpoints import declare_float8, quantise, rewritten, tensors_in
from tests.support.families import build, keep_of, plan_for
from tests.support.quantised import FORMS, Form, modules, plain_copy, plain_tensors, write

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}
KEEP = ((0, 2, 3), (1, 2, 3))


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def whole_blocks(model: transformers.PreTrainedModel, width: int, block: int, seed: int = 0) -> KeptChannels:
    """Random blocks of channels for every expert that a model has."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for each in moe_blocks(model):
        order = torch.rand(each.num_experts, width_of(each) // block, generator=generator).argsort(1)
        first = order[:, : width // block].sort(1).values * block
        kept.append((first[..., None] + torch.arange(block)).flatten(1))
    return KeptChannels.of(kept, width_of(moe_blocks(model)[0]))


@pytest.fixture(params=list(FORMS))
def quantised(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Form, Path]:
    """A Mixtral folder in the Hub's layout, its experts quantised."""
    form = FORMS[request.param]()
    build("mixtral", dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path / "source")
    write(form, tmp_path / "source")
    return form, tmp_path / "source"


def plan_of(model: transformers.PreTrainedModel) -> PruningPlan:
    return plan_for(model, KEEP)


def test_experts_go_byte_by_byte(quantised: tuple[Form, Path], tmp_path: Path) -> None:
    form, source = quantised
    held = tensors_in(source)
    plan = plan_of(build("mixtral", **SIZES))
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    got = tensors_in(tmp_path / "got")
    before, after = modules(held), modules(got)
    assert len(after) == 3 * sum(map(len, KEEP))
    for module, tensors in after.items():
        layer, place = (int(number) for number in re.findall(r"\.(\d+)\.", module))
        source_module = module.replace(f"experts.{place}.", f"experts.{KEEP[layer][place]}.")
        assert {key: bits(value) for key, value in tensors.items()} == {
            key: bits(value) for key, value in before[source_module].items()
        }
    for name in form.beside:
        assert bits(got[name]) == bits(held[name])
    assert json.loads((tmp_path / "got" / "config.json").read_text())["quantization_config"] == form.declared
    # The rest is that of the same model, not quantised.
    plain_copy(form, source, tmp_path / "plain")
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    moe_ext.prune(model, plan).save_pretrained(tmp_path / "expected")
    values, expected = plain_tensors(form, got), tensors_in(tmp_path / "expected")
    assert values.keys() == expected.keys()
    assert [name for name in values if not torch.equal(values[name], expected[name])] == []


def test_channels_go_with_their_blocks(quantised: tuple[Form, Path], tmp_path: Path) -> None:
    form, source = quantised
    model = build("mixtral", **SIZES)
    plan = plan_of(model)
    block = max(form.block, 1)
    fewer = moe_ext.prune(build("mixtral", **SIZES), plan)
    plan = replace(plan, channels=whole_blocks(fewer, 32, block))
    if form.block == 0:
        with pytest.raises(ValueError, match=r"plan: model\.layers\.0\..*: bitsandbytes' blocks run from row to row"):
            moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
        assert not (tmp_path / "got").exists()
        return
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    plain_copy(form, source, tmp_path / "plain")
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    moe_ext.prune(loaded, plan).save_pretrained(tmp_path / "expected")
    values, expected = plain_tensors(form, tensors_in(tmp_path / "got")), tensors_in(tmp_path / "expected")
    assert values.keys() == expected.keys()
    assert [name for name in values if not torch.equal(values[name], expected[name])] == []
    config = json.loads((tmp_path / "got" / "config.json").read_text())
    assert config["intermediate_size"] == 32
    if block > 1:
        torn = replace(plan, channels=KeptChannels.of([torch.arange(1, 33).repeat(3, 1)] * 2, 64))
        with pytest.raises(ValueError, match=rf"layers\.0\.mlp, expert 0: keeps parts of blocks of .*blocks={block}\)"):
            moe_ext.prune_checkpoint(source, torn, tmp_path / "torn", progress=False)


def test_statistics_are_those_of_what_the_weights_stand_for(quantised: tuple[Form, Path], tmp_path: Path) -> None:
    form, source = quantised
    plain_copy(form, source, tmp_path / "plain")
    options: dict[str, Any] = {"progress": False, "outputs": True}
    expected = moe_ext.calibrate(tmp_path / "plain", padded_batches(), **options)
    got = moe_ext.calibrate(source, padded_batches(), **options)
    assert torch.equal(got.coactivation, expected.coactivation)
    torch.testing.assert_close(got.moments, expected.moments, rtol=1e-3, atol=0)  # memory may be aligned otherwise


def test_the_size_of_a_thinner_result_is_known_before(quantised: tuple[Form, Path], tmp_path: Path) -> None:
    form, source = quantised
    model = build("mixtral", **SIZES)
    plan = plan_of(model)
    size = checkpoint_size(source, plan.keep)
    assert moe_ext.prune_checkpoint(source, plan, tmp_path / "fewer", progress=False).weight_bytes == size.at(64)
    if form.block:
        assert size.block % form.block == 0
        plan = replace(plan, channels=whole_blocks(moe_ext.prune(model, plan), 32, max(form.block, 1)))
        assert moe_ext.prune_checkpoint(source, plan, tmp_path / "thin", progress=False).weight_bytes == size.at(32)


def test_a_search_runs_on_a_quantised_folder(tmp_path: Path) -> None:
    form = FORMS["compressed-tensors, 4 bits"]()
    build("mixtral", dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path / "source")
    write(form, tmp_path / "source")
    plain_copy(form, tmp_path / "source", tmp_path / "plain")
    got, expected = (
        moe_ext.search(tmp_path / name, padded_batches(), keep=2, progress=False) for name in ("source", "plain")
    )
    assert got.plan.keep == expected.plan.keep


@pytest.fixture
def gpt_oss(tmp_path: Path) -> tuple[Path, PruningPlan]:
    """A gpt-oss folder as it is published: random four-bit blocks, and exponents near those of its weights."""
    model = build("gpt_oss", dtype=torch.bfloat16, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "source")
    generator = torch.Generator().manual_seed(0)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            sizes = (experts, rows, columns // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*sizes, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(122, 126, sizes, generator=generator, dtype=torch.uint8)

    rewritten(tmp_path / "source", edit)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    return tmp_path / "source", plan_for(model, keep_of(model, "gpt_oss"))


def dequantised_by_transformers(folder: Path) -> transformers.PreTrainedModel:
    return transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()


@pytest.mark.parametrize("thin", [False, True])
def test_mxfp4_experts_and_their_channels_go_byte_by_byte(
    thin: bool, gpt_oss: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = gpt_oss
    expected = dequantised_by_transformers(source)
    if thin:
        fewer = moe_ext.prune(dequantised_by_transformers(source), plan)
        plan = replace(plan, channels=whole_blocks(fewer, 32, 32))
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    held, got = tensors_in(source), tensors_in(tmp_path / "got")
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: tensor.dtype for name, tensor in held.items()}
    if not thin:
        for layer, kept in enumerate(plan.keep):
            for name in [name for name in got if f"layers.{layer}.mlp." in name]:
                assert bits(got[name]) == bits(held[name][list(kept)])
    values = dequantised_by_transformers(tmp_path / "got").state_dict()
    expected_values = moe_ext.prune(expected, plan).state_dict()
    assert values.keys() == expected_values.keys()
    assert [name for name in values if not torch.equal(values[name], expected_values[name])] == []


def test_layers_of_mxfp4_are_those_of_transformers_dequantised_model(gpt_oss: tuple[Path, PruningPlan]) -> None:
    source, _ = gpt_oss
    expected = dequantised_by_transformers(source)
    with LayersOnDisk(source) as layers:
        for layer, reference in enumerate(expected.model.layers):
            layers.need(layer)
            held, wanted = layers.model.model.layers[layer].state_dict(), reference.state_dict()
            assert held.keys() == wanted.keys()
            assert [name for name in held if not torch.equal(held[name], wanted[name])] == []


def test_statistics_of_mxfp4_are_those_of_transformers_dequantised_model(gpt_oss: tuple[Path, PruningPlan]) -> None:
    source, _ = gpt_oss
    got = moe_ext.calibrate(source, padded_batches(), progress=False)
    expected = moe_ext.calibrate(dequantised_by_transformers(source), padded_batches(), progress=False)
    assert torch.equal(got.coactivation, expected.coactivation)
    torch.testing.assert_close(got.moments, expected.moments, rtol=1e-3, atol=0)  # memory may be aligned otherwise


def declare(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, PruningPlan]:
    model = build("mixtral", dtype=torch.bfloat16, **SIZES)
    model.save_pretrained(tmp_path / "source")
    write(FORMS["compressed-tensors, 4 bits"](), tmp_path / "source")
    return tmp_path / "source", plan_of(model)


def test_names_of_experts_in_the_config_are_renumbered(packed: tuple[Path, PruningPlan], tmp_path: Path) -> None:
    source, plan = packed
    module = "model.layers.1.block_sparse_moe"
    declare(
        source,
        ignore=["lm_head", f"{module}.gate", f"{module}.experts.0.w1", f"{module}.experts.3.w2", "re:.*self_attn.*"],
        dynamic={f"{module}.experts.2": {"bits": 8}, f"{module}.experts.0": {"bits": 8}},
    )
    declared = json.dumps({"quantization": {"exclude_modules": ["lm_head", f"{module}.experts.1.w3"]}})
    (source / "hf_quant_config.json").write_text(declared)
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)  # layer 1 keeps 1, 2 and 3
    content = json.loads((tmp_path / "got" / "config.json").read_text())["quantization_config"]
    assert content["ignore"] == ["lm_head", f"{module}.gate", f"{module}.experts.2.w2", "re:.*self_attn.*"]
    assert content["dynamic"] == {f"{module}.experts.1": {"bits": 8}}
    further = json.loads((tmp_path / "got" / "hf_quant_config.json").read_text())
    assert further == {"quantization": {"exclude_modules": ["lm_head", f"{module}.experts.0.w3"]}}


@pytest.mark.parametrize("name", [r"re:.*experts\.3\..*", "model.layers.*.block_sparse_moe.experts.3", "experts.3"])
def test_patterns_that_number_experts_are_refused(name: str, packed: tuple[Path, PruningPlan], tmp_path: Path) -> None:
    source, plan = packed
    declare(source, ignore=["lm_head", name])
    with pytest.raises(ValueError, match=r"quantization_config names .*, and the experts would be renumbered"):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1."


def rename(old: str, new: str) -> Any:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda tensors: tensors.pop(f"{EXPERT}weight_scale"),
            ValueError,
            r"w1.weight_packed is quantised.*no .*_scale",
        ),
        (
            lambda tensors: tensors.pop(f"{EXPERT}weight_packed"),
            CheckpointError,
            r"parts that do not fit together: 1 tensors, model.layers.0.*gate_up_proj",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERT}weight_scale": torch.ones(64, 3)}),
            CheckpointError,
            r"w1\.weight_scale' has shape \(64, 3\), which is none of scales of \(64, 64\) weights",
        ),
        (
            rename(f"{EXPERT}weight_shape", f"{EXPERT}weight_bitmask"),
            ValueError,
            r"w1.weight_bitmask' is none of the tensors that compressed-tensors is known to hold of an expert",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERT}weight": torch.ones(64, 64)}),
            CheckpointError,
            r"holds .*w1.weight both as it is and quantised",
        ),
    ],
)
def test_quantised_folders_that_are_not_whole_are_refused_by_tensor(
    edit: Any, error: type[Exception], message: str, packed: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = packed
    rewritten(source, edit)
    with pytest.raises(error, match=message):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_further_scales_of_what_is_no_routed_expert_stay(tmp_path: Path) -> None:
    model = build("deepseek_v3", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    further = {
        "model.layers.1.mlp.shared_experts.up_proj.output_scale": torch.tensor(0.5),
        "model.layers.2.self_attn.kv_scale": torch.ones(2),
    }
    rewritten(tmp_path / "source", lambda tensors: quantise(tensors, 4))
    rewritten(tmp_path / "source", lambda tensors: tensors.update(further))
    declare_float8(tmp_path / "source", 4)
    plan = plan_for(model, keep_of(model, "deepseek_v3"))
    moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", progress=False)
    got = tensors_in(tmp_path / "got")
    assert {name: bits(got[name]) for name in further} == {name: bits(tensor) for name, tensor in further.items()}


def test_names_in_layers_for_multi_token_prediction_go_with_the_last_layer(tmp_path: Path) -> None:
    model = build("deepseek_v3", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    mtp = "model.layers.3.mlp.experts"
    further = {f"{mtp}.{expert}.up_proj.weight": torch.full((24, 32), expert).bfloat16() for expert in range(12)}
    rewritten(tmp_path / "source", lambda tensors: quantise(tensors, 4))
    rewritten(tmp_path / "source", lambda tensors: tensors.update(further))
    declare_float8(tmp_path / "source", 4)
    plan = plan_for(model, keep_of(model, "deepseek_v3"))
    kept, gone = plan.keep[-1][1], plan.removed(len(plan.keep) - 1)[0]
    declare(tmp_path / "source", modules_to_not_convert=[f"{mtp}.{kept}.up_proj", f"{mtp}.{gone}.up_proj", "lm_head"])
    moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", progress=False)
    content = json.loads((tmp_path / "got" / "config.json").read_text())["quantization_config"]
    assert content["modules_to_not_convert"] == [f"{mtp}.1.up_proj", "lm_head"]


def test_columns_in_another_order_keep_their_channels(tmp_path: Path) -> None:
    """GPTQ's act-order: whole experts go, channels do not."""
    model = build("mixtral", dtype=torch.bfloat16, **SIZES)
    model.save_pretrained(tmp_path / "source")
    write(FORMS["GPTQ, 4 bits"](), tmp_path / "source")

    def shuffle(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            tensors[name] = tensors[name].flip(0).contiguous()

    rewritten(tmp_path / "source", shuffle)
    plan = plan_of(model)
    moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "fewer", progress=False)
    thinner = replace(plan, channels=whole_blocks(moe_ext.prune(model, plan), 32, 32))
    with pytest.raises(ValueError, match=r"w2\.g_idx: the columns are quantised in another order than their own"):
        moe_ext.prune_checkpoint(tmp_path / "source", thinner, tmp_path / "got", progress=False)


def test_numbers_that_lie_across_words_go_by_expert_only(tmp_path: Path) -> None:
    model = build("mixtral", dtype=torch.bfloat16, **SIZES)
    model.save_pretrained(tmp_path / "source")
    write(FORMS["compressed-tensors, 4 bits"](), tmp_path / "source")
    generator = torch.Generator().manual_seed(0)

    def to_three_bits(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_packed")]:
            tensors[name] = torch.randint(-(2**31), 2**31, (64, 6), generator=generator, dtype=torch.int32)

    rewritten(tmp_path / "source", to_three_bits)
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3, "type": "int", "group_size": 32}}}
    declare(tmp_path / "source", config_groups=groups)
    plan = plan_of(model)
    moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", progress=False)
    held, got = tensors_in(tmp_path / "source"), tensors_in(tmp_path / "got")
    module = "model.layers.1.block_sparse_moe.experts"
    assert bits(got[f"{module}.0.w2.weight_packed"]) == bits(held[f"{module}.1.w2.weight_packed"])
    thinner = replace(plan, channels=whole_blocks(moe_ext.prune(model, plan), 32, 32))
    with pytest.raises(ValueError, match=r"w1\.weight: numbers of 3 bits lie across words: its channels stay"):
        moe_ext.prune_checkpoint(tmp_path / "source", thinner, tmp_path / "thin", progress=False)
    with pytest.raises(ValueError, match="has 3 bits a number, packed across words: it is pruned, but not"):
        moe_ext.calibrate(tmp_path / "source", padded_batches(), progress=False)


def test_modelopt_may_say_how_it_quantised_in_a_file_of_its_own(tmp_path: Path) -> None:
    model = build("mixtral", dtype=torch.bfloat16, **SIZES)
    model.save_pretrained(tmp_path / "source")
    write(form := FORMS["ModelOpt, NVFP4"](), tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    declared = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
    }
    del config["quantization_config"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    (tmp_path / "source" / "hf_quant_config.json").write_text(json.dumps(declared))
    moe_ext.prune_checkpoint(tmp_path / "source", plan_of(model), tmp_path / "got", progress=False)
    assert len(modules(tensors_in(tmp_path / "got"))) == 3 * sum(map(len, KEEP))
    assert json.loads((tmp_path / "got" / "hf_quant_config.json").read_text()) == declared
    assert "quantization_config" not in json.loads((tmp_path / "got" / "config.json").read_text())
    assert form.beside.keys() <= tensors_in(tmp_path / "got").keys()


def test_the_refit_wants_weights_that_are_not_quantised(packed: tuple[Path, PruningPlan], tmp_path: Path) -> None:
    source, plan = packed
    with pytest.raises(ValueError, match=r"refit: .* holds compressed-tensors weights, which are not fitted"):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", refit=padded_batches(), progress=False)


def test_experts_in_one_tensor_with_their_scales_are_pruned(tmp_path: Path) -> None:
    """Float8 with a scale an expert, a row, or all: slices where the experts have scales of their own."""
    model = build("mixtral", dtype=torch.bfloat16, **SIZES)
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    generator = torch.Generator().manual_seed(0)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            rows = tensors[name].shape[1]
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            sizes = (4, rows, 1) if name.endswith("gate_up_proj") else (4,)
            tensors[f"{name}_scale"] = torch.rand(sizes, generator=generator) + 0.5
            tensors[f"{name}_input_scale"] = torch.tensor(0.5)

    rewritten(tmp_path / "source", edit)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    moe_ext.prune_checkpoint(tmp_path / "source", plan_of(model), tmp_path / "got", progress=False)
    held, got = tensors_in(tmp_path / "source"), tensors_in(tmp_path / "got")
    assert got.keys() == held.keys()
    for name, tensor in got.items():
        counts = ".mlp." in name and held[name].dim() > 0
        kept = KEEP[int(name.split(".")[2])] if counts else ()
        expected = torch.stack([held[name][expert] for expert in kept]) if counts else held[name]
        assert bits(tensor) == bits(expected), name


def test_a_tensor_that_says_it_is_scales_and_is_not_is_refused(tmp_path: Path) -> None:
    model = build("mixtral", dtype=torch.bfloat16, **SIZES)
    model.save_pretrained(tmp_path / "source")
    write(FORMS["float8, a scale a tensor"](), tmp_path / "source")
    tensors = tensors_in(tmp_path / "source")
    tensors[f"{EXPERT}weight_scale"] = torch.tensor(1)
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"w1.weight_scale is torch.int64; expected floating point numbers"):
        moe_ext.prune_checkpoint(tmp_path / "source", plan_of(model), tmp_path / "got", progress=False)
