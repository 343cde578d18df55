"""prune_checkpoint against prune and save_pretrained of the loaded model, and against folders that are not whole."""

import errno
import fcntl
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import moe_ext
from moe_ext.checkpoints.stored_tensors import INDEX, CheckpointError
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.counted import NUM_EXPERTS_FIELDS
from moe_ext.models.families import FURTHER_LAYERS_FIELDS
from moe_ext.pruning import prune_folder, shard_writer, unfinished
from tests.support.checkpoints import BLOCK, declare_float8, dequantised, plain_copy, quantise, rewritten, tensors_in
from tests.support.families import ALL, build, keep_of, plan_for
from tests.support.forked import exit_status, fork

SHARD = 20_000  # bytes: every test model takes several


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def prune_in_memory(source: Path, plan: PruningPlan, folder: Path, dtype: Any = "auto") -> None:
    """The reference: load, prune, save_pretrained."""
    name = json.loads((source / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(source, dtype=dtype)
    moe_ext.prune(model, plan).save_pretrained(folder)


def assert_same_checkpoint(got: Path, expected: Path) -> None:
    ours, theirs = tensors_in(got), tensors_in(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if bits(ours[name]) != bits(theirs[name])] == []
    assert loaded_config(got) == loaded_config(expected)


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def loaded_config(folder: Path) -> dict[str, Any]:
    """What a folder's config loads to; save_pretrained fills in the types of a multimodal model's parts."""

    def compared(content: dict[str, Any], *left_out: str) -> dict[str, Any]:
        return {
            key: compared(value, "dtype") if key.endswith("_config") and isinstance(value, dict) else value
            for key, value in content.items()
            if key not in ("_name_or_path", "quantization_config", *left_out)
        }

    return compared(AutoConfig.from_pretrained(folder).to_dict())


def changed_fields(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Names of the fields in which two configs differ, of whatever part."""
    found = set()
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and key.endswith("_config"):
            found |= changed_fields(old, new)
        elif old != new or (key in before) != (key in after):
            found.add(key)
    return found


@pytest.fixture
def mixtral(tmp_path: Path) -> tuple[Path, PruningPlan]:
    """A Mixtral folder in the Hub's layout in several shards, and a plan with layers that differ."""
    model = build("mixtral", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size=SHARD)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "README.md").write_text("of the unpruned model")
    return tmp_path / "source", plan_for(model, keep_of(model, "mixtral", fewer=1))


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("family", ALL)
def test_the_result_is_that_of_prune_and_save_pretrained_byte_by_byte(family: str, layout: str, tmp_path: Path) -> None:
    model = build(family, dtype=torch.bfloat16)
    plan = plan_for(model, keep_of(model, family))
    model.save_pretrained(tmp_path / "source", save_original_format=layout == "hub")
    prune_in_memory(tmp_path / "source", plan, tmp_path / "expected")
    result = moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", shard_size=SHARD, progress=False)
    assert_same_checkpoint(tmp_path / "got", tmp_path / "expected")
    changed = changed_fields(content_of(tmp_path / "source"), content_of(tmp_path / "got"))
    assert len(changed & set(NUM_EXPERTS_FIELDS)) == 1
    assert changed <= {*NUM_EXPERTS_FIELDS, *FURTHER_LAYERS_FIELDS}
    assert result.parameters < result.parameters_before
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(tmp_path / "got").values())
    assert result.weight_bytes == weights


def test_layers_may_keep_different_numbers(mixtral: tuple[Path, PruningPlan], tmp_path: Path) -> None:
    source, plan = mixtral
    assert len({len(kept) for kept in plan.keep}) == 2
    prune_in_memory(source, plan, tmp_path / "expected")
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert_same_checkpoint(tmp_path / "got", tmp_path / "expected")
    loaded = moe_ext.from_pretrained(tmp_path / "got")
    assert [layer.mlp.experts.num_experts for layer in loaded.model.layers] == [len(kept) for kept in plan.keep]


class Copying:
    """In the place of os.copy_file_range: copies some of each call's bytes, then does what the system may do."""

    def __init__(self, then: int | None, copied: int) -> None:
        self.then, self.left, self.system = then, copied, os.copy_file_range

    def __call__(self, source: int, file: int, length: int, offset: int) -> int:
        if self.left == 0 and self.then is not None:
            raise OSError(self.then, os.strerror(self.then))
        copied = self.system(source, file, min(length, self.left), offset) if self.left else 0
        self.left -= copied
        return copied


@pytest.mark.parametrize("copied", [0, 100, 5000])
@pytest.mark.parametrize("then", [errno.EXDEV, errno.ENOSYS, None])
def test_a_system_that_copies_only_some_bytes_changes_nothing(
    then: int | None, copied: int, mixtral: tuple[Path, PruningPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = mixtral
    prune_in_memory(source, plan, tmp_path / "expected")
    monkeypatch.setattr(os, "copy_file_range", copying := Copying(then, copied))
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert copying.left == 0
    assert_same_checkpoint(tmp_path / "got", tmp_path / "expected")


def test_a_disk_that_fails_while_the_system_copies_is_an_error(
    mixtral: tuple[Path, PruningPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = mixtral
    monkeypatch.setattr(os, "copy_file_range", Copying(errno.EIO, 5000))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert not (tmp_path / "got").exists()


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = build("qwen3_moe", dtype=torch.bfloat16, tie_word_embeddings=True)
    plan = plan_for(model, keep_of(model, "qwen3_moe"))
    model.save_pretrained(tmp_path / "source")
    (file,) = (tmp_path / "source").glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    prune_in_memory(tmp_path / "source", plan, tmp_path / "expected")
    moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", progress=False)
    assert_same_checkpoint(tmp_path / "got", tmp_path / "expected")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])  # the second keeps its correction bias in float32
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_dtype_is_that_of_the_loaded_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(family, dtype=torch.bfloat16)
    plan = plan_for(model, keep_of(model, family))
    model.save_pretrained(tmp_path / "source")
    prune_in_memory(tmp_path / "source", plan, tmp_path / "expected", dtype)
    name = str(dtype).removeprefix("torch.")
    moe_ext.prune_checkpoint(tmp_path / "source", plan, tmp_path / "got", dtype=name, progress=False)
    assert_same_checkpoint(tmp_path / "got", tmp_path / "expected")


def test_shards_are_no_larger_than_asked_and_the_index_names_every_tensor(
    mixtral: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = mixtral
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", shard_size=SHARD, progress=False)
    index = json.loads((tmp_path / "got" / INDEX).read_text())
    shards = {file.name: load_file(file) for file in (tmp_path / "got").glob("*.safetensors")}
    assert len(shards) > 2
    sizes = {name: sum(tensor.nbytes for tensor in shard.values()) for name, shard in shards.items()}
    assert max(sizes.values()) <= SHARD
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"] == {name: shard for shard, held in shards.items() for name in held}


def test_tokenizer_files_go_along_and_the_model_card_does_not(
    mixtral: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = mixtral
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert {path.name for path in (tmp_path / "got").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("function", "calls"),
    [("write_shard", 0), ("write_part", 5), ("write_part", 30), ("write_rest", 0), ("flush_to_disk", 3)],
)
def test_a_killed_run_leaves_no_result_and_the_next_one_finishes_it(
    function: str, calls: int, mixtral: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = mixtral
    prune_in_memory(source, plan, tmp_path / "expected")

    def run() -> None:
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", shard_size=SHARD, progress=False)

    def killed() -> None:
        owner = shard_writer if function == "write_part" else prune_folder
        original, left = getattr(owner, function), [calls]

        def dies(*args: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), 9)
            left[0] -= 1
            return original(*args)

        setattr(owner, function, dies)
        run()

    assert exit_status(fork(killed)) == -9
    assert not (tmp_path / "got").exists()
    work = tmp_path / ".got.partial"
    written = {file.name: file.stat().st_ino for file in work.glob("model-*.safetensors")}
    assert (len(written) > 0) == (function != "write_shard" and calls != 5)
    run()
    assert not work.exists()
    assert_same_checkpoint(tmp_path / "got", tmp_path / "expected")
    if function != "flush_to_disk":  # there the note of what is done was gone already
        assert all((tmp_path / "got" / name).stat().st_ino == inode for name, inode in written.items())


def test_what_another_run_left_is_not_taken(mixtral: tuple[Path, PruningPlan], tmp_path: Path) -> None:
    source, plan = mixtral
    prune_in_memory(source, plan, tmp_path / "expected")
    work = tmp_path / ".got.partial"
    work.mkdir()
    (work / unfinished.PROGRESS).write_text('{"job": "another"}')
    for file in source.glob("*.safetensors"):
        shutil.copy(file, work)
    (work / "left").mkdir()
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", shard_size=SHARD, progress=False)
    assert_same_checkpoint(tmp_path / "got", tmp_path / "expected")
    assert not (tmp_path / "got" / "left").exists()


def test_a_disk_that_is_too_small_is_found_before_writing(
    mixtral: tuple[Path, PruningPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = mixtral
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 0\.00 GB"):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_two_processes_do_not_write_one_folder(mixtral: tuple[Path, PruningPlan], tmp_path: Path) -> None:
    source, plan = mixtral
    with (
        unfinished.locked(tmp_path / ".got.partial", tmp_path / "got"),
        pytest.raises(BlockingIOError, match="another process is writing"),
    ):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)


@pytest.mark.parametrize("moment", ["lock", "rename"])
def test_of_two_prunes_into_one_folder_the_later_says_that_it_is_there(
    moment: str, mixtral: tuple[Path, PruningPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other finishes after this one has opened the unfinished folder, or when this one is done itself."""
    source, plan = mixtral
    moe_ext.prune_checkpoint(source, plan, tmp_path / "expected", progress=False)
    owner: Any
    owner, name = (fcntl, "flock") if moment == "lock" else (prune_folder, "put_in_place")
    original = getattr(owner, name)

    def other_first(*arguments: Any) -> None:
        monkeypatch.setattr(owner, name, original)
        if moment == "lock":
            (tmp_path / ".got.partial").rmdir()
        shutil.copytree(tmp_path / "expected", tmp_path / "got")
        original(*arguments)

    monkeypatch.setattr(owner, name, other_first)
    with pytest.raises(FileExistsError, match="got already exists"):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "got", "source"]
    assert_same_checkpoint(tmp_path / "got", tmp_path / "expected")


def edited_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def cut(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def with_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def edited_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**content_of(folder), **fields}))


GATE = "model.layers.0.block_sparse_moe.gate.weight"
W1 = GATE.replace("gate", "experts.3.w1")
BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (lambda folder: next(folder.glob("model-00002*")).unlink(), "names model-00002.*not there"),
    "a truncated shard": (lambda folder: cut(next(folder.glob("model-00002*")), 7), "truncated or overlong"),
    "a shard cut in its header": (
        lambda folder: next(folder.glob("model-00002*")).write_bytes(struct.pack("<Q", 999) + b"{"),
        "truncated",
    ),
    "a shard of noise": (lambda folder: next(folder.glob("model-00002*")).write_bytes(b"\xff" * 99), "truncated"),
    "a shard outside the folder": (
        lambda folder: edited_index(folder, lambda names: names.update({GATE: "../other.safetensors"})),
        r"'\.\./other\.safetensors'; expected a \*\.safetensors file of the folder",
    ),
    "a shard at an absolute path": (
        lambda folder: edited_index(folder, lambda names: names.update({GATE: "/tmp/other.safetensors"})),
        "expected a .*file of the folder",
    ),
    "a tensor in another shard than the index says": (
        lambda folder: edited_index(folder, lambda names: names.update({GATE: names["lm_head.weight"]})),
        "which model.safetensors.index.json puts into",
    ),
    "a name that no file system takes": (
        lambda folder: edited_index(folder, lambda names: names.update({GATE: "x" * 300 + ".safetensors"})),
        r"expected a \*.safetensors file of the folder",
    ),
    "an index that is no JSON": (lambda folder: (folder / INDEX).write_text("{"), "truncated, or not JSON"),
    "an index of something else": (lambda folder: (folder / INDEX).write_text("[]"), "has no 'weight_map'"),
    "overlapping tensors": (
        lambda folder: with_header(
            next(folder.glob("model-00002*")),
            lambda header: list(header.values())[1]["data_offsets"].__setitem__(0, 2),
        ),
        "data_offsets",
    ),
    "an expert that is missing": (
        lambda folder: rewritten(folder, lambda tensors: tensors.pop(GATE.replace("gate", "experts.3.w1"))),
        "parts that do not fit together: 1 tensors, model.layers.0.mlp.experts.gate_up_proj",
    ),
    "an expert too many": (
        lambda folder: rewritten(
            folder,
            lambda tensors: tensors.update(
                {GATE.replace("gate", "experts.8.w1"): tensors.pop(GATE.replace("gate", "experts.3.w1"))}
            ),
        ),
        "is of expert 8 of 8",
    ),
    "a router of another shape": (
        lambda folder: rewritten(folder, lambda tensors: tensors.update({GATE: tensors[GATE].T.contiguous()})),
        r"model.layers.0.mlp.gate.weight has shape \(32, 8\), expected \(8, 32\)",
    ),
    "an expert's projection that is transposed": (
        lambda folder: rewritten(folder, lambda tensors: tensors.update({W1: tensors[W1].T.contiguous()})),
        "parts that do not fit together.*model.layers.0.mlp.experts.gate_up_proj",
    ),
    "all of a kind transposed": (
        lambda folder: rewritten(
            folder,
            lambda tensors: tensors.update({
                name: tensor.T.contiguous() for name, tensor in tensors.items() if ".w2." in name
            }),
        ),
        r"model.layers.0.mlp.experts.down_proj has shape \(8, 24, 32\), expected \(8, 32, 24\)",
    ),
    "no norm": (
        lambda folder: rewritten(folder, lambda tensors: tensors.pop("model.norm.weight")),
        "lacks 1 tensors, model.norm.weight",
    ),
    "a token without experts": (
        lambda folder: edited_config(folder, num_experts_per_tok=0), "model.layers.0.mlp: top_k is 0; expected 1 to 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_checkpoint_is_refused_in_memory_too_and_nothing_written(
    fault: str, mixtral: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = mixtral
    damage, message = BREAKS[fault]
    damage(source)
    with pytest.raises((CheckpointError, ValueError, FileNotFoundError), match=message):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises((CheckpointError, ValueError, FileNotFoundError), match=message):
        moe_blocks(moe_ext.from_pretrained(source))


def test_keys_that_look_like_paths_are_only_names(mixtral: tuple[Path, PruningPlan], tmp_path: Path) -> None:
    source, plan = mixtral
    prune_in_memory(source, plan, tmp_path / "expected")
    strange = "../../" + GATE
    rewritten(source, lambda tensors: tensors.update({strange: torch.ones(2)}))
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert_same_checkpoint(tmp_path / "got", tmp_path / "expected")


def test_a_link_in_the_place_of_the_unfinished_folder_is_not_followed(
    mixtral: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = mixtral
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".got.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="is in the way"):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_plan_for_another_model_or_a_pruned_model_is_refused(
    mixtral: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = mixtral
    other = build("olmoe")
    with pytest.raises(ValueError, match="the plan is for model type 'olmoe'"):
        moe_ext.prune_checkpoint(source, plan_for(other, keep_of(other, "olmoe")), tmp_path / "got", progress=False)
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    with pytest.raises(ValueError, match="its layers differ already"):
        moe_ext.prune_checkpoint(tmp_path / "got", plan, tmp_path / "again", progress=False)
    with pytest.raises(ValueError, match="shard_size is 0"):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "again", shard_size=0, progress=False)


@pytest.fixture(params=["hub", "fused"])
def float8(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, PruningPlan]:
    """A DeepSeek-V3 folder as it is published: float8 weights, and an inverse scale a block."""
    model = build("deepseek_v3", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source", save_original_format=request.param == "hub")
    rewritten(tmp_path / "source", quantise)
    declare_float8(tmp_path / "source", BLOCK)
    return tmp_path / "source", plan_for(model, keep_of(model, "deepseek_v3"))


def test_float8_weights_and_their_scales_are_pruned_as_they_are(
    float8: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = float8
    held = tensors_in(source)
    moe_ext.prune_checkpoint(source, plan, tmp_path / "got", shard_size=SHARD, progress=False)
    got = tensors_in(tmp_path / "got")
    # The values: those of the same model in bfloat16, pruned in memory.
    plain_copy(source, tmp_path / "plain")
    fused = any(name.endswith("gate_up_proj") for name in held)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    moe_ext.prune(model, plan).save_pretrained(tmp_path / "expected", save_original_format=not fused)
    values, expected = dequantised(got), tensors_in(tmp_path / "expected")
    assert values.keys() == expected.keys()
    assert [name for name in values if not torch.equal(values[name], expected[name])] == []
    # The bytes: none was computed.
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in got.values()) > 20
    assert {tensor.dtype for tensor in got.values()} == {tensor.dtype for tensor in held.values()}
    for layer, kept in zip((1, 2), plan.keep, strict=True):
        for name in [name for name in got if f"layers.{layer}.mlp.experts." in name]:
            number = re.search(r"experts\.(\d+)\.", name)
            if number is None:
                assert bits(got[name]) == bits(held[name].view(torch.uint8)[list(kept)].view(held[name].dtype))
            else:
                before = name.replace(number[0], f"experts.{kept[int(number[1])]}.")
                assert bits(got[name]) == bits(held[before])
    assert loaded_config(tmp_path / "got") == loaded_config(tmp_path / "expected")
    assert changed_fields(content_of(source), content_of(tmp_path / "got")) == {
        "n_routed_experts", "num_nextn_predict_layers",
    }  # fmt: skip


def test_float8_weights_are_not_converted_or_left_without_scales(
    float8: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = float8
    with pytest.raises(ValueError, match=r"dtype is 'float32'.*float8 weights with scales: expected auto"):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", dtype="float32", progress=False)
    rewritten(source, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("_scale_inv"))))
    with pytest.raises(ValueError, match=r"is float8, and there is no .*_scale_inv"):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, r"a weight is stored in gptq's format 'gptq' with 3 bits"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 0]},
            r"weight_block_size is \[128, 0\]; expected two numbers",
        ),
        (
            {"quant_method": "quip"},
            r"is quantised \('quip'\): model\.layers\.0\..*experts.* is in a format that is not read",
        ),
    ],
)
def test_a_checkpoint_that_is_quantised_otherwise_is_refused(
    quantisation: dict[str, Any], message: str, mixtral: tuple[Path, PruningPlan], tmp_path: Path
) -> None:
    source, plan = mixtral
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    with pytest.raises(ValueError, match=message):
        moe_ext.prune_checkpoint(source, plan, tmp_path / "got", progress=False)
    assert not (tmp_path / "got").exists()
