"""``moe-ext eval``: perplexity and skip rates of a checkpoint, or lm-eval's tasks."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moe_ext.checkpoints.load_save import stored_bytes
from moe_ext.commands.options import (
    AllowMissing,
    BatchSize,
    Device,
    Dtype,
    Json,
    Model,
    Reference,
    Strict,
    TrustRemoteCode,
    Window,
    destination,
)
from moe_ext.commands.output import out, print_json
from moe_ext.commands.reading import Reading, say_counts
from moe_ext.commands.reading_options import reads
from moe_ext.commands.shared import load
from moe_ext.evaluation.compare import judged_against, weight_bytes
from moe_ext.evaluation.divergence import divergence
from moe_ext.evaluation.perplexity import Perplexity, check_finite, perplexity
from moe_ext.evaluation.predictions import save_predictions as record_predictions
from moe_ext.evaluation.windows import check_same_tokens
from moe_ext.runtime.patching import patch
from moe_ext.runtime.skipping import count_skips


@reads(windows=False, needed=False)
def evaluate(
    model: Model,
    reading: Reading,
    reference: Reference = None,
    save_predictions: Annotated[
        Path | None,
        destination(
            "File to write with the model's next-token distributions, 2 bytes a token of the vocabulary and scored "
            "token: a reference for other models.",
            "--save-predictions",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of text: tasks or groups of lm-eval, with commas; see moe_ext/evaluation/tasks."),
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with further task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    allow_unsafe_code: Annotated[
        bool,
        typer.Option("--allow-unsafe-code", help="Let tasks run programs that the model writes: humaneval."),
    ] = False,
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

    With a reference also the KL divergence from it (nats a token), the share of tokens that both find likeliest, and
    the checkpoint's bits per weight of the reference. A perplexity or divergence that is infinite or no number is null
    in JSON, and the exit code is then 1.
    """
    if bool(reading) == (tasks is not None):
        raise typer.BadParameter("give --text, --data or --tasks, one of them")
    if tasks is not None:
        if reference is not None or save_predictions is not None:
            raise typer.BadParameter("--reference and --save-predictions are for --text and --data")
        loading = {"trust_remote_code": trust_remote_code, "allow_missing": allow_missing}
        loading["unsafe_code"] = allow_unsafe_code
        evaluate_on_tasks(
            model, tasks, include, limit, skip, stock, batch_size, dtype, device, strict, loading, as_json
        )
        return
    if reference is not None and save_predictions is not None:
        raise typer.BadParameter("--reference and --save-predictions: give one of them")
    reading.find()
    loaded, tokenizer = load(model, dtype, device, trust_remote_code, allow_missing)
    texts = reading.texts(tokenizer)
    say_counts(reading.counts)
    if not stock:
        patch(loaded, skip="config" if skip else None, strict=strict)
    options: dict[str, Any] = {"window": window, "stride": stride, "batch_size": batch_size, "progress": not as_json}
    judged: dict[str, Any] = {}
    with count_skips(loaded) as count:
        if reference is not None:
            stored = stored_bytes(model)
            against: Any = reference
            if not Path(reference).is_file():
                against, its_tokenizer = load(reference, dtype, device, trust_remote_code, allow_missing)
                check_same_tokens(texts, tokenizer, its_tokenizer)
                if not stock:
                    patch(against, skip=None, strict=strict)
            divergences = divergence(loaded, against, texts, tokenizer, **options)
            result = divergences.perplexity
            judged = judged_against(divergences, stored)
        elif save_predictions is not None:
            result = record_predictions(loaded, texts, tokenizer, save_predictions, **options)
        else:
            result = perplexity(loaded, texts, tokenizer, **options)
    rates = dict(zip(count.layers, count.rates(), strict=True))
    if as_json:
        content = {
            "checkpoint": model,
            "parameters": loaded.num_parameters(),
            "weight_bytes": weight_bytes(loaded),
            "perplexity": result.per_domain,
            "mean": result.mean,
            "tokens": result.tokens,
            "skip_rate": count.rate(),
            "skip_rates": rates,
        }
        if reading.counts is not None:
            content["data"] = reading.counts.as_json()
        print_json(content if reference is None else {**content, "reference": reference, **judged})
    else:
        out.print(_table(result, judged), f"expert slots skipped: {count.rate():.1%}")
        if judged:
            out.print(f"bits per weight of the reference: {judged['bits_per_weight']:.3f}", highlight=False)
    check_finite(model, result.per_domain)
    check_finite(model, judged.get("kl", {}), "KL divergence")


def _table(result: Perplexity, judged: dict[str, Any]) -> Table:
    """A row a domain; with a reference its perplexity, the divergence from it and the agreement with it."""
    table = Table("domain", "tokens", "perplexity", *(("reference", "KL (nats)", "top-1 alike") if judged else ()))
    for domain, value in result.per_domain.items():
        more = [judged[name][domain] for name in ("reference_perplexity", "kl", "top1")] if judged else []
        table.add_row(domain, str(result.tokens[domain]), f"{value:.3f}", *_cells(*more))
    more = [judged[name] for name in ("reference_mean", "mean_kl", "mean_top1")] if judged else []
    table.add_row(
        "mean" if judged else "geometric mean", str(sum(result.tokens.values())), f"{result.mean:.3f}", *_cells(*more)
    )
    return table


def _cells(*values: float) -> tuple[str, ...]:
    if not values:
        return ()
    perplexity, kl, top1 = values
    return f"{perplexity:.3f}", f"{kl:.5f}", f"{top1:.2%}"


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
