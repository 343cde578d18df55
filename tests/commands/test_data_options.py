"""``--data`` and what goes with it, on every command that reads text."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.data import stream
from moe_ext.evaluation.compare import Setting, measure
from moe_ext.runtime.batches import read_domains
from tests.support.command_line import inside, moe_json
from tests.support.paths import DEMO_MODEL

MODEL = str(DEMO_MODEL)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Chats, one of them bad, texts and a template, in the working folder."""
    text = next(iter(read_domains([DEMO_MODEL / "calibration"]).values()))
    parts = [text[start : start + 300] for start in range(0, 6000, 300)]
    answer = {"role": "assistant", "content": "Yes."}
    lines = [json.dumps({"messages": [{"role": "user", "content": part}, answer]}) for part in parts]
    (tmp_path / "chat.jsonl").write_text("\n".join([*lines[:3], '{"messages": 3}', *lines[3:]]))
    (tmp_path / "prose.jsonl").write_text("\n".join(json.dumps({"text": part}) for part in parts))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHAT = ("--data", "chat.jsonl", "--template", "chat.jinja", "--skip-bad-rows", "--window", "128")


def test_calibrate_keeps_domains_that_score_and_plan_choose_from(folder: Path) -> None:
    said = moe_json(
        *("calibrate", MODEL, "--data", "talk=chat.jsonl@3", "--data", "prose.jsonl@1", "--template", "chat.jinja"),
        *("--skip-bad-rows", "--tokens", "2k", "--seed", "1", "--window", "128", "--batch-tokens", "512", "--packing"),
        *("--out", "stats.safetensors"),
    )
    assert said["tokens"] == 2000 == sum(said["domains"].values())
    assert said["domains"]["talk"] == pytest.approx(1500, abs=128)
    assert said["data"]["bad"] == 1
    assert said["data"]["first_bad"] == ["chat.jsonl, line 4: 'messages' is 3; expected a list of messages"]
    assert 0 <= said["waiting"] <= 1
    stats = ExpertStatistics.load("stats.safetensors")
    assert stats.dataset == "talk + prose"
    assert len(stats.shards[0]) == 12
    model, tokenizer = load_checkpoint(MODEL)
    batches = moe_ext.data.batches(
        ["talk=chat.jsonl@3", "prose.jsonl@1"],
        tokenizer,
        template="chat.jinja",
        skip_bad_rows=True,
        tokens=2000,
        seed=1,
        window=128,
        batch_tokens=512,
        packing=True,
    )
    expected = moe_ext.calibrate(model, batches, progress=False)
    assert torch.equal(stats.moments, expected.moments)
    scores = moe_json("score", "stats.safetensors", "--domain", "talk", "--criterion", "man")["scores"]
    assert list(scores.values()) == moe_ext.score(expected.domains["talk"], "man").values.tolist()
    plan = moe_json("plan", "stats.safetensors", "--balance", "--keep", "6", "--out", "plan.json")
    assert plan["keep"] == dict(
        zip(stats.layers, map(list, moe_ext.plan(moe_ext.score(expected.balanced()), keep=6).keep), strict=True)
    )


