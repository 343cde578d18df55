"""Plans that make a checkpoint fit into so many bytes: what pruning then writes, to the byte."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.checkpoint_size import checkpoint_size
from moe_ext.decision.thin_plan import thin_plan
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.expert_width import width_of
from moe_ext.models.layout import layout_of
from tests.support.checkpoints import declare_float8, quantise, rewritten
from tests.support.families import build, keep_of, plan_for

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe")


def statistics_of(model: Any) -> ExpertStatistics:
    blocks = moe_blocks(model)
    stats = ExpertStatistics.empty(layout_of(model, blocks), "softmax", width=width_of(blocks[0]))
    assert stats.channel_errors is not None
    stats.moments[..., 0, 0] = 1
    stats.channel_errors.copy_(torch.rand(stats.channel_errors.shape, generator=torch.Generator().manual_seed(0)))
    return stats


def folder_of(family: str, layout: str, folder: Path, **changes: Any) -> Any:
    model = build(family, dtype=torch.bfloat16, **changes)
    model.save_pretrained(folder, save_original_format=layout == "hub")
    return model


@pytest.mark.parametrize("fewer", [False, True])
@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_is_what_is_written_to_the_byte(family: str, layout: str, fewer: bool, tmp_path: Path) -> None:
    built = folder_of(family, layout, tmp_path / "source", tie_word_embeddings=family == "qwen2_moe")
    model = type(built).from_pretrained(tmp_path / "source", dtype="auto")  # some of DeepSeek-V3 becomes float32
    stats = statistics_of(model)
    plan = plan_for(model, keep_of(model, family)) if fewer else None
    size = checkpoint_size(tmp_path / "source", None if plan is None else plan.keep)
    assert size == checkpoint_size(model, None if plan is None else plan.keep)
    made = thin_plan(stats, channels=12, multiple=1, plan=plan)
    written = moe_ext.prune_checkpoint(tmp_path / "source", made, tmp_path / "thin", progress=False)
    assert size.at(12) == written.weight_bytes
    if plan is not None:
        written = moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "fewer", progress=False)
    before = sum(tensor.nbytes for tensor in model.state_dict().values()) if plan is None else written.weight_bytes
    tied = model.lm_head.weight.nbytes if family == "qwen2_moe" and plan is None else 0
    assert size.at(24) == before - tied


@pytest.mark.parametrize("fewer", [False, True])
@pytest.mark.parametrize("spare", [0, 1, -1])
def test_the_width_is_the_largest_multiple_with_which_the_checkpoint_fits(
    spare: int, fewer: bool, tmp_path: Path
) -> None:
    model = folder_of("mixtral", "hub", tmp_path / "source")
    stats = statistics_of(model)
    plan = plan_for(model, keep_of(model, "mixtral", fewer=1)) if fewer else None
    fit = checkpoint_size(model, None if plan is None else plan.keep).at(15) + spare
    made = thin_plan(stats, fit=fit, model=tmp_path / "source", plan=plan, multiple=5)
    assert made.channels is not None
    width = 10 if spare < 0 else 15
    assert made.channels.width(0) == width
    assert made == thin_plan(stats, fit=f"{fit}B", model=model, plan=plan, multiple=5)
    assert made.made_by["fit"] == fit
    written = moe_ext.prune_checkpoint(tmp_path / "source", made, tmp_path / "thin", progress=False)
    assert written.weight_bytes == made.made_by["weight_bytes"] <= fit


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_float8_scales_count_as_they_are_written(layout: str, tmp_path: Path) -> None:
    model = folder_of("deepseek_v3", layout, tmp_path / "source")
    rewritten(tmp_path / "source", lambda tensors: quantise(tensors, 4))
    declare_float8(tmp_path / "source", 4)
    stats, plan = statistics_of(model), plan_for(model, keep_of(model, "deepseek_v3"))
    size = checkpoint_size(tmp_path / "source", plan.keep)
    fit = size.at(12) + 3
    with pytest.raises(
        ValueError, match="blocks: the model stores 4 channels together, or with one scale; give blocks=4"
    ):
        thin_plan(stats, fit=fit, model=tmp_path / "source", plan=plan, multiple=2)
    made = thin_plan(stats, fit=fit, model=tmp_path / "source", plan=plan, multiple=1, blocks=4)
    written = moe_ext.prune_checkpoint(tmp_path / "source", made, tmp_path / "thin", progress=False)
    assert written.weight_bytes == size.at(12)


def test_what_cannot_fit_or_fits_already_is_refused(tmp_path: Path) -> None:
    model = folder_of("mixtral", "hub", tmp_path / "source")
    stats, size = statistics_of(model), checkpoint_size(model)
    options: dict[str, Any] = {"model": tmp_path / "source", "multiple": 5}
    with pytest.raises(ValueError, match=f"fit: expected {size.at(5):,} bytes or more, .* with 5 of 24 channels"):
        thin_plan(stats, fit=size.at(5) - 1, **options)
    with pytest.raises(ValueError, match=rf"hold the kept experts with all their channels, {size.at(24):,} bytes"):
        thin_plan(stats, fit=size.at(24), **options)
    assert thin_plan(stats, fit=size.at(24) - 1, **options).made_by["channels"] == 20
    with pytest.raises(ValueError, match="model: is another than that of the statistics: model_type"):
        thin_plan(stats, fit="1MB", model=build("qwen3_moe"), multiple=5)
    with pytest.raises(ValueError, match="model: has experts of 20 channels; those of the statistics have 24"):
        thin_plan(stats, fit="1MB", model=build("mixtral", intermediate_size=20), multiple=5)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint folder"):
        thin_plan(stats, fit="1MB", model=tmp_path / "none", multiple=5)
