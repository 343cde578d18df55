"""prune_gguf against slices of the tensors that llama.cpp's package wrote and reads."""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import moe_ext
from moe_ext.checkpoints.stored_tensors import CheckpointError
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.pruning import prune_gguf as module
from moe_ext.pruning import shard_writer
from tests.support.command_line import moe_json
from tests.support.forked import exit_status, fork
from tests.support.gguf_files import (
    EXPERTS,
    KEEP,
    PLAN,
    Tensors,
    mixtral_fields,
    mixtral_tensors,
    read_fields,
    read_tensors,
    write_gguf,
)  # fmt: skip

COUNTING = ("ffn_gate_inp", "exp_probs_b", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
VALUES = gguf.GGUFValueType


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "source.gguf", mixtral_tensors(Kind.Q4_0), mixtral_fields())
    return tmp_path / "source.gguf"


def kept_bytes(name: str, held: bytes, keep: tuple[tuple[int, ...], ...] = KEEP) -> bytes:
    """A tensor's bytes without the experts that go, by its name."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\..*", name)
    if match is None or match[2] not in COUNTING:
        return held
    each = len(held) // EXPERTS
    return b"".join(held[expert * each : (expert + 1) * each] for expert in keep[int(match[1])])


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_K, Kind.Q6_K, Kind.IQ4_XS]
)
def test_experts_go_byte_by_byte_and_the_rest_stays(kind: Kind, tmp_path: Path) -> None:
    width = 256 if kind in (Kind.Q4_K, Kind.Q6_K, Kind.IQ4_XS) else 64
    write_gguf(tmp_path / "source.gguf", mixtral_tensors(kind, width), mixtral_fields(width))
    result = moe_ext.prune_gguf(tmp_path / "source.gguf", PLAN, tmp_path / "got.gguf", progress=False)
    held, got = read_tensors(tmp_path / "source.gguf"), read_tensors(tmp_path / "got.gguf")
    assert list(got) == list(held)
    for name, (was, shape, content) in held.items():
        counts = name.startswith("blk") and name.split(".")[2] in COUNTING
        assert got[name] == (was, (3, *shape[1:]) if counts else shape, kept_bytes(name, content)), name
    before, after = read_fields(tmp_path / "source.gguf"), read_fields(tmp_path / "got.gguf")
    assert list(before) == list(after)
    assert {name: value for name, value in after.items() if before[name] != value} == {
        "llama.expert_count": (before["llama.expert_count"][0], 3)
    }
    assert result.weight_bytes == sum(len(content) for _, _, content in got.values())
    numbers = [sum(int(numpy.prod(shape)) for _, shape, _ in tensors.values()) for tensors in (held, got)]
    assert (result.parameters_before, result.parameters) == tuple(numbers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got.gguf", "source.gguf"]


@pytest.mark.parametrize("given", [1, 3])
def test_a_split_set_becomes_the_one_file_that_the_whole_becomes(given: int, tmp_path: Path) -> None:
    fields = mixtral_fields()
    del fields["general.alignment"]  # of a set, the package writes it to the first file only
    write_gguf(source := tmp_path / "source.gguf", mixtral_tensors(Kind.Q4_0), fields)
    write_gguf(tmp_path / "part.gguf", mixtral_tensors(Kind.Q4_0), fields, split=11)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) == 3
    moe_ext.prune_gguf(parts[given - 1], PLAN, tmp_path / "got.gguf", progress=False)
    moe_ext.prune_gguf(source, PLAN, tmp_path / "expected.gguf", progress=False)
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"belongs to 3 files, of which .*-00002-of-00003\.gguf is not there"):
        moe_ext.prune_gguf(parts[0], PLAN, tmp_path / "again.gguf", progress=False)


def test_files_of_a_set_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "part.gguf", mixtral_tensors(), mixtral_fields(), split=11)
    refused(tmp_path / "part-00001-of-00003.gguf", PLAN, CheckpointError, "does not name the alignment of the set, 64")
    fields = mixtral_fields()
    del fields["general.alignment"]
    write_gguf(tmp_path / "part.gguf", mixtral_tensors(), fields, split=11)
    second, third = (tmp_path / f"part-0000{number}-of-00003.gguf" for number in (2, 3))
    content = third.read_bytes()
    third.write_bytes(second.read_bytes())
    refused(second, PLAN, CheckpointError, r"part-00003-of-00003\.gguf: does not say that it is file 3 of 3")
    third.write_bytes(content)
    renamed = second.rename(tmp_path / "second.gguf")
    refused(renamed, PLAN, CheckpointError, r"expected the name NAME-00001-of-00003\.gguf")


def thinner(block: int, width: int = 32, of: int = 64) -> Any:
    """The plan with random blocks of channels, others of every expert."""
    generator = torch.Generator().manual_seed(0)
    kept = []
    for keep in KEEP:
        order = torch.rand(len(keep), of // block, generator=generator).argsort(1)[:, : width // block].sort(1).values
        kept.append((order[..., None] * block + torch.arange(block)).flatten(1))
    return replace(PLAN, channels=KeptChannels.of(kept, of))


@pytest.mark.parametrize(("kind", "block"), [(Kind.F32, 1), (Kind.F16, 1), (Kind.Q8_0, 32), (Kind.Q4_0, 32)])
def test_channels_go_in_whole_blocks(kind: Kind, block: int, tmp_path: Path) -> None:
    tensors = mixtral_tensors(kind)
    write_gguf(tmp_path / "source.gguf", tensors, mixtral_fields())
    plan = thinner(block)
    moe_ext.prune_gguf(tmp_path / "source.gguf", plan, tmp_path / "got.gguf", progress=False)
    got = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "got.gguf").tensors}
    for layer, keep in enumerate(KEEP):
        chosen = plan.channels.indices(layer).numpy()
        for name in ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_gate_exps.bias", "ffn_down_exps.weight"):
            data, held = tensors[f"blk.{layer}.{name}"]
            values = gguf.dequantize(data, held)
            columns = name == "ffn_down_exps.weight"
            expected = numpy.stack(
                [
                    values[expert][:, kept] if columns else values[expert][kept]
                    for expert, kept in zip(keep, chosen, strict=True)
                ]
            )
            result = got[f"blk.{layer}.{name}"]
            assert numpy.array_equal(gguf.dequantize(result.data, result.tensor_type), expected), name
    assert read_fields(tmp_path / "got.gguf")["llama.feed_forward_length"][1] == 32
    if block > 1:
        with pytest.raises(
            ValueError, match=r"blk\.0\.ffn_down_exps\.weight: keeps parts of blocks of 32 .*blocks=32\)"
        ):
            moe_ext.prune_gguf(tmp_path / "source.gguf", thinner(16), tmp_path / "torn.gguf", progress=False)


def test_shared_experts_keep_their_width_by_their_number(tmp_path: Path) -> None:
    """DeepSeek's: as wide as so many routed ones; half the width is twice as many."""
    fields = {name.replace("llama", "deepseek2"): value for name, value in mixtral_fields().items()}
    fields |= {
        "deepseek2.expert_feed_forward_length": (64, VALUES.UINT32),
        "deepseek2.expert_shared_count": (1, VALUES.UINT32),
    }
    tensors = mixtral_tensors()
    for layer in range(2):
        tensors[f"blk.{layer}.ffn_gate_shexp.weight"] = (numpy.ones((64, 64), numpy.float32), Kind.F32)
    write_gguf(tmp_path / "source.gguf", tensors, fields, architecture="deepseek2")
    plan = replace(thinner(1), model_type="deepseek_v3")
    moe_ext.prune_gguf(tmp_path / "source.gguf", plan, tmp_path / "got.gguf", progress=False)
    after = read_fields(tmp_path / "got.gguf")
    assert after["deepseek2.expert_feed_forward_length"][1] == 32
    assert after["deepseek2.expert_shared_count"][1] == 2
    assert after["deepseek2.feed_forward_length"][1] == 64
    wider = replace(thinner(1, width=48), model_type="deepseek_v3")
    with pytest.raises(ValueError, match="as wide as so many routed ones of 64 channels, which is no number of 48"):
        moe_ext.prune_gguf(tmp_path / "source.gguf", wider, tmp_path / "again.gguf", progress=False)


