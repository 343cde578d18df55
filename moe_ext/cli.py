"""``moe-ext``: the command line. One function per command, each a few calls of the library and a table or JSON.

Exit codes: 0 done, 1 the job failed (one or two lines say why; ``--debug`` shows the traceback), 2 wrong usage.
"""

import json
import platform
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import moe_ext
from moe_ext import checkpoint
from moe_ext.architectures import FAMILIES, moe_blocks
from moe_ext.binary import _C
from moe_ext.calibration import calibrate as run_calibration
from moe_ext.comparison import weight_bytes
from moe_ext.criteria import CRITERIA, OUTSIDE, Scores, aimer, point_of
from moe_ext.criteria import score as scores_of
from moe_ext.digests import text_digest
from moe_ext.evaluation import perplexity
from moe_ext.files import file_destination, folder_destination
from moe_ext.patching import patch
from moe_ext.plan import PruningPlan
from moe_ext.plan import plan as plan_from
from moe_ext.processes import process_group, rank, started_by_torchrun
from moe_ext.processor import processor
from moe_ext.pruning import prune as apply_plan
from moe_ext.redundancy import redundant_pairs
from moe_ext.routing import count_skips, skip_thresholds
from moe_ext.search import search as run_search
from moe_ext.search_result import SearchResult, is_search
from moe_ext.statistics import ExpertStatistics
from moe_ext.text import read_domains, token_batches
from moe_ext.variants import read_variants

