"""A pruned checkpoint says the same as its source: its ties, its config's own words, the files beside the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint, write_thresholds
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.runtime.patching import active_thresholds
from tests.support.batches import random_tokens
from tests.support.checkpoints import rewritten, tensors_in
from tests.support.families import build, keep_of, logits_of, plan_for, reloaded
from tests.support.paths import DEMO_MODEL

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def source_of(family: str, folder: Path, **changes: Any) -> tuple[PreTrainedModel, PruningPlan]:
    model = build(family, dtype=torch.bfloat16, **changes)
    model.save_pretrained(folder)
    return model, plan_for(model, keep_of(model, family))


def prune(source: Path, plan: PruningPlan, out: Path, way: str) -> None:
    if way == "from disk":
        moe_ext.prune_checkpoint(source, plan, out, progress=False)
        return
    _, tokenizer = load_checkpoint(DEMO_MODEL)
    save_checkpoint(moe_ext.prune(moe_ext.from_pretrained(source), plan), tokenizer, out)


WAYS = pytest.mark.parametrize("way", ["from disk", "in memory"])


# ---- ties

STORED: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "another head": lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].flip(0).contiguous()}),
    "the head alone": lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}),
    "both alike": lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}),
}


@WAYS
@pytest.mark.parametrize("stored", STORED)
def test_ties_are_those_of_the_loaded_source_whatever_is_stored(stored: str, way: str, tmp_path: Path) -> None:
    _, plan = source_of("qwen3_moe", tmp_path / "source", tie_word_embeddings=True)
    rewritten(tmp_path / "source", STORED[stored])
    load = transformers.Qwen3MoeForCausalLM.from_pretrained
    tokens, model = random_tokens(2, 9), moe_ext.prune(reloaded(load, tmp_path / "source"), plan)
    prune(tmp_path / "source", plan, tmp_path / "got", way)
    again = reloaded(load, tmp_path / "got")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (stored != "another head")
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


@pytest.mark.parametrize("stored", STORED)
def test_statistics_of_a_folder_are_those_of_the_loaded_model_whatever_is_tied(stored: str, tmp_path: Path) -> None:
    source_of("qwen3_moe", tmp_path, tie_word_embeddings=True)
    rewritten(tmp_path, STORED[stored])
    batches = [{"input_ids": random_tokens(2, 9)}]
    expected = moe_ext.calibrate(reloaded(moe_ext.from_pretrained, tmp_path), batches, progress=False)
    assert torch.equal(moe_ext.calibrate(tmp_path, batches, progress=False).moments, expected.moments)


def test_a_head_that_is_not_tied_counts_as_parameters(tmp_path: Path) -> None:
    model, plan = source_of("qwen3_moe", tmp_path / "source", tie_word_embeddings=True)
    rewritten(tmp_path / "source", STORED["another head"])
    result = moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", progress=False)
    assert result.parameters_before == model.num_parameters() + model.lm_head.weight.numel()


# ---- config

HUB_STYLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "olmoe": ("olmoe", {"rope_theta": 500000.0, "torch_dtype": "bfloat16", "num_experts": 12}, "num_experts"),
    "scaled": (
        "qwen3_moe",
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "torch_dtype": "bfloat16",
         "num_experts": 16, "transformers_version": "4.51.0", "note": "kept"},
        "num_experts",
    ),
    "an alias": ("qwen3_moe", {"num_experts": None, "num_local_experts": 16}, "num_local_experts"),
}  # fmt: skip


def in_hub_style(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """A config as the Hub has it: transformers 4's names, in an order of its own."""
    content = {key: value for key, value in content_of(folder).items() if key not in ("rope_parameters", "dtype")}
    counts = ("num_experts", "num_local_experts")
    content = {**fields, **{key: value for key, value in content.items() if key not in counts}, **fields}
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content, indent=4))
    return content


@WAYS
@pytest.mark.parametrize("case", HUB_STYLE)
def test_only_the_number_of_experts_changes_in_the_sources_own_json(case: str, way: str, tmp_path: Path) -> None:
    family, fields, count = HUB_STYLE[case]
    _, plan = source_of(family, tmp_path / "source")
    before = in_hub_style(tmp_path / "source", fields)
    prune(tmp_path / "source", plan, tmp_path / "got", way)
    after = content_of(tmp_path / "got")
    assert list(after) == list(before)
    assert after == {**before, count: len(plan.keep[0])}


