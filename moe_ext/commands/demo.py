"""The main job, end to end, on the demo model: what ``moe-ext demo`` runs.

Calibrates a really trained Mixtral, prunes it by several criteria and by reconstruction search, skips weak experts,
saves and reloads the result with stock transformers, and compares all variants by size, held-out perplexity per domain,
share of slots skipped, and decode speed relative to the unpatched model in the same run.
"""

import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PreTrainedModel

from moe_ext.binary import _C
from moe_ext.calibration.calibrate import calibrate
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint, size_on_disk
from moe_ext.commands.demo_chats import calibrate_on_chats
from moe_ext.commands.options import Json, destination
from moe_ext.commands.output import out, print_json
from moe_ext.decision.criteria import score
from moe_ext.decision.plan import plan
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.decision.thin_plan import thin_plan
from moe_ext.decision.thresholds import skip_thresholds
from moe_ext.evaluation.perplexity import perplexity
from moe_ext.evaluation.results import Variant
from moe_ext.pruning.prune import prune
from moe_ext.reconstruction.result import SearchResult
from moe_ext.reconstruction.search import search
from moe_ext.report.canvas import need
from moe_ext.report.heat_maps import heat_maps
from moe_ext.report.page import write_page
from moe_ext.report.sections import Report
from moe_ext.runtime.batches import read_domains, token_batches
from moe_ext.runtime.patching import patch, unpatch
from moe_ext.runtime.skipping import count_skips
from moe_ext.storage.files import replace_file
from moe_ext.storage.machine import processor
from moe_ext.version import __version__

KEEPS = (6, 4)
# Thinner experts: share of their parameters that is left, and what the channels are chosen by.
SIZES = (0.75, 0.5)
SELECTIONS: tuple[tuple[Literal["energy", "obs"], str], ...] = (("energy", ""), ("obs", " obs"))
MULTIPLE = 8  # of their widths: the model's experts have 224 channels
CRITERIA = ("man", "weighted_ean", "reap", "frequency")
SEARCHES: tuple[Literal["layerwise", "progressive"], ...] = ("layerwise", "progressive")
DATASET = "demo calibration text"
SAVED = "weighted_ean"  # calibrated and evaluated on the same domains, which is what this criterion is for
RANDOM_SEEDS = (0, 1, 2)
# Evaluation that fits three minutes on two cores: the first part of each held-out text, every token scored once.
CHARACTERS_PER_DOMAIN = 16_000
WINDOW, STRIDE = 256, 192
DECODE_TOKENS, DECODE_ROUNDS = 32, 7


@dataclass
class Row:
    """One line of the table: a variant of the model and what was measured on it."""

    name: str
    parameters: int
    file_bytes: int
    perplexity: dict[str, float]
    mean: float
    skipped: float
    speed: float | None = None  # decode tokens/s over the unpatched model's; None: the mean of several variants


class Demo:
    """The inputs that every variant shares, and the steps that measure one."""

    def __init__(self, folder: Path) -> None:
        for name in ("held_out", "calibration"):
            if not (folder / name).is_dir():
                raise FileNotFoundError(
                    f"{folder} is not the demo model (it has no folder {name!r}); run from moe_ext's source folder, "
                    "or pass --model"
                )
        self.model, self.tokenizer = load_checkpoint(folder)
        held_out = read_domains([folder / "held_out"])
        self.texts = {domain: text[:CHARACTERS_PER_DOMAIN] for domain, text in held_out.items()}
        self.calibration = list(
            token_batches(read_domains([folder / "calibration"]), self.tokenizer, window=WINDOW, batch_size=16)
        )
        self.prompt = self.tokenizer(next(iter(held_out.values()))[:400], return_tensors="pt")

    def statistics(self, model: PreTrainedModel, channels: Literal["gram"] | None = None) -> ExpertStatistics:
        return calibrate(model, self.calibration, progress=False, dataset=DATASET, channels=channels)

    def pruned(self, plan: PruningPlan, *, refit: bool = False) -> PreTrainedModel:
        return prune(copy.deepcopy(self.model), plan, refit=self.calibration if refit else None)

    def row(self, name: str, model: PreTrainedModel) -> Row:
        with count_skips(model) as count:
            quality = perplexity(model, self.texts, self.tokenizer, window=WINDOW, stride=STRIDE, batch_size=16)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = size_on_disk(folder)
        return Row(name, model.num_parameters(), size, quality.per_domain, quality.mean, count.rate())

    def decode_seconds(self, model: PreTrainedModel) -> float:
        start = time.perf_counter()
        model.generate(**self.prompt, max_new_tokens=DECODE_TOKENS, min_new_tokens=DECODE_TOKENS, do_sample=False)
        return time.perf_counter() - start

    def relative_speeds(self, models: Mapping[str, PreTrainedModel], baseline: PreTrainedModel) -> dict[str, float]:
        """Decode speed of each model over the baseline's: medians of ratios taken in interleaved rounds."""
        ratios: dict[str, list[float]] = {name: [] for name in models}
        for attempt in range(DECODE_ROUNDS + 1):
            for name, model in models.items():
                ratio = self.decode_seconds(baseline) / self.decode_seconds(model)
                if attempt > 0:  # the first round warms up
                    ratios[name].append(ratio)
        return {name: statistics.median(values) for name, values in ratios.items()}