def test_layers_for_multi_token_prediction_are_left_out(source: Path, tmp_path: Path) -> None:
    fields = mixtral_fields(layers=3) | {"llama.nextn_predict_layers": (1, VALUES.UINT32)}
    write_gguf(tmp_path / "more.gguf", mixtral_tensors(Kind.Q4_0, layers=3), fields)
    with pytest.warns(UserWarning, match="nextn_predict_layers is 1; layers for multi-token prediction are left out"):
        moe_ext.prune_gguf(tmp_path / "more.gguf", PLAN, tmp_path / "got.gguf", progress=False)
    moe_ext.prune_gguf(source, PLAN, tmp_path / "expected.gguf", progress=False)
    assert read_tensors(tmp_path / "got.gguf") == read_tensors(tmp_path / "expected.gguf")
    after = read_fields(tmp_path / "got.gguf")
    assert after.pop("llama.nextn_predict_layers")[1] == 0
    assert after == read_fields(tmp_path / "expected.gguf")


def refused(source: Path, plan: Any, error: type[Exception], message: str) -> None:
    """Nothing is written, and the source stays."""
    before = {path: path.read_bytes() for path in source.parent.iterdir()}
    with pytest.raises(error, match=message):
        moe_ext.prune_gguf(source, plan, source.with_name("got.gguf"), progress=False)
    assert {path: path.read_bytes() for path in source.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (replace(PLAN, num_experts=8), "has 4 experts; the plan is for a model with 8"),
        (replace(PLAN, top_k=1), "has 2 experts a token; the plan is for a model with 1"),
        (replace(PLAN, layers=PLAN.layers[:1], keep=KEEP[:1]), "in layers 0 to 1, 2 of them; the plan is for 0 to 0"),
        (replace(PLAN, layers=("model.layers.1.mlp", "model.layers.2.mlp")), "the plan is for 1 to 2, 2 of them"),
        (replace(PLAN, keep=((0, 1), (1, 2, 3))), "its layers keep 2 to 3 experts; llama.cpp has one number"),
        (replace(PLAN, model_type="qwen3_moe"), None),
        (replace(PLAN, model_type="deepseek_v2"), "is a 'llama' model; the plan is for model type 'deepseek_v2'"),
    ],
)  # fmt: skip
def test_a_plan_for_another_model_is_refused(plan: Any, message: str | None, source: Path) -> None:
    refused(source, plan, ValueError, message or "is a 'llama' model; the plan is for model type 'qwen3_moe'")


