"""The demo, end to end on the demo model with little text and few variants."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_ext import SearchResult, patch
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.commands import demo
from moe_ext.decision.pruning_plan import PruningPlan
from tests.support.paths import DEMO_MODEL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What run returned and the folder that it filled."""
    folder = tmp_path_factory.mktemp("demo")
    model = folder / "model"
    shutil.copytree(DEMO_MODEL, model)
    for text in model.glob("*/*.txt"):
        text.write_text(text.read_text()[:1200])
    fewer = {"KEEPS": (6,), "SIZES": (0.75,), "RANDOM_SEEDS": (0, 1), "DECODE_TOKENS": 2, "DECODE_ROUNDS": 1}
    with pytest.MonkeyPatch.context() as changed:
        for name, value in fewer.items():
            changed.setattr(demo, name, value)
        return demo.run(model, folder / "out", progress=False), folder / "out"


def test_the_table_holds_every_variant(finished: tuple[dict[str, Any], Path]) -> None:
    result, _ = finished
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "unpruned, transformers",
        "unpruned",
        "8→6 man",
        "8→6 weighted_ean",
        "8→6 reap",
        "8→6 frequency",
        "8→6 search layerwise",
        "8→6 search progressive",
        "8→6 random (mean of 2)",
        "thin 75%",
        "thin 75% + refit",
        "thin 75% obs + refit",
        "thin 75% + refit + skip",
        "skip at the median",
        "8→6 weighted_ean + skip",
    ]
    stock, patched, man = rows["unpruned, transformers"], rows["unpruned"], rows["8→6 man"]
    assert patched["mean"] == pytest.approx(stock["mean"], rel=5e-3)  # bfloat16 rounding, averaged over the tokens
    assert man["parameters"] < patched["parameters"]
    assert man["file_bytes"] < patched["file_bytes"]
    thin, fitted = rows["thin 75%"], rows["thin 75% + refit"]
    assert thin["parameters"] == fitted["parameters"] < patched["parameters"]
    assert patched["mean"] < fitted["mean"] < thin["mean"]
    assert stock["skipped"] == man["skipped"] == 0
    assert 0.15 < rows["skip at the median"]["skipped"] < 0.35
    assert stock["speed"] == 1.0
    assert rows["8→6 random (mean of 2)"]["speed"] is None
    searched = [SearchResult.load(finished[1] / f"search-{method}-6.safetensors") for method in demo.SEARCHES]
    assert all(result.is_exact() and len(kept) == 6 for result in searched for kept in result.plan.keep)
    assert all(row["speed"] > 0 for row in rows.values() if row["speed"] is not None)


def test_the_files_are_where_the_demo_says(finished: tuple[dict[str, Any], Path]) -> None:
    result, output = finished
    files = {name: Path(path) for name, path in result["files"].items()}
    assert all(path.is_relative_to(output) for path in files.values())
    assert json.loads((output / "demo.json").read_text(encoding="utf-8")) == result
    assert files["heat maps"].read_bytes().startswith(b"\x89PNG")
    page = files["report"].read_text(encoding="utf-8")
    assert all(f'<figure id="{name}">' in page for name in ("scores-man", "search-losses", "quality-speed"))
    stats, plan = ExpertStatistics.load(files["statistics"]), PruningPlan.load(files["plan"])
    assert plan.layers == stats.layers
    by_domain = ExpertStatistics.load(files["statistics by domain"])
    assert {name: int(part.tokens[0]) for name, part in by_domain.domains.items()} == result["chats"]["tokens"]
    chats, text = result["chats"]["tokens"].values()
    assert abs(chats - text) <= demo.WINDOW
    assert -1 <= result["chats"]["rank_agreement"] <= 1
    model, _ = load_checkpoint(files["pruned checkpoint"])
    assert model.config.num_local_experts == 6
    assert len(model.config.moe_ext["skip_thresholds"]) == len(stats.layers)


def test_the_table_prints_every_row_whole(finished: tuple[dict[str, Any], Path]) -> None:
    result, _ = finished
    console = Console(width=130)
    with console.capture() as captured:
        console.print(demo.table_of(result))
    assert "…" not in captured.get()
    assert all(row["name"] in captured.get() for row in result["rows"])


def test_a_second_run_keeps_the_first_runs_checkpoint(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    (tmp_path / "pruned-6").mkdir()
    (tmp_path / "pruned-6" / "mine").write_text("precious")
    shared = demo.Demo.__new__(demo.Demo)
    shared.model, shared.tokenizer = model, tokenizer
    shared.prompt = tokenizer("def f(", return_tensors="pt")
    folder = demo._save_and_reload(shared, patch(model), tmp_path / "pruned-6")
    assert folder == tmp_path / "pruned-6-2"
    assert (tmp_path / "pruned-6" / "mine").read_text() == "precious"
