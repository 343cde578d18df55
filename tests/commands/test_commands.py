"""The command line on the demo model: as a subprocess, as a user runs it, or inside this process, which is faster."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moe_ext
from moe_ext import PruningPlan, SearchResult, ops
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint
from moe_ext.evaluation.perplexity import Perplexity
from moe_ext.models.families import FAMILIES
from moe_ext.reconstruction.result import read_layers
from moe_ext.runtime import compiled_decoding
from moe_ext.runtime.batches import read_domains, token_batches
from tests.support.command_line import inside, moe, moe_json
from tests.support.paths import DEMO_MODEL
from tests.support.reference import DEVICES, WGMMA
from tests.support.report_input import demo_report

MODEL = str(DEMO_MODEL)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short domains cut from the demo model's held-out text."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("python", "english"):
        (folder / f"{name}.txt").write_text((DEMO_MODEL / "held_out" / f"{name}.txt").read_text()[:3000])
    return folder


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    file = tmp_path_factory.mktemp("statistics") / "demo.safetensors"
    result = moe("calibrate", MODEL, "--text", text, "--out", file, "--window", "128")
    assert result.returncode == 0, result.stderr
    assert re.search(r"\d+ tokens through 4 layers of 8 experts", result.stdout)
    return file


def test_calibrate_writes_what_the_library_computes(statistics: Path, text: Path) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    batches = token_batches(read_domains([text]), tokenizer, window=128)
    expected = moe_ext.calibrate(model, batches, progress=False)
    written = ExpertStatistics.load(statistics)
    assert torch.equal(written.moments, expected.moments)
    assert torch.equal(written.tokens, expected.tokens)
    assert written.dataset == "english + python"


@pytest.mark.slow
def test_report_writes_a_page_and_the_figures(statistics: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert moe("plan", statistics, "--keep", "5", "--out", plan).returncode == 0
    demo = max((DEMO_MODEL.parents[1] / "benchmarks" / "results").glob("*-demo.json"))
    search = tmp_path / "search.json"
    searched = demo_report().search
    assert searched is not None
    searched.save(search)
    result = moe(
        *("report", statistics, search, demo, "--plan", plan, "-o", tmp_path / "page.html", "--png", tmp_path / "png")
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "page.html").read_text()
    assert "12 of 32 experts are marked." in page  # three of eight in each of four layers
    assert "8→4 weighted_ean" in page
    assert '<figure id="search-losses">' in page
    assert (tmp_path / "png" / "quality-size.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_nothing_or_without_a_place_is_wrong_usage(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inside("report", str(statistics)) == 2
    assert "give --out, --png or both" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert inside("report", str(statistics), str(tmp_path / "other.json"), "-o", str(tmp_path / "page.html")) == 1
    assert "not what moe-ext compare, eval or demo writes" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_score_shows_a_table_or_json(statistics: Path) -> None:
    result = moe("score", statistics, "--objective", "task-specific")
    assert result.returncode == 0
    assert "weighted_ean" in result.stdout
    scores = moe_json("score", statistics, "--criterion", "man")
    assert scores["criterion"] == "man"
    expected = moe_ext.score(ExpertStatistics.load(statistics), "man").values
    assert list(scores["scores"].values()) == expected.tolist()


def test_the_whole_way_from_statistics_to_text(statistics: Path, text: Path, tmp_path: Path) -> None:
    plan = moe_json("plan", statistics, "--keep", "6", "--out", tmp_path / "plan.json")
    assert all(len(keep) == 6 for keep in plan["keep"].values())

    pruned = moe_json("prune", MODEL, tmp_path / "plan.json", "--out", tmp_path / "pruned")
    assert pruned["parameters"] < pruned["parameters_before"]
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["num_local_experts"] == 6

    again = moe_json("calibrate", tmp_path / "pruned", "--text", text, "--out", tmp_path / "again.safetensors")
    assert again["tokens"] > 100
    skipping = moe_json(
        "skip", tmp_path / "pruned", tmp_path / "again.safetensors", "--text", text, "--out", tmp_path / "skipping"
    )
    # The median of the same text: half of the second slots, a quarter of all.
    assert skipping["skip_rates"] == pytest.approx([0.25] * 4, abs=0.01)

    skipped = moe_json("eval", tmp_path / "skipping", "--text", text)
    unskipped = moe_json("eval", tmp_path / "skipping", "--text", text, "--no-skip")
    stock = moe_json("eval", tmp_path / "skipping", "--text", text, "--stock")
    assert skipped["skip_rate"] == pytest.approx(0.25, abs=0.01)
    assert unskipped["skip_rate"] == stock["skip_rate"] == 0.0
    # bfloat16: every layer's output is rounded to 8 bits either way.
    assert unskipped["mean"] == pytest.approx(stock["mean"], rel=5e-3)
    assert skipped["mean"] != unskipped["mean"]
    assert set(skipped["perplexity"]) == {"python", "english"}
    assert all(math.isfinite(value) for value in skipped["perplexity"].values())

    written = moe_json("generate", tmp_path / "skipping", "def ", "--max-new-tokens", "7")
    assert written["tokens"] == 7
    assert written == moe_json("generate", tmp_path / "skipping", "def ", "--max-new-tokens", "7")


def test_search_writes_the_plan_that_the_library_finds(text: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    arguments = ("search", MODEL, "--text", text, "--keep", "6", "--window", "128", "--out", plan)
    result = moe(*arguments)
    assert result.returncode == 0, result.stderr
    assert "all 28" in result.stdout
    assert re.search(r"search model\.layers\.3\.mlp.*best=", result.stderr)
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    batches = token_batches(read_domains([text]), tokenizer, window=128)
    expected = moe_ext.search(model, batches, keep=6, progress=False)
    assert PruningPlan.load(plan).keep == expected.plan.keep
    found = SearchResult.load(tmp_path / "plan.safetensors")
    assert [layer.losses.tolist() for layer in found.losses] == [layer.losses.tolist() for layer in expected.losses]
    pruned = moe_json("prune", MODEL, plan, "--out", tmp_path / "pruned")
    assert pruned["parameters"] < pruned["parameters_before"]


def test_search_by_fisher_loss_says_what_equal_counts_cost(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    domain = str(text / "python.txt")
    arguments = ("search", MODEL, "--text", domain, "--keep", "6", "--window", "128", "--loss", "fisher")
    assert inside(*arguments, "--seed", "3", "--out", str(plan)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    batches = token_batches(read_domains([Path(domain)]), tokenizer, window=128)
    expected = moe_ext.search(model, batches, keep=6, loss="fisher", seed=3, progress=False)
    assert PruningPlan.load(plan).keep == expected.plan.keep
    assert f"predicted to cost {expected.predicted():.4g} nats a token; " in printed
    assert f"{expected.predicted([6] * 4):.4g} with the same number in every layer (--equal)" in printed
    equal = moe_json(*arguments, "--seed", "3", "--equal", "--out", tmp_path / "equal.json")
    assert [len(layer["keep"]) for layer in equal["layers"].values()] == [6] * 4
    assert (equal["measure"], equal["predicted"]) == ("nats", expected.plan.made_by["predicted"])
    for wrong, message in (
        (("--equal", "--budget", "model"), "--equal is --budget layer"),
        (("--loss", "reconstruction", "--labels", "kl"), "--labels goes with --loss fisher"),
    ):
        assert inside(*arguments, *wrong, "--out", str(tmp_path / "no.json")) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "no.json").exists()


def test_search_goes_on_from_its_losses_file(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, losses = str(tmp_path / "plan.json"), str(tmp_path / "losses.safetensors")
    arguments = ("search", MODEL, "--text", str(text / "python.txt"), "--window", "128", "--losses", losses)
    gram, calls = ops.expert_gram, []

    def interrupted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) > 5:  # two batches a layer
            raise RuntimeError("the power is out")
        return gram(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "expert_gram", interrupted)
        assert inside(*arguments, "--keep", "6,5,4,4", "--out", plan) == 1
    assert "the power is out" in capsys.readouterr().err
    finished, _ = read_layers(losses)
    assert 0 < len(finished) < 4
    assert inside(*arguments, "--keep", "6,5,4,4", "--out", plan, "--json") == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [len(layer["keep"]) for layer in layers.values()] == [6, 5, 4, 4]
    assert inside(*arguments, "--keep", "6", "--out", plan) == 1
    assert "is of another search (keep differ)" in capsys.readouterr().err
    monkeypatch.setattr(ops, "expert_gram", None)
    assert inside(*arguments, "--keep", "6,5,4,4", "--out", plan, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == layers


def test_skip_in_place_changes_the_config_alone(statistics: Path, tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    save_checkpoint(model, tokenizer, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    result = moe("skip", tmp_path / "copy", statistics, "--in-place")
    assert result.returncode == 0, result.stderr
    assert "not measured" in result.stdout
    after = {path.name: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert {name for name in after if after[name] != before.get(name)} == {"config.json"}


def test_generate_streams_text_and_samples_with_a_temperature(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        sampling = ("--max-new-tokens", "12", "--temperature", "1.5", "--seed", seed)
        assert inside("generate", MODEL, "The ", *sampling) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("The ")
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_generate_compiles_what_is_repaid_and_says_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*options: str) -> tuple[int, dict[str, Any], str]:
        code = inside("generate", MODEL, "def ", "--max-new-tokens", "7", "--json", *options)
        printed = capsys.readouterr()
        return code, json.loads(printed.out or "{}"), printed.err

    def config() -> Any:
        found = transformers.CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="eager")
        found._compile_all_devices = True
        return found

    _, uncompiled, said = run()
    assert not uncompiled["compiled"]
    assert re.search(r"not compiled: repaid from about \d{4,} new tokens on", said)
    monkeypatch.setattr(compiled_decoding, "_compile_config", config)  # inductor takes half a minute
    assert run("--compile", "always") == (0, {**uncompiled, "compiled": True}, "")

    def fails(*args: Any) -> Any:
        raise RuntimeError("there is no C++ compiler")

    monkeypatch.setattr("moe_ext.commands.generate.compile_decoding", fails)
    assert run("--compile", "never") == (0, uncompiled, "")
    assert run("--compile", "always") == (1, {}, "error: there is no C++ compiler\n")
    monkeypatch.setattr("moe_ext.commands.generate.tokens_that_repay", lambda model: 7)
    assert run() == (0, uncompiled, "not compiled: there is no C++ compiler\n")


def test_a_criterion_can_be_spelled_as_a_triple(statistics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inside("score", str(statistics), "--criterion", "S(1,0,2)", "--json") == 0
    triple = json.loads(capsys.readouterr().out)["scores"]
    assert inside("score", str(statistics), "--criterion", "msan", "--json") == 0
    assert triple == json.loads(capsys.readouterr().out)["scores"]


def test_one_ranking_of_all_layers_makes_a_checkpoint_that_loads_again(
    statistics: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--ratio", "0.4", "--scope", "model", "--criterion", "frequency")
    assert inside("plan", str(statistics), *options, "--out", str(tmp_path / "plan.json"), "--json") == 0
    keep = json.loads(capsys.readouterr().out)["keep"]
    assert sum(map(len, keep.values())) == 19  # of 32
    assert len({len(kept) for kept in keep.values()}) > 1
    assert inside("prune", MODEL, str(tmp_path / "plan.json"), "--out", str(tmp_path / "pruned")) == 0
    assert "per_layer_config" in json.loads((tmp_path / "pruned" / "config.json").read_text())
    capsys.readouterr()
    assert inside("eval", str(tmp_path / "pruned"), "--text", str(text), "--json") == 0
    assert math.isfinite(json.loads(capsys.readouterr().out)["mean"])


def test_a_checkpoint_is_thinned_until_it_fits(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plan, thin = (str(tmp_path / name) for name in ("stats.safetensors", "plan.json", "thin"))
    assert inside("calibrate", MODEL, "--text", str(text), "--out", file, "--channels", "energy") == 0
    fit = ("--fit", "6.5MB", "--model", MODEL, "--out", plan)
    assert inside("plan", file, "--keep", "6", *fit, "--multiple", "16", "--blocks", "32") == 0
    said = re.search(
        r"every expert keeps \d+ of 224 channels\s+all weights will take ([\d,]+) bytes", capsys.readouterr().out
    )
    assert said
    assert inside("prune", MODEL, plan, "--out", thin, "--json") == 0
    written = json.loads(capsys.readouterr().out)["weight_bytes"]
    assert f"{written:,}" == said[1]
    config = json.loads((tmp_path / "thin" / "config.json").read_text())
    assert config["intermediate_size"] % 32 == 0
    # 32 channels more of 6 experts in each layer would not fit.
    more = config["num_hidden_layers"] * 6 * 32 * 3 * config["hidden_size"] * 2
    assert written <= 6_500_000 < written + more
    assert inside("eval", thin, "--text", str(text), "--json") == 0
    assert math.isfinite(json.loads(capsys.readouterr().out)["mean"])
    plan_before = (tmp_path / "plan.json").read_bytes()
    assert inside("plan", file, "--fit", "1kB", "--model", MODEL, "--out", plan) == 1
    assert "fit: expected" in capsys.readouterr().err
    assert inside("plan", file, "--fit", "48", "--model", MODEL, "--out", plan) == 1
    assert "fit: expected a number of bytes such as 48GB or 44.7GiB, got '48'" in capsys.readouterr().err
    assert (tmp_path / "plan.json").read_bytes() == plan_before


def test_statistics_without_sums_over_channels_say_how_to_make_them(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text("{}")
    before = statistics.read_bytes()
    for options in (
        ("--size", "0.5"),
        ("--channels", "64"),
        ("--fit", "5MB", "--model", MODEL),
        ("--size", "0.5", "--keep", "6"),
    ):
        assert inside("plan", str(statistics), *options, "--out", str(tmp_path / "plan.json")) == 1
        assert "stats: hold no sums over channels; calibrate(..., channels=" in capsys.readouterr().err
    assert (tmp_path / "plan.json").read_text() == "{}"
    assert statistics.read_bytes() == before


def test_aimer_scores_a_checkpoint_without_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    assert inside("score", MODEL, "--criterion", "aimer", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores["scores"].values()) == moe_ext.aimer(load_checkpoint(DEMO_MODEL)[0]).values.tolist()


def test_mone_and_its_means_take_statistics_with_outputs(
    statistics: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inside("score", str(statistics), "--criterion", "mone") == 1
    assert "criterion 'mone' needs the sums of outputs" in capsys.readouterr().err
    file = str(tmp_path / "outputs.safetensors")
    assert inside("calibrate", MODEL, "--text", str(text), "--out", file, "--window", "64", "--outputs") == 0
    capsys.readouterr()
    assert inside("score", file, "--criterion", "mone", "--json") == 0
    assert all(value > 0 for row in json.loads(capsys.readouterr().out)["scores"].values() for value in row)
    plan = str(tmp_path / "plan.json")
    assert inside("plan", file, "--criterion", "mone", "--keep", "6", "--out", plan) == 0
    assert inside("prune", MODEL, plan, "--novices", file, "--out", str(tmp_path / "pruned")) == 0
    capsys.readouterr()
    assert inside("eval", str(tmp_path / "pruned"), "--text", str(text), "--json") == 0
    assert math.isfinite(json.loads(capsys.readouterr().out)["mean"])


def test_redundancy_shows_pairs_that_the_library_finds(statistics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inside("redundancy", str(statistics), "--most", "2", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    pairs = moe_ext.redundant_pairs(ExpertStatistics.load(statistics), 2)
    assert [(pair["layer"], pair["first"], pair["second"], pair["overlap"]) for pair in shown] == [
        (pair.layer, pair.first, pair.second, pair.overlap) for pair in pairs
    ]
    assert inside("redundancy", str(statistics)) == 0
    assert f"{pairs[0].overlap:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "message"), [({"top_k": 3}, "top_k 3 and 2"), ({"model_type": "olmoe"}, "'olmoe'")])
def test_statistics_that_do_not_fit_the_model_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"model_type": "mixtral", "top_k": 2, **change}
    layers = tuple(f"model.layers.{layer}.mlp" for layer in range(4))
    stats = ExpertStatistics.zeros(layers=layers, num_experts=8, gate="softmax", **fields)
    stats.save(tmp_path / "stats.safetensors")
    assert inside("skip", MODEL, str(tmp_path / "stats.safetensors"), "--out", str(tmp_path / "out")) == 1
    assert f"is of another model: {'model_type' if 'model_type' in change else 'top_k'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_are_refused(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    plan = moe_ext.plan(moe_ext.score(ExpertStatistics.load(statistics)), keep=5)
    save_checkpoint(moe_ext.prune(model, plan), tokenizer, tmp_path / "pruned")
    assert inside("skip", str(tmp_path / "pruned"), str(statistics), "--in-place") == 1
    assert "is of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", MODEL, "--text", "text.txt", "--out", "nosuch/s.safetensors"),
        ("search", MODEL, "--text", "text.txt", "--keep", "6", "--out", "nosuch/plan.json"),
        ("search", MODEL, "--text", "text.txt", "--keep", "6", "--out", "plan.json", "--losses", "full"),
        ("prune", MODEL, "plan.json", "--out", "full"),
        ("skip", MODEL, "stats.safetensors", "--out", "full"),
        ("skip", "owner/name", "stats.safetensors", "--in-place"),
    ],
)
def test_a_destination_that_cannot_be_written_is_found_before_the_work(
    arguments: tuple[str, ...], statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "stats.safetensors").write_bytes(statistics.read_bytes())
    moe_ext.plan(moe_ext.score(ExpertStatistics.load(statistics)), keep=6).save(tmp_path / "plan.json")

    def too_late(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("moe_ext.checkpoints.load_save.from_pretrained", too_late)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert inside(*arguments) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_broken_checkpoint_is_one_line_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert inside("generate", str(tmp_path / "broken"), "The ") == 1
    assert capsys.readouterr().err.strip().count("\n") <= 1


def test_info_says_what_was_built_and_what_runs() -> None:
    facts = moe_json("info")
    assert facts["moe_ext"] == moe_ext.__version__
    assert facts["torch"] == torch.__version__
    assert facts["cpu_variants"]["portable"] == "runs here"
    assert facts["cpu_variant_in_use"] in facts["cpu_variants"]
    assert facts["model_families"] == list(FAMILIES)
    table = moe("info")
    assert table.returncode == 0
    assert "cuda_archs" in table.stdout


@pytest.mark.skipif("cuda" in DEVICES, reason="there is a GPU")
def test_info_about_a_layer_needs_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert inside("info", "--layer", "64,96,8,2") == 2
    assert "it needs a CUDA device" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert inside("info", "--layer", "64,96") == 1
    assert "shape '64,96'" in capsys.readouterr().err


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and moe_ext built with CUDA kernels")
def test_info_says_which_cuda_kernels_a_layer_takes() -> None:
    kernels = moe_json("info", "--layer", "4096,14336,8,2")["cuda_kernels"]
    assert kernels["T = 1"].startswith(f"small_batch: at most {1 if WGMMA else 16} tokens")
    assert ("gate_up hopper (wgmma)" if WGMMA else "gate_up mma.sync") in kernels["T = 4096"]
    assert "1024 rows an expert" in kernels["T = 4096"]
    quantised = moe_json("info", "--layer", "4096,14336,8,2", "--weights", "int4")["cuda_kernels"]
    assert quantised["T = 1"].startswith("int4 weights, small_batch: at most 16 tokens")
    assert ("gate_up hopper (wgmma)" if WGMMA else "no wgmma: it needs") in quantised["T = 4096"]
    odd = moe_json("info", "--layer", "4100,14336,8,2")["cuda_kernels"]
    assert odd["T = 1"] == "plain, without tensor cores: H and I are not multiples of 8"


# ---- names and numbers out of anybody's files


def test_names_are_shown_as_they_are_and_are_never_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console.Console.width", 200)
    stats = ExpertStatistics.zeros("mixtral", ("layer[/b]", ":smile:\x1b[2J"), 4, 2, "softmax")
    stats.tokens += 1
    stats.save(tmp_path / "stats.safetensors")
    for name in ("plan[v2].json", "[bold]plan.json", os.fsdecode(b"plan\xff.json")):
        assert inside("plan", str(tmp_path / "stats.safetensors"), "--keep", "3", "--out", str(tmp_path / name)) == 0
        printed = capsys.readouterr().out
        assert name.replace("\udcff", "\\udcff") in printed
        assert "layer[/b]" in printed
        assert r":smile:\x1b[2J" in printed
        assert PruningPlan.load(tmp_path / name).layers == stats.layers
    assert inside("score", str(tmp_path / "no[/b].safetensors")) == 1
    assert "no[/b].safetensors" in capsys.readouterr().err
    assert inside("eval", "./no[/b]", "--text", str(DEMO_MODEL / "held_out")) == 1
    assert "there is no checkpoint folder ./no[/b]" in capsys.readouterr().err


def test_an_error_is_one_short_line_whatever_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = PruningPlan("mixtral", 4, 2, ("x" * 400_000,), ((0, 1),))
    plan.save(tmp_path / "plan.json")
    assert inside("prune", MODEL, str(tmp_path / "plan.json"), "--out", str(tmp_path / "pruned")) == 1
    printed = capsys.readouterr().err
    assert "the plan has 1 layers from 'xxx" in printed
    assert len(printed) <= 520


def test_a_perplexity_that_is_no_number_is_null_and_fails(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Perplexity({"english": 2.0, "python": math.nan}, math.nan, {"english": 5, "python": 6})
    monkeypatch.setattr("moe_ext.commands.evaluate.perplexity", lambda *_, **__: found)
    assert inside("eval", MODEL, "--text", str(text), "--json") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["perplexity"] == {"english": 2.0, "python": None}
    assert "NaN" not in printed.out
    assert "the perplexity of 'python' is nan" in printed.err


# ---- errors


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("prune",),
        ("nonsense",),
        ("plan", "stats.safetensors", "--out", "plan.json"),
        ("plan", "stats.safetensors", "--out", "plan.json", "--keep", "6", "--ratio", "0.5"),
        ("plan", "stats.safetensors", "--out", "plan.json", "--keep", "six"),
        ("plan", "stats.safetensors", "--out", "plan.json", "--size", "0.5", "--channels", "64"),
        ("plan", "stats.safetensors", "--out", "plan.json", "--size", "0.5", "--fit", "1GB", "--model", MODEL),
        ("plan", "stats.safetensors", "--out", "plan.json", "--fit", "1GB"),
        ("plan", "stats.safetensors", "--out", "plan.json", "--size", "0.5", "--model", MODEL),
        ("plan", "stats.safetensors", "--out", "plan.json", "--keep", "6", "--blocks", "16"),
        ("search", MODEL, "--text", "text.txt", "--out", "plan.json"),
        ("search", MODEL, "--text", "text.txt", "--out", "plan.json", "--keep", "6", "--ratio", "0.5"),
        ("search", MODEL, "--text", "text.txt", "--out", "plan.json", "--keep", "6,five"),
        ("search", MODEL, "--text", "text.txt", "--out", "plan.json", "--keep", "6", "--scratch", "."),
        ("search", MODEL, "--text", "text.txt", "--out", "plan.json", "--keep", "6", "--method", "best"),
        ("skip", MODEL, "stats.safetensors"),
        ("score", "stats.safetensors", "--criterion", "man", "--objective", "task-agnostic"),
        ("eval", MODEL),
        ("eval", MODEL, "--text", "text.txt", "--dtype", "int4"),
        ("score", "stats.safetensors", "--criterion", "best"),
        ("plan", "stats.safetensors", "--keep", "4", "--out", "plan.json", "--normalise", "max"),
        ("score", MODEL, "--criterion", "aimer", "--seed", "1"),
        ("score", "stats.safetensors", "--objective", "speed"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert inside(*arguments) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("calibrate", "./nosuch", "--text", "text.txt", "--out", "s"), "there is no checkpoint folder ./nosuch"),
        (("calibrate", MODEL, "--text", "nosuch.txt", "--out", "s"), "text nosuch.txt does not exist"),
        (("score", "nosuch.safetensors"), "nosuch.safetensors"),
        (("score", "text.txt"), "text.txt: truncated, or not a safetensors file"),
        (("prune", MODEL, "text.txt", "--out", "pruned"), "text.txt"),
        (("search", MODEL, "--text", "text.txt", "--keep", "9", "--out", "p"), "keep: 9 keeps 9 of 8 experts"),
        (("search", MODEL, "--text", "text.txt", "--keep", "6", "--skip", "--out", "p"), "holds no skip thresholds"),
        (
            ("search", MODEL, "--text", "text.txt", "--keep", "6", "--skip", "--sequential", "--out", "p"),
            "holds no skip thresholds",
        ),
        (("demo", "--model", "."), ". is not the demo model (it has no folder 'held_out')"),
    ],
)
def test_a_failed_job_exits_with_1_and_says_why_in_two_lines(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text("no statistics, no plan")
    monkeypatch.chdir(tmp_path)
    assert inside(*arguments) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown[shown.index("error:") :].strip().splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_only_debug_shows_the_traceback(tmp_path: Path) -> None:
    plain = moe("score", "nosuch.safetensors", cwd=tmp_path)
    debug = moe("--debug", "score", "nosuch.safetensors", cwd=tmp_path)
    assert (plain.returncode, debug.returncode) == (1, 1)
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr


@pytest.mark.slow
def test_an_interrupted_calibration_leaves_no_statistics_and_says_where_it_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_ext", "calibrate", MODEL, "--text", str(DEMO_MODEL / "calibration")]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "s.safetensors"), "--batch-size", "1", "--window", "64"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    shown = ""
    while not re.search(r"\D[1-9]\d*/\d", shown):  # the progress bar: it has calibrated
        character = process.stderr.read(1)
        assert character, shown
        shown += character
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) != 0
    assert [path.name for path in tmp_path.iterdir()] == [".s.safetensors.0.partial"]
    assert "goes on from there" in said


def test_a_checkpoint_folder_goes_all_the_way_with_one_layer_in_memory(
    statistics: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scratch").mkdir()
    file = tmp_path / "stats.safetensors"
    options = ["--window", "128", "--sequential", "--json"]
    scratch = ["--scratch", str(tmp_path / "scratch")]
    assert inside("calibrate", MODEL, "--text", str(text), "--out", str(file), *options, *scratch) == 0
    got, expected = ExpertStatistics.load(file), ExpertStatistics.load(statistics)
    assert all(torch.equal(tensor, got.tensors()[name]) for name, tensor in expected.tensors().items())
    assert (got.shards, got.model_digest) == (expected.shards, expected.model_digest)
    plan = str(tmp_path / "plan.json")
    assert inside("search", MODEL, "--text", str(text), "--keep", "7", "--out", plan, *options, *scratch) == 0
    assert list((tmp_path / "scratch").iterdir()) == []
    pruned = ("prune", MODEL, "--plan", plan, "--out", str(tmp_path / "pruned"), "--shard-size", "0.002", "--json")
    assert inside(*pruned) == 0
    assert len(list((tmp_path / "pruned").glob("model-*.safetensors"))) > 2
    assert load_checkpoint(tmp_path / "pruned")[1]("def f(x):")["input_ids"]
    capsys.readouterr()
    assert inside("search", "no/such", "--text", str(text), "--keep", "7", "--out", plan, *options) == 1
    assert "--sequential needs a checkpoint folder" in capsys.readouterr().err
    assert inside("prune", MODEL, plan, "--plan", plan, "--out", str(tmp_path / "again")) == 2
    assert inside("calibrate", MODEL, "--text", str(text), "--out", str(file), *scratch) == 2