def mean_row(name: str, rows: list[Row]) -> Row:
    """Means of several variants of one size."""
    return Row(
        name,
        rows[0].parameters,
        rows[0].file_bytes,
        {domain: statistics.fmean(row.perplexity[domain] for row in rows) for domain in rows[0].perplexity},
        statistics.fmean(row.mean for row in rows),
        statistics.fmean(row.skipped for row in rows),
    )


def run(folder: Path, output: Path, *, progress: bool = True) -> dict[str, Any]:
    """Runs the demo and leaves its files in ``output`` (created; files of an earlier run are replaced).

    Args:
        folder: the demo model: a Mixtral checkpoint with ``held_out`` and ``calibration`` text.
        output: where ``statistics.safetensors``, ``chats.jsonl``, ``domains.safetensors``, ``plan.json``,
            ``search-<method>-<n>.safetensors``, ``scores.png``, ``report.html``, ``demo.json`` and a new
            ``pruned-<n>`` checkpoint go.
        progress: whether to show what is under way.

    Returns:
        What is also in ``demo.json``: machine, versions, date, one entry per row, and the files by name.

    Raises:
        FileNotFoundError: ``folder`` is not the demo model.
        ImportError: matplotlib or jinja2 is missing.
        RuntimeError: the checkpoint that stock transformers reloaded gives other logits than the one saved.
    """
    need("matplotlib", "jinja2")  # at the end, which is minutes away
    demo = Demo(folder)
    output.mkdir(parents=True, exist_ok=True)
    bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), disable=not progress)
    with bar:
        task = bar.add_task("")
        return _run(demo, folder, output, lambda what: bar.update(task, description=what))