@WAYS
def test_layers_that_differ_say_so_beside_the_sources_own_words(way: str, tmp_path: Path) -> None:
    model, _ = source_of("olmoe", tmp_path / "source")
    plan = plan_for(model, keep_of(model, "olmoe", fewer=1))
    before = in_hub_style(tmp_path / "source", HUB_STYLE["olmoe"][1])
    prune(tmp_path / "source", plan, tmp_path / "got", way)
    after = content_of(tmp_path / "got")
    assert after.pop("per_layer_config") == {"1": {"num_experts": 8}}
    assert after == {**before, "num_experts": 9}
    loaded = moe_ext.from_pretrained(tmp_path / "got")
    assert [layer.mlp.experts.num_experts for layer in loaded.model.layers] == [9, 8, 9]


def test_a_part_of_a_config_is_changed_where_it_is(tmp_path: Path) -> None:
    _, plan = source_of("qwen3_vl_moe_text", tmp_path / "source")
    before = content_of(tmp_path / "source")
    prune(tmp_path / "source", plan, tmp_path / "got", "from disk")
    (count,) = {"num_experts", "num_local_experts"} & before["text_config"].keys()
    assert content_of(tmp_path / "got") == {**before, "text_config": {**before["text_config"], count: 5}}


def test_what_else_differs_in_a_model_is_written_too(tmp_path: Path) -> None:
    source_of("olmoe", tmp_path / "source")
    before = in_hub_style(tmp_path / "source", HUB_STYLE["olmoe"][1])
    model = moe_ext.from_pretrained(tmp_path / "source", rms_norm_eps=1e-3, dtype=torch.float32)
    save_checkpoint(model, None, tmp_path / "got")
    assert content_of(tmp_path / "got") == {**before, "rms_norm_eps": 1e-3, "torch_dtype": "float32"}


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_layers_that_are_left_out_are_not_announced(field: str, tmp_path: Path) -> None:
    _, plan = source_of("deepseek_v3", tmp_path / "source", num_nextn_predict_layers=0)
    content = content_of(tmp_path / "source")
    content.pop("num_nextn_predict_layers", None)
    before = {**content, field: 1}
    (tmp_path / "source" / "config.json").write_text(json.dumps(before))
    rewritten(tmp_path / "source", lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(2)}))
    with (
        pytest.warns(UserWarning, match=r"no place for 1 tensors, model\.layers\.3\.eh_proj\.weight"),
        pytest.warns(UserWarning, match="num_nextn_predict_layers is 1; layers for multi-token prediction are not"),
    ):
        prune(tmp_path / "source", plan, tmp_path / "got", "in memory")
    assert content_of(tmp_path / "got") == {**before, "n_routed_experts": 8, field: 0}
    assert not [name for name in tensors_in(tmp_path / "got") if "layers.3" in name]


# ---- files

BESIDE = (
    "LICENSE", "tokenizer_config.json", "modeling_own.py", "tekken.json", "spm.model", "sentencepiece.bpe.model",
    "video_preprocessor_config.json", "additional_chat_templates/tool_use.jinja", "deep/er/config.json",
    "generation_config.json",
)  # fmt: skip
LEFT_OUT = (
    "README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "original/consolidated.00.pth",
    "original/params.json", "params.json", ".git/HEAD", "onnx/model.onnx", "tf_model.h5",
)  # fmt: skip


@WAYS
def test_everything_beside_the_weights_is_copied_as_it_is(way: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    _, plan = source_of("mixtral", source)
    for name in (*BESIDE, *LEFT_OUT):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}" if name.endswith("n_config.json") else f"of {name}")
    prune(source, plan, tmp_path / "got", way)
    found = {str(path.relative_to(tmp_path / "got")) for path in (tmp_path / "got").rglob("*") if path.is_file()}
    assert found == {*BESIDE, "config.json", "model.safetensors"}
    assert all((tmp_path / "got" / name).read_bytes() == (source / name).read_bytes() for name in BESIDE)