def test_every_command_that_reads_text_reads_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = (*CHAT, "--samples", "4")
    moe_json("calibrate", MODEL, *few, "--out", "stats.safetensors")
    sequential = moe_json("calibrate", MODEL, *few, "--sequential", "--out", "walked.safetensors")
    assert sequential["domains"] == {"chat": int(ExpertStatistics.load("stats.safetensors").tokens[0])}
    one, other = (ExpertStatistics.load(f"{name}.safetensors").every_tensor() for name in ("stats", "walked"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    capsys.readouterr()
    plan = moe_json("search", MODEL, *few, "--keep", "7", "--seed", "2", "--out", "plan.json")
    assert len(plan["layers"]) == 4
    skipping = moe_json("skip", MODEL, "stats.safetensors", *few, "--out", "skipping")
    assert 0.1 < skipping["skip_rates"][0] < 0.4
    moe_json("prune", MODEL, "plan.json", "--refit", *few, "--out", "pruned")
    # Each of the three says it; the files of the calibrations' results did.
    assert capsys.readouterr().err.count("1 rows that could not be read, left out\n  chat.jsonl, line 4: ") == 3
    for command in (("eval", "pruned"), ("eval", "pruned", "--reference", MODEL)):
        found = moe_json(*command, *few)
        assert found["data"]["bad"] == 1
        assert set(found["perplexity"]) == {"chat"}
    assert found["mean_kl"] > 0
    smaller = moe_json("compress", MODEL, *few, "--method", "experts", "--keep", "7", "--no-refit", "--out", "seven")
    assert set(smaller["kl"]) == {"chat"}
    assert smaller["after"]["parameters"] < smaller["before"]["parameters"]


def test_a_checkpoint_is_measured_on_documents_that_its_template_wrote(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = load_checkpoint(MODEL)
    texts, _ = moe_ext.data.documents("chat.jsonl", tokenizer, template="chat.jinja", skip_bad_rows=True, samples=3)
    row = measure(MODEL, texts, Setting(window=64, decode_tokens=1))
    assert row.perplexity == {"chat": pytest.approx(row.mean)}
    # In this process: starting others is tested where all commands are.
    inline = lambda models, texts, setting: [measure(model, texts, setting) for model in models]  # noqa: E731
    monkeypatch.setattr("moe_ext.commands.compare.run_comparison", inline)
    alone = moe_json("compare", MODEL, *CHAT[:-2], "--samples", "3", "--window", "64", "--decode-tokens", "1")
    assert alone["checkpoints"][0]["perplexity"] == pytest.approx(row.perplexity)


def test_evaluated_rows_are_documents_of_their_own(folder: Path) -> None:
    found = moe_json("eval", MODEL, *CHAT, "--samples", "5")
    model, tokenizer = load_checkpoint(MODEL)
    texts, _ = moe_ext.data.documents("chat.jsonl", tokenizer, template="chat.jinja", skip_bad_rows=True, samples=5)
    assert len(texts["chat"]) == 5
    assert found["perplexity"] == moe_ext.perplexity(moe_ext.patch(model), texts, tokenizer, window=128).per_domain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "chat.jinja", "--data", "prose.jsonl"), "give --text or --data, one of them"),
        ((), "give --text or --data"),
        (("--text", "chat.jinja", "--tokens", "4"), "--tokens goes with --data"),
        (("--text", "chat.jinja", "--skip-bad-rows"), "--skip-bad-rows goes with --data"),
        (
            ("--data", "prose.jsonl", "--tokens", "many"),
            "--tokens many: expected a number of tokens, such as 500k",
        ),
    ],
)
def test_wrong_usage_is_said_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert inside("calibrate", "no-such-model", *arguments, "--out", "stats.safetensors") == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none.jsonl"), "data none.jsonl does not exist"),
        (("--data", "chat.jsonl", "--template", "chat.jinja"), "chat.jsonl, line 4: 'messages' is 3; expected a list"),
        (("--data", "chat.jsonl"), "has no chat template"),
        (("--data", "prose.jsonl", "--columns", "text=body"), "prose.jsonl, line 1: has no column 'body', only"),
        (("--data", "prose.jsonl", "--window", "99999"), "window: expected no more than the model's"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert inside("calibrate", MODEL, *arguments, "--out", "stats.safetensors") == 1
    assert message in capsys.readouterr().err
    assert not (folder / "stats.safetensors").exists()


def test_data_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "prose.jsonl").read_bytes()
    for source in ("prose.jsonl", "a=prose.jsonl@2", ".:prose*"):
        assert inside("calibrate", MODEL, "--data", source, "--out", "prose.jsonl") == 2
        assert "is what the command reads (data)" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert (folder / "prose.jsonl").read_bytes() == before


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("calibrate", MODEL, *CHAT, "--batch-size", "2")
    assert inside(*command, "--out", "whole.safetensors") == 0
    each = stream.Batches.__iter__

    def stopping(self: stream.Batches) -> Iterator[dict[str, Any]]:
        for index, batch in enumerate(each(self)):
            if index == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(stream.Batches, "__iter__", stopping)
    capsys.readouterr()
    assert inside(*command, "--out", "stats.safetensors") == 130
    said = capsys.readouterr().err
    partial = folder / ".stats.safetensors.0.partial"
    assert f"interrupted after 3 batches, which are in {partial}: the same call goes on from there" in said
    assert partial.is_file()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert inside(*command, "--out", "stats.safetensors") == 0
    assert (folder / "stats.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()
    assert not partial.exists()
