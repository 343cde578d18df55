"""moe-ext compare: every checkpoint as it would be measured alone, in a file that the report reads."""

import json
import multiprocessing
import os
import select
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
import moe_ext.evaluation.compare
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint, size_on_disk
from moe_ext.evaluation.compare import Compared, Setting, compare, measure, weight_bytes
from moe_ext.evaluation.results import Variant, read_variants
from moe_ext.evaluation.windows import check_same_tokens
from moe_ext.runtime.batches import read_domains
from tests.support.command_line import inside, moe_anew, moe_json
from tests.support.forked import exit_status, fork
from tests.support.letters import letter_tokenizer
from tests.support.paths import DEMO_MODEL

TEXTS = {domain: text[:1500] for domain, text in read_domains([DEMO_MODEL / "held_out"]).items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The demo model, and a pruned one that skips."""
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    layers = tuple(f"model.layers.{layer}.mlp" for layer in range(4))
    moe_ext.prune(model, moe_ext.PruningPlan("mixtral", 8, 2, layers, (tuple(range(6)),) * 4))
    moe_ext.patch(model, skip=torch.full((4, 1), 0.3))
    folder = tmp_path_factory.mktemp("checkpoints") / "pruned"
    save_checkpoint(model, tokenizer, folder)
    return str(DEMO_MODEL), str(folder)


@pytest.mark.slow
def test_the_command_compares_checkpoints(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    for domain, text in TEXTS.items():
        (tmp_path / f"{domain}.txt").write_text(text)
    out = tmp_path / "compare.json"
    options = ("--text", tmp_path, "--window", "128", "--decode-tokens", "4", "--reference", checkpoints[0])
    before = set(Path(tempfile.gettempdir()).glob("moe_ext-*"))
    result = moe_anew("compare", *checkpoints, *options, "--out", out)
    assert result.returncode == 0, result.stderr
    assert set(Path(tempfile.gettempdir()).glob("moe_ext-*")) <= before  # the reference's predictions are gone
    whole, _ = load_checkpoint(checkpoints[0])
    moe_ext.patch(whole)
    rows = [Compared(**row) for row in json.loads(out.read_text())["checkpoints"]]
    assert [row.checkpoint for row in rows] == list(checkpoints)
    for row in rows:
        model, tokenizer = load_checkpoint(row.checkpoint)
        expected = moe_ext.divergence(moe_ext.patch(model), whole, TEXTS, tokenizer, window=128)
        # The same bits from run to run, whatever the number of threads.
        assert row.perplexity == expected.perplexity.per_domain
        assert row.reference_perplexity == expected.reference_perplexity.per_domain
        assert row.top1 == expected.top1
        # By way of a file in float16: rel of what it rounds, abs where models are equal.
        assert row.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-6)
        assert row.bits_per_weight == row.weight_bytes * 8 / rows[0].parameters
        assert f"{row.mean_kl:.5f}" in result.stdout
        assert row.parameters == model.num_parameters()
        assert row.weight_bytes == size_on_disk(row.checkpoint) - _headers(row.checkpoint)
        assert row.tokens_per_second > 0
        assert row.peak_bytes is None or row.peak_bytes > row.weight_bytes
        assert f"{row.mean:.3f}" in result.stdout
    assert rows[0].skip_rate == 0 < rows[1].skip_rate
    assert read_variants(out)[1] == Variant(
        checkpoints[1], rows[1].mean, rows[1].weight_bytes, rows[1].tokens_per_second
    )


def test_a_reference_judges_beside_perplexity(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    for domain, text in TEXTS.items():
        (tmp_path / f"{domain}.txt").write_text(text)
    options = ("--text", str(tmp_path), "--window", "128")
    whole, tokenizer = load_checkpoint(checkpoints[0])
    pruned, _ = load_checkpoint(checkpoints[1])
    moe_ext.patch(whole), moe_ext.patch(pruned)
    expected = moe_ext.divergence(pruned, whole, TEXTS, tokenizer, window=128)
    assert expected.mean_kl > 0.01
    assert expected.perplexity == moe_ext.perplexity(pruned, TEXTS, tokenizer, window=128)

    found = moe_json("eval", checkpoints[1], *options, "--reference", checkpoints[0])
    assert found["kl"] == expected.kl
    assert found["top1"] == expected.top1
    assert found["perplexity"] == expected.perplexity.per_domain
    assert found["reference_mean"] == expected.reference_perplexity.mean
    stored = size_on_disk(checkpoints[1]) - _headers(checkpoints[1])
    assert found["bits_per_weight"] == stored * 8 / whole.num_parameters() < 16

    file = tmp_path / "whole.safetensors"
    assert moe_json("eval", checkpoints[0], *options, "--save-predictions", file)["mean"] == found["reference_mean"]
    # float16 rounds the reference's log-probabilities.
    from_file = moe_json("eval", checkpoints[1], *options, "--reference", file)
    assert from_file["kl"] == pytest.approx(expected.kl, rel=1e-3)
    assert (from_file["top1"], from_file["bits_per_weight"]) == (expected.top1, found["bits_per_weight"])
    itself = moe_json("eval", checkpoints[0], *options, "--reference", file)
    assert itself["mean_kl"] < 1e-6
    assert (itself["mean_top1"], itself["bits_per_weight"]) == (1.0, 16.0)


def test_the_table_shows_what_a_reference_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.txt").write_text(TEXTS["c"])
    model = str(DEMO_MODEL)
    assert inside("eval", model, "--text", str(tmp_path), "--window", "64", "--reference", model) == 0
    printed = capsys.readouterr().out
    for cell in ("KL (nats)", "0.00000", "100.00%", "bits per weight of the reference: 16.000"):
        assert cell in printed


def test_a_reference_that_cuts_text_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match="reference: its tokenizer gives other tokens of 'd' than the model's"):
        check_same_tokens({"d": "abc"}, letter_tokenizer(bos=False), letter_tokenizer(bos=True))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--tasks", "arc_easy", "--reference", "x"), "--reference and --save-predictions are for --text"),
        (("--text", "t", "--reference", "x", "--save-predictions", "y"), "give one of them"),
        (("--text", "t", "--save-predictions", f"{DEMO_MODEL}/p"), "is in the folder that the command reads"),
    ],
)
def test_references_where_there_is_no_place_for_them_are_wrong_usage(
    more: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert inside("eval", str(DEMO_MODEL), *more) == 2
    assert says in capsys.readouterr().err


def _headers(folder: str) -> int:
    """Bytes of a checkpoint's files that are no weights."""
    files = list(Path(folder).glob("*.safetensors"))
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)