@WAYS
def test_links_that_leave_the_folder_are_named_and_not_followed(way: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    _, plan = source_of("mixtral", source)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (source / "tokenizer_env").symlink_to("/proc/self/environ")
    (source / "templates").symlink_to(tmp_path / "secret")
    (source / "vocab.txt").write_text("words")
    (source / "tokenizer.model").symlink_to("vocab.txt")
    with pytest.warns(UserWarning, match="not copied, as links to elsewhere: templates, tokenizer_env"):
        prune(source, plan, tmp_path / "got", way)
    assert not [name for name in ("tokenizer_env", "templates") if (tmp_path / "got" / name).exists()]
    assert (tmp_path / "got" / "tokenizer.model").read_text() == "words"
    assert not (tmp_path / "got" / "tokenizer.model").is_symlink()


def test_links_into_the_blobs_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    _, plan = source_of("mixtral", snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "tokenizer_config.json").symlink_to("../../blobs/abc")
    prune(snapshot, plan, tmp_path / "got", "from disk")
    assert (tmp_path / "got" / "tokenizer_config.json").read_text() == "{}"


def test_of_a_model_of_the_hub_the_cached_snapshot_is_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--a--b"
    _, plan = source_of("olmoe", repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    before = in_hub_style(repository / "snapshots" / "0123", HUB_STYLE["olmoe"][1])
    (repository / "snapshots" / "0123" / "tokenizer.json").write_text("as it is")
    model = moe_ext.from_pretrained(repository / "snapshots" / "0123")
    model.config.name_or_path = "a/b"
    save_checkpoint(moe_ext.prune(model, plan), None, tmp_path / "got")
    assert content_of(tmp_path / "got") == {**before, "num_experts": 9}
    assert (tmp_path / "got" / "tokenizer.json").read_text() == "as it is"


# ---- one class and one config for a folder


def test_every_job_names_the_layers_of_a_multimodal_model_alike(tmp_path: Path) -> None:
    model, plan = source_of("qwen3_vl_moe_text", tmp_path)
    assert type(moe_ext.from_pretrained(tmp_path)) is type(model)
    batches = [{"input_ids": random_tokens(2, 9)}]
    stats = moe_ext.calibrate(moe_ext.from_pretrained(tmp_path), batches, progress=False)
    with LayersOnDisk(tmp_path) as layers:
        assert stats.layers == plan.layers == tuple(block.name for block in layers.blocks)


def test_thresholds_of_a_multimodal_folder_are_found_by_the_text_decoder_alone(tmp_path: Path) -> None:
    source_of("qwen3_vl_moe_text", tmp_path)
    before = content_of(tmp_path)
    thresholds = torch.full((3, 2), 0.5)
    by_layer = {"0": [0.5, 0.5], "1": [0.5, 0.5], "2": [0.5, 0.5]}
    write_thresholds(tmp_path, thresholds, range(3))
    after = content_of(tmp_path)
    assert after["text_config"].pop("moe_ext") == {"skip_thresholds": by_layer}
    assert after == before
    whole = moe_ext.patch(moe_ext.from_pretrained(tmp_path), skip="config")
    torch.testing.assert_close(active_thresholds(whole), thresholds)
    assert not hasattr(moe_ext.unpatch(whole).config, "moe_ext")


def test_a_class_that_loads_the_text_decoder_alone_finds_the_thresholds(tmp_path: Path) -> None:
    text = {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts": 8,
        "num_experts_per_tok": 2, "layer_types": ["full_attention"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    transformers.Qwen3_5MoeForConditionalGeneration(config).save_pretrained(tmp_path)
    write_thresholds(tmp_path, torch.full((1, 1), 0.5), [0])
    assert type(moe_ext.from_pretrained(tmp_path)) is transformers.Qwen3_5MoeForConditionalGeneration
    decoder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(decoder) is transformers.Qwen3_5MoeForCausalLM
    assert active_thresholds(moe_ext.patch(decoder)) == torch.full((1, 1), 0.5)


# ---- thresholds in place


def test_thresholds_are_not_written_through_a_link(tmp_path: Path) -> None:
    source_of("mixtral", tmp_path / "m")
    (tmp_path / "m" / "config.json").rename(tmp_path / "mine.json")
    before = (tmp_path / "mine.json").read_bytes()
    (tmp_path / "m" / "config.json").symlink_to(tmp_path / "mine.json")
    with pytest.raises(OSError, match=r"config\.json is a link to .*mine\.json, which is not changed"):
        write_thresholds(tmp_path / "m", torch.zeros(3, 1), range(3))
    assert (tmp_path / "mine.json").read_bytes() == before
