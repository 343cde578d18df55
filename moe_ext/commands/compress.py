"""``moe-ext compress``: the whole job in one command."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moe_ext.checkpoints.load_save import read_tokenizer
from moe_ext.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Json,
    Model,
    TrustRemoteCode,
    Window,
    destination,
)
from moe_ext.commands.output import out, print_json
from moe_ext.commands.reading import Reading, say_counts
from moe_ext.commands.reading_options import reads
from moe_ext.compression.compress import compress as run_compression
from moe_ext.compression.request import Method
from moe_ext.compression.result import Compressed
from moe_ext.decision.thin_plan import MULTIPLE
from moe_ext.evaluation.perplexity import check_finite
from moe_ext.runtime.batches import read_domains


@reads(windows=False)
def compress(
    model: Model,
    save_to: Annotated[Path, destination("Folder for the compressed checkpoint.")],
    reading: Reading,
    method: Annotated[
        Method,
        typer.Option(
            help="thin: experts lose channels. thin-obs: by the optimal brain surgeon. experts: whole experts go. "
            "experts+thin: both. search: experts by what predictions lose; loads through moe_ext.from_pretrained only."
        ),
    ] = "thin",
    size: Annotated[
        float | None, typer.Option(help="Share of expert parameters that is left, of thin methods.", show_default=False)
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="Instead: bytes that all weights may take, such as 48GB or 44.7GiB.", show_default=False),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(help="Experts that a layer keeps, of experts, experts+thin and search.", show_default=False),
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Instead: share of the experts that go.")] = None,
    multiple: Annotated[int, typer.Option(help="What the number of channels is a multiple of.")] = MULTIPLE,
    blocks: Annotated[int, typer.Option(help="Channels that stay or go together: 128 for float8 weights.")] = 1,
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="Fit what stays to make up for what goes, on the text.")
    ] = True,
    skip: Annotated[
        bool, typer.Option("--skip/--no-skip", help="Store thresholds below which weak experts are skipped.")
    ] = True,
    judge: Annotated[
        list[Path] | None,
        typer.Option(
            "--judge", help="Text to judge on; else the last tenth of every domain is held back.", show_default=False
        ),
    ] = None,
    no_judge: Annotated[
        bool, typer.Option("--no-judge", help="Judge nothing: no model has to fit into memory.")
    ] = False,
    keep_files: Annotated[
        Path | None, destination("Folder for statistics, plan and result, which are else removed.", "--keep-files")
    ] = None,
    window: Window = 512,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller in one go: calibrate, thin, refit, set skip thresholds, and measure what that cost.

    Works from the checkpoint folder (a name on the Hub is downloaded) with one decoder layer in memory; judging takes
    the whole models, one at a time. Killed and started again it goes on with the stages that are finished, from
    .OUT.compress beside the result. A perplexity or divergence that is infinite or no number is null in JSON, and the
    exit code is then 1.
    """
    if judge and no_judge:
        raise typer.BadParameter("give --judge or --no-judge, one of them")
    if size is not None and fit is not None:
        raise typer.BadParameter("give --size or --fit, one of them")
    if keep is not None and ratio is not None:
        raise typer.BadParameter("give --keep or --ratio, one of them")
    reading.find()
    tokenizer = read_tokenizer(model, trust_remote_code=trust_remote_code) if reading.has_rows else None
    texts = reading.texts(tokenizer)
    say_counts(reading.counts)
    found = run_compression(
        model,
        texts,
        save_to,
        method=method,
        size=size,
        fit=fit,
        keep=keep,
        ratio=ratio,
        multiple=multiple,
        blocks=blocks,
        refit=refit,
        skip=skip,
        judge=read_domains(judge) if judge else None if no_judge else "held back",
        keep_files=keep_files,
        window=window,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=not as_json,
    )
    if as_json:
        print_json(asdict(found))
    else:
        out.print(_table(found))
        out.print(_notes(found))
    for name, measured in ((model, found.before), (found.checkpoint, found.after)):
        check_finite(name, measured.perplexity or {})
    check_finite(found.checkpoint, found.kl or {}, "KL divergence")


def _table(found: Compressed) -> Table:
    """Before, after, and what the one is of the other."""
    before, after = found.before, found.after
    table = Table("", "before", "after", "")
    for name, old, new in (
        ("weights", before.weight_bytes, after.weight_bytes),
        ("parameters", before.parameters, after.parameters),
    ):
        shown = [f"{each / 1e6:.2f}{'MB' if name == 'weights' else 'M'}" for each in (old, new)]
        table.add_row(name, *shown, f"{new / old:.1%}")
    if before.perplexity is None or after.perplexity is None or found.kl is None or found.top1 is None:
        return table
    for domain, value in before.perplexity.items():
        more = f"KL {found.kl[domain]:.5f}, top-1 alike {found.top1[domain]:.2%}"
        table.add_row(f"perplexity, {domain}", f"{value:.3f}", f"{after.perplexity[domain]:.3f}", more)
    more = f"KL {found.mean_kl:.5f}, top-1 alike {found.mean_top1:.2%}"
    table.add_row("perplexity, mean", f"{before.mean:.3f}", f"{after.mean:.3f}", more)
    table.add_row("slots skipped", f"{0:.1%}", f"{found.skip_rate:.1%}", "")
    return table


def _notes(found: Compressed) -> str:
    """What the numbers are of, and where the result is."""
    notes = []
    if found.tokens is not None:
        held_back = f"the last {found.held_back or 0:.0%} of every domain, not calibrated on"
        text = "the text of --judge" if found.held_back is None else held_back
        notes.append(f"judged on {text}: {sum(found.tokens.values())} tokens; KL in nats a token")
    loads = "stock transformers loads it" if found.stock else "it loads through moe_ext.from_pretrained only"
    return "\n".join([*notes, f"written to {found.checkpoint}; {loads}"])