def test_shared_weights_count_once() -> None:
    model, _ = load_checkpoint(DEMO_MODEL)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert weight_bytes(model) == sum(tensor.numel() * 2 for tensor in set(model.parameters()))


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_nothing_to_compare_is_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="checkpoints: expected one or more, each once"):
        next(compare(names, TEXTS, Setting()))


def test_a_checkpoint_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint folder /nowhere"):
        measure("/nowhere", TEXTS, Setting())


_PIPE: list[int] = []


def _measures_for_good(*_: Any) -> None:
    os.write(_PIPE[1], b"w")
    signal.pause()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_comparison_that_is_ended_takes_its_worker_along(end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_ext.evaluation.compare, "measure", _measures_for_good)
    forking = multiprocessing.get_context("fork")  # the worker need not import anything
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forking)
    _PIPE[:] = os.pipe()
    child = fork(lambda: list(compare(["a"], {}, Setting())))
    os.close(_PIPE[1])  # the worker and its parent have it: it ends with both of them
    assert os.read(_PIPE[0], 1) == b"w"
    os.kill(child, end)
    assert exit_status(child) == -end
    assert select.select([_PIPE[0]], [], [], 30)[0], "the worker is there still"
    assert os.read(_PIPE[0], 1) == b""
    os.close(_PIPE[0])