def test_groups_of_experts_stay_alike(tmp_path: Path) -> None:
    fields = mixtral_fields() | {"llama.expert_group_count": (2, VALUES.UINT32)}
    write_gguf(tmp_path / "source.gguf", mixtral_tensors(), fields)
    refused(tmp_path / "source.gguf", PLAN, ValueError, r"'model.layers.0.mlp' keeps different numbers .* 2 groups")
    moe_ext.prune_gguf(
        tmp_path / "source.gguf", replace(PLAN, keep=((0, 2), (1, 3))), tmp_path / "got.gguf", progress=False
    )


def edited(edit: Any, tmp_path: Path) -> Path:
    tensors: Tensors = mixtral_tensors()
    fields = mixtral_fields()
    edit(tensors, fields)
    write_gguf(tmp_path / "source.gguf", tensors, fields)
    return tmp_path / "source.gguf"


def other(name: str, shape: tuple[int, ...]) -> Any:
    return lambda tensors, fields: tensors.update({name: (numpy.ones(shape, numpy.float32), Kind.F32)})


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (other("blk.0.ffn_gate_inp.weight", (5, 64)), CheckpointError, r"shape \(5, 64\); expected 4"),
        (other("blk.1.ffn_gate_chexps.weight", (4, 8)), ValueError, "gate_chexps.weight' is of a layer's experts"),
        (other("blk.0.ffn_gate.1.weight", (4, 8)), ValueError, r"'blk.0.ffn_gate.1.weight' is of a layer"),
        (lambda _, fields: fields.pop("llama.expert_count"), CheckpointError, "expert_count: expected int, got no"),
        (
            lambda tensors, fields: fields.update({"llama.block_count": ("two", VALUES.STRING)}),
            CheckpointError,
            "llama.block_count: expected int, got 'two'",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_says_is_refused_by_name(
    edit: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    refused(edited(edit, tmp_path), PLAN, error, message)


def test_a_truncated_file_is_refused_wherever_it_ends(source: Path) -> None:
    content = source.read_bytes()
    head = gguf.GGUFReader(source).data_offset
    for length in (0, 3, 4, 20, 24, 25, 100, head // 2, head - 1, head, head + 1, len(content) // 2, len(content) - 65):
        source.write_bytes(content[:length])
        refused(source, PLAN, CheckpointError, "no whole GGUF file|lies in bytes|holds no tensors")


def test_lies_about_lengths_and_places_are_refused(source: Path) -> None:
    content, generator = source.read_bytes(), numpy.random.default_rng(0)
    head, refusals = gguf.GGUFReader(source).data_offset, 0
    for _ in range(150):
        damaged = bytearray(content)
        place = int(generator.integers(4, head - 8))
        damaged[place : place + 4] = generator.integers(0, 256, 4, dtype=numpy.uint8).tobytes()
        source.write_bytes(damaged)
        out = source.with_name("got.gguf")
        try:
            moe_ext.prune_gguf(source, PLAN, out, progress=False)
        except (ValueError, CheckpointError, FileNotFoundError):
            refusals += 1
            assert not out.exists()
        else:
            out.unlink()  # a name, a text or a number that nothing depends on
    assert refusals > 20
    assert [path.name for path in source.parent.iterdir()] == ["source.gguf"]


def test_a_killed_run_leaves_no_result_and_the_next_one_writes_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part, left = shard_writer.write_part, 10

    def killed_in_the_middle(*args: Any) -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_part(*args)

    def job() -> None:
        monkeypatch.setattr(module, "write_part", killed_in_the_middle)
        moe_ext.prune_gguf(source, PLAN, tmp_path / "got.gguf", progress=False)

    assert exit_status(fork(job)) == -signal.SIGKILL
    assert not (tmp_path / "got.gguf").exists()
    moe_ext.prune_gguf(source, PLAN, tmp_path / "got.gguf", progress=False)
    moe_ext.prune_gguf(source, PLAN, tmp_path / "expected.gguf", progress=False)
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.gguf", "got.gguf", "source.gguf"]


def test_the_command_prunes_a_gguf_file(source: Path, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    done = moe_json("prune", source, tmp_path / "plan.json", "--out", tmp_path / "got.gguf")
    assert done["checkpoint"] == str(tmp_path / "got.gguf")
    moe_ext.prune_gguf(source, PLAN, tmp_path / "expected.gguf", progress=False)
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