app = typer.Typer(
    help="Makes Mixture-of-Experts language models smaller and faster after training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()  # results; everything else goes to stderr
errors = Console(stderr=True)
show_traceback = False  # --debug


def known_criterion(criterion: str | None) -> str | None:
    """An unknown criterion is wrong usage, found before any work."""
    if criterion is not None and criterion not in OUTSIDE:
        try:
            point_of(criterion)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return criterion


Model = Annotated[str, typer.Argument(help="Checkpoint folder, or a name on the Hugging Face Hub.", show_default=False)]
Statistics = Annotated[Path, typer.Argument(help="File written by `moe-ext calibrate`.", show_default=False)]
Text = Annotated[
    list[Path], typer.Option("--text", help="Text file, or folder of *.txt: one domain a file.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens a sequence.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences a batch.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as saved.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda where the CUDA kernels were built.")]
Criterion = Annotated[
    str | None,
    typer.Option(
        help=f"One of {', '.join((*CRITERIA, *OUTSIDE))}, or a triple such as 'S(1,0,2)'. aimer takes a checkpoint "
        "where the others take statistics; mone needs statistics made with --outputs.",
        show_default=False,
        callback=known_criterion,
    ),
]
Objective = Annotated[
    Literal["task-agnostic", "task-specific"] | None,
    typer.Option(help="Use the criterion that arXiv 2606.15716 finds best for it."),
]
Strict = Annotated[
    bool,
    typer.Option("--strict/--no-strict", help="Whether experts that the operators cannot run are an error."),
]
Keep = Annotated[
    str | None,
    typer.Option(help="Experts that every layer keeps: a number, or one for each layer: 6,5,6,4.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the criterion 'random'.")]


Sequential = Annotated[
    bool,
    typer.Option("--sequential", help="Hold one decoder layer of the checkpoint folder in memory at a time."),
]
Scratch = Annotated[
    Path | None,
    typer.Option(help="Folder for hidden states, twice, with --sequential; in memory if absent."),
]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds that torchrun's processes wait for each other.")]


def print_json(result: Any) -> None:
    print(json.dumps(result, indent=2))


def load(model: str, dtype: str, device: str) -> tuple[transformers.PreTrainedModel, Any]:
    with errors.status(f"loading {model}"):
        return checkpoint.load(model, dtype=dtype, device=device)


def source_of(
    model: str, sequential: bool, scratch: Path | None, dtype: str, device: str
) -> tuple[Any, Any, dict[str, Any]]:
    """What calibrate and search take as the model, its tokenizer, and the options that go with it."""
    if not sequential:
        return *load(model, dtype, device), {}
    if not Path(model).is_dir():
        raise FileNotFoundError(f"--sequential needs a checkpoint folder; there is none at {model}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return Path(model), tokenizer, {"dtype": dtype, "device": device, "scratch": scratch}


def show_statistics(stats: ExpertStatistics, path: Path, as_json: bool) -> None:
    tokens = int(stats.tokens.max())
    if as_json:
        print_json({"statistics": str(path), "tokens": tokens, "layers": list(stats.layers)})
    else:
        out.print(f"{tokens} tokens through {stats.num_layers} layers of {stats.num_experts} experts: {path}")


def scores_for(statistics: Path, criterion: str | None, objective: str | None, seed: int | None) -> Scores:
    if criterion is not None and objective is not None:
        raise typer.BadParameter("give --criterion or --objective, not both")
    if criterion == "aimer":
        if seed is not None:
            raise typer.BadParameter("--seed goes with --criterion random")
        with errors.status(f"loading {statistics}"):
            return aimer(checkpoint.load(str(statistics))[0])
    return scores_of(ExpertStatistics.load(statistics), criterion, objective=objective, seed=seed)


def removed_experts(plan: PruningPlan, **columns: list[str]) -> Table:
    """What a plan keeps and removes, a layer a row; further columns by their titles."""
    table = Table("layer", "keeps", "removes", *columns)
    for layer, (name, keep) in enumerate(zip(plan.layers, plan.keep, strict=True)):
        more = [cells[layer] for cells in columns.values()]
        table.add_row(name, " ".join(map(str, keep)), " ".join(map(str, plan.removed(layer))), *more)
    return table


def counts_in(keep: str | None) -> int | list[int] | None:
    """The numbers of ``--keep``."""
    if keep is None:
        return None
    try:
        counts = [int(count) for count in keep.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--keep {keep}: expected a number, or numbers with commas between them") from None
    return counts if "," in keep else counts[0]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    global show_traceback
    show_traceback = debug


@app.command()
def calibrate(
    model: Model,
    text: Text,
    save_to: Annotated[Path, typer.Option("--out", help="Statistics file to write.", show_default=False)],
    dataset: Annotated[str, typer.Option(help="Label of the text; the domain names if empty.")] = "",
    outputs: Annotated[bool, typer.Option("--outputs", help="Also sum experts' outputs (slower), for mone.")] = False,
    sequential: Sequential = False,
    scratch: Scratch = None,
    shard: Annotated[
        str, typer.Option(help="Label of this run, for `moe-ext merge`; a fingerprint of the text if empty.")
    ] = "",
    timeout: Timeout = 600,
    window: Window = 512,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Run a model over text and write its expert statistics.

    Started by torchrun, every process takes its share of the batches, and the first one writes. With --sequential an
    interrupted run goes on from <out>.partial when it is started again.
    """
    if scratch is not None and not sequential:
        raise typer.BadParameter("--scratch goes with --sequential")
    file_destination(save_to)
    texts = read_domains(text)
    several = started_by_torchrun()
    with process_group(device, timeout) if several else nullcontext(device) as place:
        source, tokenizer, options = source_of(model, sequential, scratch, dtype, place)
        partial = save_to.with_name(f".{save_to.name}.{rank()}.partial")
        if sequential:
            options["resume"] = partial
        batches = list(token_batches(texts, tokenizer, window=window, batch_size=batch_size))
        stats = run_calibration(
            source,
            batches,
            progress=not as_json and rank() == 0,
            dataset=dataset or " + ".join(texts),
            outputs=outputs,
            strict=strict,
            shard=shard or text_digest(batches)[:12],
            distributed=several,
            **options,
        )
        if rank() == 0:
            stats.save(save_to)
        partial.unlink(missing_ok=True)
        first = rank() == 0
    if first:
        show_statistics(stats, save_to, as_json)


@app.command()
def merge(
    statistics: Annotated[
        list[Path], typer.Argument(help="Files written by `moe-ext calibrate`, for one model.", show_default=False)
    ],
    save_to: Annotated[Path, typer.Option("--out", "-o", help="Statistics file to write.", show_default=False)],
    allow_duplicates: Annotated[
        bool, typer.Option("--allow-duplicates", help="Let a shard that is in several files count several times.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add up the statistics of runs over different text, such as on different machines."""
    file_destination(save_to)
    merged = ExpertStatistics.load(statistics[0])
    for file in statistics[1:]:
        try:
            merged = merged.merge(ExpertStatistics.load(file), allow_duplicates=allow_duplicates)
        except ValueError as error:
            raise ValueError(f"{file}: {str(error).removeprefix('other: ')}") from error
    merged.save(save_to)
    show_statistics(merged, save_to, as_json)


@app.command()
def score(
    statistics: Statistics,
    criterion: Criterion = None,
    objective: Objective = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Show the score of every expert; the lowest is removed first."""
    scores = scores_for(statistics, criterion, objective, seed)
    if as_json:
        layers = dict(zip(scores.layers, scores.values.tolist(), strict=True))
        print_json({"criterion": scores.criterion, "scores": layers})
        return
    table = Table("layer", *(str(expert) for expert in range(scores.values.shape[1])), title=scores.criterion)
    for layer, row in enumerate(scores.values.tolist()):
        table.add_row(str(layer), *(f"{value:.4g}" for value in row))
    out.print(table)


@app.command()
def plan(
    statistics: Statistics,
    save_to: Annotated[Path, typer.Option("--out", help="Plan file to write.", show_default=False)],
    keep: Annotated[int | None, typer.Option(min=1, help="Experts that every layer keeps.")] = None,
    ratio: Annotated[float | None, typer.Option(min=0, max=1, help="Share of experts that every layer loses.")] = None,
    scope: Annotated[
        Literal["layer", "model"], typer.Option(help="model: one ranking of all layers; keep and ratio are averages.")
    ] = "layer",
    normalise: Annotated[
        Literal["sum", "max", "none"] | None,
        typer.Option(help="What divides a layer's scores with --scope model: sum if absent.", show_default=False),
    ] = None,
    criterion: Criterion = None,
    objective: Objective = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Decide which experts each layer keeps."""
    if (keep is None) == (ratio is None):
        raise typer.BadParameter("give --keep or --ratio, one of them")
    if normalise is not None and scope == "layer":
        raise typer.BadParameter("--normalise goes with --scope model")
    scores = scores_for(statistics, criterion, objective, seed)
    made = plan_from(scores, keep=keep, ratio=ratio, scope=scope, normalise=normalise)
    made.save(save_to)
    if as_json:
        print_json({"plan": str(save_to), "keep": dict(zip(made.layers, made.keep, strict=True))})
    else:
        out.print(removed_experts(made), f"written to {save_to}")


@app.command()
def redundancy(
    statistics: Statistics,
    most: Annotated[int, typer.Option(min=1, help="Pairs a layer, at most.")] = 3,
    as_json: Json = False,
) -> None:
    """Show the experts that are chosen for the same tokens."""
    pairs = redundant_pairs(ExpertStatistics.load(statistics), most)
    if as_json:
        print_json([asdict(pair) for pair in pairs])
        return
    table = Table("layer", "experts", "tokens", "overlap", "lift")
    for pair in pairs:
        experts = f"{pair.first} {pair.second}"
        table.add_row(pair.layer, experts, str(pair.together), f"{pair.overlap:.1%}", f"{pair.lift:.2f}")
    out.print(table)


@app.command()
def search(
    model: Model,
    text: Text,
    save_to: Annotated[Path, typer.Option("--out", help="Plan file to write.", show_default=False)],
    keep: Keep = None,
    ratio: Annotated[float | None, typer.Option(min=0, max=1, help="Share of experts that every layer loses.")] = None,
    method: Annotated[
        Literal["layerwise", "progressive", "greedy"],
        typer.Option(
            help="Judge layers on the unpruned model's inputs, on the pruned layers' before, or heuristically."
        ),
    ] = "layerwise",
    budget: Annotated[
        Literal["layer", "model"], typer.Option(help="Same number a layer, or the total shared out by loss.")
    ] = "layer",
    skip: Annotated[
        bool, typer.Option("--skip", help="Judge layers that skip by the checkpoint's thresholds.")
    ] = False,
    max_subsets: Annotated[int, typer.Option(min=0, help="Subsets up to which a layer is searched exactly.")] = 50_000,
    losses: Annotated[
        Path | None,
        typer.Option(help="File of all losses; an interrupted search goes on from it. <plan>.safetensors if absent."),
    ] = None,
    dataset: Annotated[str, typer.Option(help="Label of the text; the domain names if empty.")] = "",
    sequential: Sequential = False,
    scratch: Scratch = None,
    timeout: Timeout = 600,
    window: Window = 512,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find the experts whose removal changes the layers' outputs least (NAEE).

    Started by torchrun, every process takes its share of the batches, and the first one writes.
    """
    if (keep is None) == (ratio is None):
        raise typer.BadParameter("give --keep or --ratio, one of them")
    if scratch is not None and not sequential:
        raise typer.BadParameter("--scratch goes with --sequential")
    counts = counts_in(keep)
    file_destination(save_to)
    losses = losses or save_to.with_suffix(".safetensors")
    file_destination(losses)
    texts = read_domains(text)
    several = started_by_torchrun()
    with process_group(device, timeout) if several else nullcontext(device) as place:
        source, tokenizer, options = source_of(model, sequential, scratch, dtype, place)
        result = run_search(
            source,
            token_batches(texts, tokenizer, window=window, batch_size=batch_size),
            keep=counts,
            ratio=ratio,
            method=method,
            budget=budget,
            skip="config" if skip else None,
            max_subsets=max_subsets,
            resume=losses,
            progress=not as_json and rank() == 0,
            dataset=dataset or " + ".join(texts),
            distributed=several,
            **options,
        )
        first = rank() == 0
        if first:
            result.plan.save(save_to)
    if not first:
        return
    exact = result.plan.made_by["exact"]
    if as_json:
        rows = zip(result.plan.layers, result.plan.keep, result.layer_losses(), exact, strict=True)
        layers = {name: {"keep": kept, "loss": loss, "exact": best} for name, kept, loss, best in rows}
        print_json({"plan": str(save_to), "losses": str(losses), "layers": layers})
        return
    shown = [f"{loss:.4g}" for loss in result.layer_losses()]
    subsets = [
        f"{'all ' if best else 'greedily, '}{int((layer.keep.sum(1) == len(kept)).sum())}"
        for best, layer, kept in zip(exact, result.losses, result.plan.keep, strict=True)
    ]
    out.print(removed_experts(result.plan, loss=shown, evaluated=subsets), f"written to {save_to}, losses to {losses}")


@app.command()
def report(
    statistics: Statistics,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="A search's losses, and JSON files of `moe-ext compare`, `eval` and `demo`."),
    ] = None,
    save_to: Annotated[Path | None, typer.Option("--out", "-o", help="HTML page to write.", show_default=False)] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for the figures alone.", show_default=False)] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan to mark in the heat maps, of every criterion.")] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Mark what each criterion removes to keep so many.")] = None,
) -> None:
    """Write a page about the experts: routing, criteria, skipping, a search's losses, evaluated variants."""
    from moe_ext.report import Report, write_figures, write_page

    if save_to is None and png is None:
        raise typer.BadParameter("give --out, --png or both")
    if plan is not None and keep is not None:
        raise typer.BadParameter("give --plan or --keep, not both")
    if save_to is not None:
        file_destination(save_to)
    searches, variants = [], []
    for file in files or []:
        if file.suffix == ".safetensors" or is_search(file):
            searches.append(SearchResult.load(file))
        else:
            variants += read_variants(file)
    if len(searches) > 1:
        raise typer.BadParameter("the report takes one search")
    made = Report(
        ExpertStatistics.load(statistics),
        removals=None if plan is None else PruningPlan.load(plan),
        keep=keep,
        search=searches[0] if searches else None,
        variants=variants,
    )
    if png is not None:
        names = write_figures(made, png)
        out.print(f"{len(names)} figures: {png}", soft_wrap=True)
    if save_to is not None:
        write_page(made, save_to)
        out.print(f"report: {save_to}", soft_wrap=True)


@app.command()
def prune(
    model: Model,
    save_to: Annotated[Path, typer.Option("--out", help="Folder for the pruned checkpoint.", show_default=False)],
    plan: Annotated[
        Path | None, typer.Argument(help="File written by `moe-ext plan` or `moe-ext search`.", show_default=False)
    ] = None,
    plan_option: Annotated[Path | None, typer.Option("--plan", help="The same.", show_default=False)] = None,
    novices: Annotated[
        Path | None, typer.Option(help="Statistics made with --outputs: means take the place of removed experts.")
    ] = None,
    shard_size: Annotated[float, typer.Option(min=1e-6, help="Gigabytes of weights a file.")] = 5.0,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Remove the experts that a plan does not keep and write a checkpoint.

    A checkpoint folder is pruned from file to file, whatever its size; a run that was interrupted goes on when it is
    started again. A name on the Hub, or --novices, takes the model into memory. Stock transformers loads the result,
    unless layers keep different numbers of experts or --novices is given: that takes moe_ext.from_pretrained.
    """
    if (plan is None) == (plan_option is None):
        raise typer.BadParameter("give the plan once, as an argument or with --plan")
    made = PruningPlan.load(plan or plan_option or Path())
    folder_destination(save_to)
    if novices is None and Path(model).is_dir():
        written = checkpoint.prune_checkpoint(
            model, made, save_to, shard_size=int(shard_size * 1e9), dtype=dtype, progress=not as_json
        )
        before, after, size = written.parameters_before, written.parameters, written.weight_bytes
    else:
        means = None if novices is None else ExpertStatistics.load(novices)
        loaded, tokenizer = load(model, dtype, "cpu")
        before = loaded.num_parameters()
        apply_plan(loaded, made, novices=means)
        with errors.status(f"writing {save_to}"):
            checkpoint.save(loaded, tokenizer, save_to)
        after, size = loaded.num_parameters(), checkpoint.size_on_disk(save_to)
    if as_json:
        print_json({"checkpoint": str(save_to), "parameters_before": before, "parameters": after, "weight_bytes": size})
    else:
        out.print(f"{before:,} -> {after:,} parameters, {size / 1e6:.1f} MB of weights: {save_to}")


@app.command()
def skip(
    model: Model,
    statistics: Statistics,
    quantile: Annotated[float, typer.Option(min=0, max=1, help="Share of the weaker slots to skip.")] = 0.5,
    text: Annotated[list[Path] | None, typer.Option("--text", help="Text to measure skip rates on.")] = None,
    save_to: Annotated[Path | None, typer.Option("--out", help="Folder for a copy with the thresholds.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Write them into the model's own config.json.")] = False,
    window: Window = 512,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Set the thresholds below which a token's weaker experts are skipped, and measure how often they are."""
    if (save_to is None) == (not in_place):
        raise typer.BadParameter("give --out or --in-place, one of them")
    stats = ExpertStatistics.load(statistics)
    texts = read_domains(text) if text else {}
    if save_to is not None:
        folder_destination(save_to)
    elif not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"--in-place needs a checkpoint folder; {model} has no config.json")
    loaded, tokenizer = load(model, dtype, device)
    blocks = moe_blocks(loaded)
    counts = tuple(block.num_routed for block in blocks)
    if stats.layers != tuple(block.name for block in blocks) or stats.experts != counts:
        raise ValueError(f"{statistics} is of another model: calibrate {model} itself")
    thresholds = skip_thresholds(stats, quantile)
    patch(loaded, skip=thresholds, strict=strict)
    rates = None
    if texts:
        with count_skips(loaded) as count, torch.inference_mode():
            for batch in token_batches(texts, tokenizer, window=window, batch_size=batch_size):
                loaded.base_model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
        rates = count.rates()
    if save_to is not None:
        checkpoint.save(loaded, tokenizer, save_to)
    else:
        checkpoint.write_thresholds(model, thresholds)
    if as_json:
        print_json({"layers": list(stats.layers), "thresholds": thresholds.tolist(), "skip_rates": rates})
        return
    table = Table("layer", "thresholds (rank 2, 3, ...)", "slots skipped")
    for layer, name in enumerate(stats.layers):
        shown = " ".join(f"{value:.3f}" for value in thresholds[layer].tolist())
        table.add_row(name, shown, "not measured" if rates is None else f"{rates[layer]:.1%}")
    out.print(table, f"written to {save_to or Path(model) / 'config.json'}")


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[list[Path] | None, typer.Option("--text", help="Text file, or folder of *.txt.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Instead of text: tasks or groups of lm-eval, with commas; see moe_ext/tasks.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with further task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    skip: Annotated[bool, typer.Option(help="Apply the skip thresholds that the checkpoint holds.")] = True,
    stock: Annotated[bool, typer.Option("--stock", help="Run transformers' own code instead of moe_ext's.")] = False,
    window: Window = 512,
    stride: Annotated[int | None, typer.Option(min=1, help="Step of the sliding window; half of it if absent.")] = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Perplexity per domain and the share of expert slots skipped; or lm-eval's tasks."""
    if (text is None) == (tasks is None):
        raise typer.BadParameter("give --text or --tasks, one of them")
    if tasks is not None:
        evaluate_on_tasks(model, tasks, include, limit, skip, stock, batch_size, dtype, device, strict, as_json)
        return
    texts = read_domains(text or [])
    loaded, tokenizer = load(model, dtype, device)
    if not stock:
        patch(loaded, skip="config" if skip else None, strict=strict)
    with count_skips(loaded) as count:
        result = perplexity(
            loaded, texts, tokenizer, window=window, stride=stride, batch_size=batch_size, progress=not as_json
        )
    rates = dict(zip(count.layers, count.rates(), strict=True))
    if as_json:
        print_json(
            {
                "checkpoint": model,
                "parameters": loaded.num_parameters(),
                "weight_bytes": weight_bytes(loaded),
                "perplexity": result.per_domain,
                "mean": result.mean,
                "tokens": result.tokens,
                "skip_rate": count.rate(),
                "skip_rates": rates,
            }
        )
        return
    table = Table("domain", "tokens", "perplexity")
    for domain, value in result.per_domain.items():
        table.add_row(domain, str(result.tokens[domain]), f"{value:.3f}")
    table.add_row("geometric mean", str(sum(result.tokens.values())), f"{result.mean:.3f}")
    out.print(table, f"expert slots skipped: {count.rate():.1%}")


def evaluate_on_tasks(
    model: str,
    tasks: str,
    include: Path | None,
    limit: int | None,
    skip: bool,
    stock: bool,
    batch_size: int,
    dtype: str,
    device: str,
    strict: bool,
    as_json: bool,
) -> None:
    from moe_ext.harness import evaluate_tasks

    found = evaluate_tasks(
        model,
        [name.strip() for name in tasks.split(",")],
        model="hf" if stock else "moe_ext",
        include=include,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        **({} if stock else {"skip": "auto" if skip else "none", "strict": strict}),
    )
    if as_json:
        print_json({"checkpoint": model, "tasks": found})
        return
    table = Table("task", "metric", "value")
    for task, metrics in found.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(task, metric.removesuffix(",none"), f"{value:.4f}")
    out.print(table)


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="Folders, or names on the Hub.")],
    text: Text,
    save_to: Annotated[Path | None, typer.Option("--out", help="JSON file to write, for `moe-ext report`.")] = None,
    skip: Annotated[bool, typer.Option(help="Apply the skip thresholds that the checkpoints hold.")] = True,
    stock: Annotated[bool, typer.Option("--stock", help="Run transformers' own code instead of moe_ext's.")] = False,
    window: Window = 512,
    stride: Annotated[int | None, typer.Option(min=1, help="Step of the sliding window; half of it if absent.")] = None,
    batch_size: BatchSize = 8,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode for the speed.")] = 64,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Perplexity per domain, size, decode speed and memory of several checkpoints, each in a process of its own."""
    from moe_ext.bench.record import result_of, write_result
    from moe_ext.comparison import Setting
    from moe_ext.comparison import compare as run_comparison

    texts = read_domains(text)
    if save_to is not None:
        file_destination(save_to)
    setting = Setting(
        skip, stock, window, stride, batch_size, decode_tokens, dtype, device, strict, torch.get_num_threads()
    )
    rows = []
    for row in run_comparison(models, texts, setting):
        errors.print(f"{row.checkpoint}: perplexity {row.mean:.3f}", highlight=False)
        rows.append(row)
    what = "perplexity on the given text, decode speed of one sequence, largest memory of a process"
    content = {
        "processor": processor(),
        "setting": asdict(setting),
        "checkpoints": [asdict(row) for row in rows],
    }
    if save_to is not None:
        write_result(save_to, what, **content)
    if as_json:
        print_json(result_of(what, **content))
        return
    table = Table("checkpoint", "params", "weights", *texts, "mean", "skipped", "tokens/s", "memory")
    for row in rows:
        table.add_row(
            row.checkpoint,
            f"{row.parameters / 1e6:.2f}M",
            f"{row.weight_bytes / 1e6:.1f}MB",
            *(f"{row.perplexity[domain]:.2f}" for domain in texts),
            f"{row.mean:.3f}",
            f"{row.skip_rate:.1%}",
            f"{row.tokens_per_second:.1f}",
            "not known" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}MB",
        )
    out.print(table)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    skip: Annotated[bool, typer.Option(help="Apply the skip thresholds that the checkpoint holds.")] = True,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a patched model."""
    loaded, tokenizer = load(model, dtype, device)
    patch(loaded, skip="config" if skip else None, strict=strict)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = None if as_json else transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    torch.manual_seed(seed)
    tokens = loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)[0]
    if as_json:
        new = tokens[inputs["input_ids"].shape[1] :]
        print_json({"prompt": prompt, "text": tokenizer.decode(new, skip_special_tokens=True), "tokens": len(new)})


@app.command()
def bench(
    model: Annotated[str | None, typer.Option(help="Take the sizes from a model's config.json.")] = None,
    shape: Annotated[str, typer.Option(help="Sizes of a layer: hidden, intermediate, experts, experts a token.")] = (
        "1024,3584,8,2"
    ),
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, with commas between them.")] = "1,4,16,64,256,1024",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "bfloat16",
    device: Device = "cpu",
    seconds: Annotated[float, typer.Option(min=0, help="For each number of tokens, about.")] = 3.0,
    save_to: Annotated[Path | None, typer.Option("--out", help="JSON file to write.", show_default=False)] = None,
    png: Annotated[Path | None, typer.Option(help="Picture to write (*.png).", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Time the operators here, beside transformers' experts and the machine's limit. Ctrl-C keeps what was measured."""
    from moe_ext.bench import machine
    from moe_ext.bench.layer import DTYPES
    from moe_ext.bench.record import result_of, write_result
    from moe_ext.canvas import need

    sizes = machine.Shape.of_model(model) if model is not None else machine.Shape.parse(shape)
    counts = [int(count) for count in tokens.split(",") if count.strip().isdigit() and int(count) > 0]
    if not counts or len(counts) != len(tokens.split(",")):
        raise typer.BadParameter(f"--tokens {tokens}: expected numbers of 1 or more with commas between them")
    for path in (save_to, png):
        if path is not None:
            file_destination(path)
    if png is not None:
        need("matplotlib")
    rows: list[machine.Measured] = []
    stopped = False
    try:
        for row in machine.measurements(sizes, DTYPES[dtype], device, counts, seconds):
            rows.append(row)
            errors.print(f"{row.tokens} tokens: {row.ours:.3g} ms, {row.limit / row.ours:.0%} of the limit")
    except KeyboardInterrupt:
        stopped = True
    if not rows:
        raise typer.Exit(130)
    what = "medians of interleaved rounds in one process, caches emptied before every call"
    content = {
        **machine.machine(device),
        "model": model,
        "shape": asdict(sizes),
        "dtype": dtype,
        "complete": not stopped,
        "rows": [row.record for row in rows],
    }
    if save_to is not None:
        write_result(save_to, what, **content)
    title = f"H, I, E, K = {', '.join(map(str, asdict(sizes).values()))}; {dtype}; {machine.machine(device)['device']}"
    if png is not None:
        machine.write_speed_figure(rows, title, png)
    if as_json:
        print_json(result_of(what, **content))
    else:
        peers = list(dict.fromkeys(name for row in rows for name in row.peers))
        table = Table("tokens", "moe_ext ms", *(f"{name} ms" for name in peers), "limit ms", "of limit", title=title)
        for row in rows:
            times = [f"{row.peers[name]:.3g}" if name in row.peers else "not run" for name in peers]
            table.add_row(str(row.tokens), f"{row.ours:.3g}", *times, f"{row.limit:.3g}", f"{row.limit / row.ours:.0%}")
        out.print(table)
    if stopped:
        errors.print("stopped: what was measured until then is kept")
        raise typer.Exit(130)


def cuda_kernels(layer: str, dtype: str) -> dict[str, str]:
    """By number of tokens, what the experts of a layer "H,I,E,K" run on the current CUDA device, and why."""
    from moe_ext.bench.machine import Shape

    shape = Shape.parse(layer)
    if not torch.cuda.is_available() or not _C.cuda_archs:
        raise typer.BadParameter("--layer is about CUDA kernels: it needs a CUDA device and a build with them")
    sizes = (shape.hidden, shape.intermediate, shape.num_experts, shape.top_k)
    return {f"T = {tokens}": _C.cuda_kernels(tokens, *sizes, dtype) for tokens in (1, 16, 64, 256, 1024, 4096)}


@app.command()
def info(
    layer: Annotated[
        str, typer.Option(help="H,I,E,K of a layer: also which CUDA kernels it takes by number of tokens, and why.")
    ] = "",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of that layer.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Build facts: versions, CPU variants, CUDA architectures, and what would run here."""
    kernels = cuda_kernels(layer, dtype) if layer else {}
    variants = _C.cpu_variants()
    facts = {
        "moe_ext": moe_ext.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_built_with": _C.torch_built_with,
        "torch_at_least": _C.torch_at_least,
        "transformers": transformers.__version__,
        "compiler": _C.compiler,
        "cpu_variants": {name: "runs here" if runs else "does not run here" for name, runs in variants},
        "cpu_variant_in_use": _C.active_cpu_variant(),
        "threads": torch.get_num_threads(),
        "cuda_archs": _C.cuda_archs or "none: built without CUDA kernels",
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "model_families": list(FAMILIES),
    }
    if kernels:
        facts["cuda_kernels"] = kernels
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = "\n".join(f"{key}: {state}" for key, state in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "none"
        table.add_row(name, str(value))
    out.print(table)


@app.command()
def demo(
    model: Annotated[Path, typer.Option(help="The demo model's folder.")] = Path("examples/demo_model"),
    save_to: Annotated[Path, typer.Option("--out", help="Folder for what the demo leaves.")] = Path("demo_output"),
    as_json: Json = False,
) -> None:
    """Measure, calibrate, prune, skip, save, reload and compare the really trained model of the source folder."""
    from moe_ext.demo import run, table_of

    result = run(model, save_to, progress=not as_json)
    if as_json:
        print_json(result)
    else:
        # The table needs its width; a narrower terminal wraps lines, which reads better than columns cut short.
        Console(width=max(out.width, 130)).print(table_of(result))
        for name, path in result["files"].items():
            out.print(f"{name}: {path}", soft_wrap=True)


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        app()
    except Exception as error:  # whatever a library raises is one or two lines; --debug shows where it came from
        if show_traceback:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        errors.print("error:", *lines[:2], sep=" ", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