def _run(demo: Demo, folder: Path, output: Path, say: Callable[[str], None]) -> dict[str, Any]:
    say("calibrating")
    stats = demo.statistics(demo.model, channels="gram")
    stats.save(output / "statistics.safetensors")
    scores = {criterion: score(stats, criterion) for criterion in CRITERIA}
    plans = {(criterion, keep): plan(scores[criterion], keep=keep) for keep in KEEPS for criterion in CRITERIA}

    say("evaluating the unpruned model")
    rows = [demo.row("unpruned, transformers", demo.model)]
    searches: dict[tuple[str, int], SearchResult] = {}
    models: dict[str, PreTrainedModel] = {}

    def add(name: str, model: PreTrainedModel) -> None:
        say(f"evaluating: {name}")
        models[name] = model
        rows.append(demo.row(name, model))

    add("unpruned", patch(copy.deepcopy(demo.model)))
    for keep in KEEPS:
        for criterion in CRITERIA:
            add(f"8→{keep} {criterion}", patch(demo.pruned(plans[criterion, keep])))
        for method in SEARCHES:
            say(f"searching: 8→{keep} {method}")
            found = search(demo.model, demo.calibration, keep=keep, method=method, progress=False, dataset=DATASET)
            searches[method, keep] = found
            found.save(output / f"search-{method}-{keep}.safetensors")
            add(f"8→{keep} search {method}", patch(demo.pruned(found.plan)))
        say(f"evaluating: 8→{keep} random")
        random = [plan(score(stats, "random", seed=seed), keep=keep) for seed in RANDOM_SEEDS]
        name = f"8→{keep} random (mean of {len(RANDOM_SEEDS)})"
        rows.append(mean_row(name, [demo.row(name, patch(demo.pruned(each))) for each in random]))
    thinner: PreTrainedModel | None = None
    for size in SIZES:
        for select, named in SELECTIONS:
            thin = thin_plan(stats, size=size, multiple=MULTIPLE, select=select)
            if select == "energy":
                add(f"thin {size:.0%}", patch(demo.pruned(thin)))
            refitted = demo.pruned(thin, refit=True)
            thinner = thinner or refitted
            add(f"thin {size:.0%}{named} + refit", patch(copy.deepcopy(refitted)))
    assert thinner is not None
    add(f"thin {SIZES[0]:.0%} + refit + skip", patch(thinner, skip=skip_thresholds(demo.statistics(thinner))))
    add("skip at the median", patch(copy.deepcopy(demo.model), skip=skip_thresholds(stats)))
    kept = KEEPS[0]
    smaller = demo.pruned(plans[SAVED, kept])
    add(f"8→{kept} {SAVED} + skip", patch(smaller, skip=skip_thresholds(demo.statistics(smaller))))

    say("calibrating on chats beside text")
    chats = calibrate_on_chats(demo.model, demo.tokenizer, folder / "calibration", output, window=WINDOW)

    say("saving, reloading with stock transformers, comparing")
    saved = _save_and_reload(demo, smaller, output / f"pruned-{kept}")

    say("timing decode, interleaved with the unpatched model")
    speeds = demo.relative_speeds(models, demo.model)
    rows[0].speed = 1.0
    for row in rows:
        row.speed = speeds.get(row.name, row.speed)

    say("drawing")
    plans[SAVED, kept].save(output / "plan.json")
    heat_maps(scores, output / "scores.png", plans={criterion: plans[criterion, kept] for criterion in CRITERIA})
    variants = [Variant(row.name, row.mean, row.file_bytes, row.speed, "x") for row in rows]
    write_page(Report(stats, keep=kept, search=searches["layerwise", kept], variants=variants), output / "report.html")
    result = {
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "variant": _C.active_cpu_variant()},
        "versions": {
            "moe_ext": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": str(folder),
        "evaluation": {"window": WINDOW, "stride": STRIDE, "characters_per_domain": CHARACTERS_PER_DOMAIN},
        "decode": {"tokens": DECODE_TOKENS, "rounds": DECODE_ROUNDS, "dtype": str(demo.model.dtype).split(".")[-1]},
        "rows": [asdict(row) for row in rows],
        "chats": chats,
        "files": {
            "pruned checkpoint": str(saved),
            "statistics": str(output / "statistics.safetensors"),
            "statistics by domain": str(output / "domains.safetensors"),
            "plan": str(output / "plan.json"),
            "heat maps": str(output / "scores.png"),
            "report": str(output / "report.html"),
            "this table as JSON": str(output / "demo.json"),
        },
    }
    with replace_file(output / "demo.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def _save_and_reload(demo: Demo, model: PreTrainedModel, wanted: Path) -> Path:
    """Saves a patched model, reloads it with stock transformers and compares logits to the bit; the folder written."""
    folder, attempt = wanted, 1
    while folder.exists():  # a checkpoint of an earlier run is the user's by now
        attempt += 1
        folder = wanted.with_name(f"{wanted.name}-{attempt}")
    save_checkpoint(model, demo.tokenizer, folder)
    reloaded, _ = load_checkpoint(folder)
    stock = unpatch(copy.deepcopy(model))
    with torch.no_grad():
        same = torch.equal(stock(**demo.prompt).logits, reloaded(**demo.prompt).logits)
    if not same:
        raise RuntimeError(f"{folder}, reloaded by stock transformers, gives other logits than the model saved")
    return folder


def table_of(result: Mapping[str, Any]) -> Table:
    """The demo's table, from what :func:`run` returned or ``demo.json`` holds."""
    rows = result["rows"]
    domains = list(rows[0]["perplexity"])
    caption = (
        f"perplexity on held-out text, lower is better; mean: geometric. decode: tokens/s over the first row's, "
        f"batch 1, {result['decode']['dtype']}, {result['machine']['threads']} threads"
    )
    table = Table(caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns_of(domains)):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*cells_of(row, domains))
    return table


def columns_of(domains: list[str]) -> list[str]:
    return ["variant", "params", "file", *domains, "mean", "skipped", "decode"]


def cells_of(row: Mapping[str, Any], domains: list[str]) -> list[str]:
    return [
        row["name"],
        f"{row['parameters'] / 1e6:.2f}M",
        f"{row['file_bytes'] / 1e6:.1f}MB",
        *(f"{row['perplexity'][domain]:.1f}" for domain in domains),
        f"{row['mean']:.2f}",
        f"{row['skipped']:.0%}",
        "" if row["speed"] is None else f"{row['speed']:.2f}x",
    ]


def demo(
    model: Annotated[Path, typer.Option(help="The demo model's folder.")] = Path("examples/demo_model"),
    save_to: Annotated[Path, destination("Folder for what the demo leaves.", show_default=True)] = Path("demo_output"),
    as_json: Json = False,
) -> None:
    """Measure, calibrate, prune, skip, save, reload and compare the really trained model of the source folder."""
    result = run(model, save_to, progress=not as_json)
    if as_json:
        print_json(result)
    else:
        # The table needs its width; a narrower terminal wraps lines, which reads better than columns cut short.
        Console(width=max(out.width, 130)).print(table_of(result))
        chats = result["chats"]
        shares = " and ".join(f"{tokens} tokens of {name}" for name, tokens in chats["tokens"].items())
        alike = f"{chats['criterion']} ranks their experts alike to {chats['rank_agreement']:.2f}"
        out.print(f"calibrated on {shares} in one run: {alike}")
        for name, path in result["files"].items():
            out.print(f"{name}: {path}")
