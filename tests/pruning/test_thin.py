"""Experts with fewer channels: equal to the model whose channels were put to zero, and stock once it is saved."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moe_ext
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.models.blocks import expert_tensors, moe_blocks, text_config
from moe_ext.models.expert_width import SHARED_FIELDS, width_of
from moe_ext.models.families import FURTHER_LAYERS_FIELDS
from moe_ext.pruning import shard_writer
from moe_ext.pruning.prune import prune
from moe_ext.runtime.patching import patch
from tests.support.checkpoints import declare_float8, dequantised, plain_copy, quantise, rewritten, tensors_in
from tests.support.command_line import inside
from tests.support.families import (
    ALL,
    HALVES,
    STOCK_ONLY,
    build,
    channels_for,
    keep_of,
    logits_of,
    plan_for,
    reloaded,
)

TOKENS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
NOT_THIN = {"jamba": "other layers read intermediate_size"}  # its dense layers


def thin(model: transformers.PreTrainedModel, channels: KeptChannels) -> None:
    keep = tuple(tuple(range(block.num_experts)) for block in moe_blocks(model))
    plan = plan_for(model, keep)
    prune(model, replace(plan, channels=channels))


def silence(model: transformers.PreTrainedModel, channels: KeptChannels) -> None:
    """The same by definition: what is removed adds nothing."""
    for layer, block in enumerate(moe_blocks(model)):
        removed = torch.ones(block.num_experts, channels.intermediate_size, dtype=torch.bool)
        removed.scatter_(1, channels.indices(layer), False)
        down = expert_tensors(block)["down_proj"].data
        down.masked_fill_(
            removed[:, :, None] if getattr(block.experts, "is_transposed", False) else removed[:, None], 0
        )


@pytest.mark.parametrize("family", [name for name in ALL if name not in NOT_THIN])
def test_a_thinned_model_is_the_one_whose_channels_are_silent_and_reloads_stock(family: str, tmp_path: Path) -> None:
    model, reference = build(family), build(family)
    before = text_config(model).to_dict()
    width = 12 if family in HALVES else 16  # stock grouped_mm takes rows of whole 16 bytes
    channels = channels_for(model, width)
    thin(model, channels)
    silence(reference, channels)
    expected = logits_of(reference, TOKENS)
    torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(expected, logits_of(build(family), TOKENS))
    after = text_config(model).to_dict()
    fields = {name for name in before if before[name] != after[name]}
    assert fields <= {"intermediate_size", "moe_intermediate_size", *SHARED_FIELDS, *FURTHER_LAYERS_FIELDS}
    model.save_pretrained(tmp_path / "thin")
    again = reloaded(type(model).from_pretrained, tmp_path / "thin", dtype="auto")
    assert torch.equal(logits_of(again, TOKENS), logits_of(model, TOKENS))
    if family not in STOCK_ONLY:
        patched = logits_of(patch(again), TOKENS)
        torch.testing.assert_close(patched, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", NOT_THIN)
def test_a_family_whose_dense_layers_share_the_field_is_refused(family: str) -> None:
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=NOT_THIN[family]):
        thin(model, channels_for(model, 12))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shared_experts_that_could_not_stay_as_wide_are_no_reason_to_change_them() -> None:
    model = build("deepseek_v3")
    with pytest.raises(ValueError, match="other layers read moe_intermediate_size"):
        thin(model, channels_for(model, 15))
    assert text_config(model).moe_intermediate_size == 24


@pytest.mark.parametrize("fewer", [0, 1])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_go_first_and_then_channels_of_those_that_are_left(family: str, fewer: int, tmp_path: Path) -> None:
    model, reference = build(family), build(family)
    keep = keep_of(model, family, fewer=fewer if family == "mixtral" else 0)
    plan = plan_for(model, keep)
    prune(reference, plan)
    channels = channels_for(reference, 12 if family in HALVES else 16)
    prune(model, replace(plan, channels=channels))
    silence(reference, channels)
    torch.testing.assert_close(logits_of(model, TOKENS), logits_of(reference, TOKENS), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "thin")
    again = reloaded(moe_ext.from_pretrained, tmp_path / "thin", dtype="auto")
    assert torch.equal(logits_of(again, TOKENS), logits_of(model, TOKENS))


def changed(**changes: Any) -> KeptChannels:
    made = {"layers": 3, "experts": 8, "channels": 24, "widths": (12, 12, 12), **changes}
    kept = [torch.arange(made["widths"][layer]).expand(made["experts"], -1) for layer in range(made["layers"])]
    return KeptChannels.of(kept, made["channels"])


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (changed(channels=25), "channels: are of experts with 25 channels; model.layers.0.mlp has 24"),
        (changed(widths=(12, 11, 12)), "channels: layers keep 11 to 12 channels; expected one width"),
    ],
)
def test_channels_of_another_model_are_refused(channels: KeptChannels, message: str) -> None:
    model = build("mixtral")
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        thin(model, channels)
    assert all(
        tensor is before[name] or torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()
    )


def with_masks(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda plan: change(plan["channels"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            with_masks(lambda channels: channels["kept"][1].__setitem__(2, "fff800")),
            "channels: layer 1, kept expert 2: keeps 13 channels; expected as many as the layer's first expert, 12",
        ),
        (
            with_masks(lambda channels: channels["kept"].__setitem__(1, ["ffe000"] * 8)),
            "channels: layers keep 11 to 12 channels; expected one width",
        ),
        (
            with_masks(lambda channels: channels["kept"][0].__setitem__(3, "fff00000")),
            "channels: layer 0, kept expert 3: has 4 bytes; expected 3",
        ),
        (
            with_masks(lambda channels: channels.update(intermediate_size=20)),
            "channels: are of experts with 20 channels; model.layers.0.mlp has 24",
        ),
        (
            with_masks(lambda channels: channels.update(intermediate_size=18, kept=[["fff020"] * 8] * 3)),
            "channels: layer 0, kept expert 0: keeps a channel beyond the 18 that there are",
        ),
        (with_masks(lambda channels: channels["kept"][2].__setitem__(0, "000000")), "keeps 0 channels"),
        (with_masks(lambda channels: channels["kept"].pop()), "channels: expected those of every expert that is kept"),
        (lambda plan: plan["keep"][1].pop(), "channels: expected those of every expert that is kept"),
    ],
)
def test_a_plan_file_with_wrong_channels_is_refused_and_nothing_written(
    edit: Callable[[dict[str, Any]], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "source")
    keep = tuple(tuple(range(block.num_experts)) for block in moe_blocks(model))
    plan = json.loads(replace(plan_for(model, keep), channels=changed()).to_json())
    edit(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    source, file, out = (str(tmp_path / name) for name in ("source", "plan.json", "thin"))
    assert inside("prune", source, file, "--out", out) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("family", "layout", "dtype"),
    [
        *((name, layout, torch.bfloat16) for name in ALL if name not in NOT_THIN for layout in ("hub", "fused")),
        *((name, layout, torch.float32) for name in ("mixtral", "gpt_oss") for layout in ("hub", "fused")),
    ],
)
def test_a_folder_is_thinned_byte_by_byte_as_the_model_in_memory(
    family: str, layout: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "_WINDOW", 700)  # a few rows
    model = build(family, dtype=torch.bfloat16)
    plan = plan_for(model, keep_of(model, family))
    model.save_pretrained(tmp_path / "source", save_original_format=layout == "hub")
    loaded = type(model).from_pretrained(tmp_path / "source", dtype=dtype)
    fewer = prune(type(model).from_pretrained(tmp_path / "source", dtype=dtype), plan)
    plan = replace(plan, channels=channels_for(fewer, 12 if family in HALVES else 16))
    prune(loaded, plan).save_pretrained(tmp_path / "expected", save_original_format=layout == "hub")
    wanted = str(dtype).removeprefix("torch.")
    moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", dtype=wanted, progress=False)
    got, expected = tensors_in(tmp_path / "got"), tensors_in(tmp_path / "expected")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].dtype == tensor.dtype, name
    again = reloaded(type(model).from_pretrained, tmp_path / "got", dtype="auto")
    if dtype == torch.float32:
        assert torch.equal(logits_of(again, TOKENS), logits_of(loaded, TOKENS))


def float8_folder(family: str, layout: str, folder: Path, block: int) -> transformers.PreTrainedModel:
    model = build(family, dtype=torch.bfloat16)
    model.save_pretrained(folder, save_original_format=layout == "hub")
    rewritten(folder, lambda tensors: quantise(tensors, block))
    declare_float8(folder, block)
    return model


def blocks_for(model: transformers.PreTrainedModel, width: int, block: int) -> KeptChannels:
    """Random whole blocks of channels."""
    kept = []
    for block_of_layer in moe_blocks(model):
        order = torch.rand(block_of_layer.num_experts, width_of(block_of_layer) // block).argsort(1)
        chosen = order[:, : width // block].sort(1).values
        kept.append((chosen[:, :, None] * block + torch.arange(block)).flatten(1))
    return KeptChannels.of(kept, width_of(moe_blocks(model)[0]))


@pytest.mark.parametrize(
    ("family", "layout", "fewer"),
    [
        ("deepseek_v3", "hub", True),
        ("deepseek_v3", "fused", False),
        ("qwen3_moe", "hub", False),
        ("qwen3_moe", "fused", True),
    ],
)
def test_float8_blocks_of_channels_are_removed_with_their_scales(
    family: str, layout: str, fewer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "_WINDOW", 700)  # a few rows
    block = 4
    model = float8_folder(family, layout, tmp_path / "source", block)
    keep = tuple(tuple(range(each.num_experts)) for each in moe_blocks(model))
    plan = plan_for(model, keep_of(model, family) if fewer else keep)
    plan = replace(plan, channels=blocks_for(prune(build(family), plan), 8, block))
    moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", progress=False)
    # The values: those of the dequantised model, thinned in memory.
    plain_copy(tmp_path / "source", tmp_path / "plain", block)
    expected = prune(type(model).from_pretrained(tmp_path / "plain", dtype="auto"), plan)
    expected.save_pretrained(tmp_path / "expected", save_original_format=layout == "hub")
    got, plain = tensors_in(tmp_path / "got"), tensors_in(tmp_path / "expected")
    values = dequantised(got, block)
    assert values.keys() == plain.keys()
    assert [name for name, tensor in values.items() if not torch.equal(tensor, plain[name])] == []
    # The bytes: none was computed.
    before = tensors_in(tmp_path / "source")
    assert plan.channels is not None
    for layer, each in enumerate(moe_blocks(model)):
        for position, expert in enumerate(plan.keep[layer]):
            channels = plan.channels.indices(layer)[position]
            scales = channels[::block] // block
            for name in ("gate_proj", "up_proj", "down_proj") if layout == "hub" else ("gate_up_proj", "down_proj"):
                here = f"{each.name}.experts." + (f"{position}.{name}.weight" if layout == "hub" else name)
                there = f"{each.name}.experts." + (f"{expert}.{name}.weight" if layout == "hub" else name)
                for suffix, chosen, all_of_them in (("", channels, 24), ("_scale_inv", scales, 24 // block)):
                    new, old = got[here + suffix], before[there + suffix]
                    if layout == "fused":
                        new, old = new[position], old[expert]
                    rows = torch.cat([chosen, chosen + all_of_them]) if name == "gate_up_proj" else chosen
                    assert new.dtype == old.dtype
                    kept_bytes = old.view(torch.uint8).view(*old.shape, -1)
                    kept_bytes = kept_bytes[:, rows] if name == "down_proj" else kept_bytes[rows]
                    assert torch.equal(new.view(torch.uint8).view(*new.shape, -1), kept_bytes)
    again = reloaded(type(model).from_pretrained, tmp_path / "expected", dtype="auto")
    if layout == "hub":  # transformers reads no other float8 experts
        dequantise = transformers.FineGrainedFP8Config(dequantize=True)
        loaded = reloaded(type(model).from_pretrained, tmp_path / "got", quantization_config=dequantise)
        assert torch.equal(logits_of(loaded, TOKENS), logits_of(again, TOKENS))
    batches = [{"input_ids": TOKENS}]
    streamed = moe_ext.calibrate(tmp_path / "got", batches, progress=False)
    reference = moe_ext.calibrate(tmp_path / "expected", batches, progress=False)
    assert torch.equal(streamed.coactivation, reference.coactivation)


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("moved", [1, 2])
def test_parts_of_float8_blocks_are_refused_by_layer_and_expert(layout: str, moved: int, tmp_path: Path) -> None:
    """As many channels as whole blocks have, but those of one expert lie across two."""
    model = float8_folder("deepseek_v3", layout, tmp_path / "source", 4)
    kept = [torch.arange(8).repeat(each.num_experts, 1) for each in moe_blocks(model)]
    kept[1][5] += moved
    keep = tuple(tuple(range(each.num_experts)) for each in moe_blocks(model))
    plan = replace(plan_for(model, keep), channels=KeptChannels.of(kept, 24))
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    with pytest.raises(
        ValueError,
        match=r"plan: model.layers.2.mlp, expert 5: keeps parts of blocks of 4 .* thin_plan\(..., blocks=4\)",
    ):
        moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", progress=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_width_that_is_no_number_of_float8_blocks_is_refused(tmp_path: Path) -> None:
    model = float8_folder("deepseek_v3", "hub", tmp_path / "source", 8)
    plan = plan_for(model, tuple(tuple(range(each.num_experts)) for each in moe_blocks(model)))
    plan = replace(plan, channels=KeptChannels.of([torch.arange(12).repeat(12, 1)] * 2, 24))
    with pytest.raises(ValueError, match=r"plan: model\.layers\.1\.mlp, expert 0: keeps parts of blocks of 8 channels"):
        moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", progress=False)
    assert not (tmp_path / "got").exists()
