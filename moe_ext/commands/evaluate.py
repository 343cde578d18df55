"""``moe-ext eval``: perplexity and skip rates of a checkpoint, or lm-eval's tasks."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moe_ext.commands.options import (
    AllowMissing,
    BatchSize,
    Device,
    Dtype,
    Json,
    Model,
    Strict,
    TrustRemoteCode,
    Window,
)
from moe_ext.commands.output import out, print_json
from moe_ext.commands.shared import load
from moe_ext.evaluation.compare import weight_bytes
from moe_ext.evaluation.perplexity import check_finite, perplexity
from moe_ext.runtime.batches import read_domains
from moe_ext.runtime.patching import patch
from moe_ext.runtime.skipping import count_skips


def evaluate(
    model: Model,
    text: Annotated[list[Path] | None, typer.Option("--text", help="Text file, or folder of *.txt.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of text: tasks or groups of lm-eval, with commas; see moe_ext/evaluation/tasks."),
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
    trust_remote_code: TrustRemoteCode = False,
    allow_missing: AllowMissing = False,
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Perplexity per domain and the share of expert slots skipped; or lm-eval's tasks.

    A perplexity that is infinite or no number is null in JSON, and the exit code is then 1.
    """
    if (text is None) == (tasks is None):
        raise typer.BadParameter("give --text or --tasks, one of them")
    if tasks is not None:
        loading = {"trust_remote_code": trust_remote_code, "allow_missing": allow_missing}
        evaluate_on_tasks(
            model, tasks, include, limit, skip, stock, batch_size, dtype, device, strict, loading, as_json
        )
        return
    texts = read_domains(text or [])
    loaded, tokenizer = load(model, dtype, device, trust_remote_code, allow_missing)
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
    else:
        table = Table("domain", "tokens", "perplexity")
        for domain, value in result.per_domain.items():
            table.add_row(domain, str(result.tokens[domain]), f"{value:.3f}")
        table.add_row("geometric mean", str(sum(result.tokens.values())), f"{result.mean:.3f}")
        out.print(table, f"expert slots skipped: {count.rate():.1%}")
    check_finite(model, result.per_domain)


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
    loading: dict[str, Any],
    as_json: bool,
) -> None:
    from moe_ext.evaluation.harness import evaluate_tasks

    found = evaluate_tasks(
        model,
        [name.strip() for name in tasks.split(",")],
        stock=stock,
        include=include,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        skip="auto" if skip and not stock else "none",
        strict=strict,
        **loading,
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
