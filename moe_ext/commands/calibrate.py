"""``moe-ext calibrate`` and ``moe-ext merge``: statistics."""

import glob
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_ext.calibration.calibrate import calibrate as run_calibration
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.commands.options import (
    AllowMissing,
    BatchSize,
    Device,
    Dtype,
    Json,
    Model,
    Scratch,
    Sequential,
    Strict,
    Timeout,
    TrustRemoteCode,
    Window,
    destination,
)
from moe_ext.commands.output import errors
from moe_ext.commands.reading import Fingerprinted, Reading
from moe_ext.commands.reading_options import reads
from moe_ext.commands.shared import show_statistics, source_of
from moe_ext.runtime.processes import process_group, rank, started_by_torchrun
from moe_ext.storage.files import file_destination


@reads(windows=True)
def calibrate(
    model: Model,
    save_to: Annotated[Path, destination("Statistics file to write.")],
    reading: Reading,
    dataset: Annotated[str, typer.Option(help="Label of the text; the domain names if empty.")] = "",
    outputs: Annotated[bool, typer.Option("--outputs", help="Also sum experts' outputs (slower), for mone.")] = False,
    channels: Annotated[
        Literal["energy", "gram"] | None,
        typer.Option(help="Also what experts' channels contribute, for `moe-ext plan --size`; gram: --select obs."),
    ] = None,
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
    trust_remote_code: TrustRemoteCode = False,
    allow_missing: AllowMissing = False,
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Run a model over text and write its expert statistics.

    Started by torchrun, every process takes its share of the batches, and the first one writes. An interrupted run goes
    on from .OUT.0.partial when it is started again: it is written every few minutes, when Ctrl-C stops the run, and
    with --sequential after every layer.
    """
    if scratch is not None and not sequential:
        raise typer.BadParameter("--scratch goes with --sequential")
    file_destination(save_to)
    reading.find()
    several = started_by_torchrun()
    with process_group(device, timeout) if several else nullcontext(device) as place:
        source, tokenizer, options = source_of(
            model, sequential, scratch, dtype, place, trust_remote_code, allow_missing
        )
        partial = save_to.with_name(f".{save_to.name}.{rank()}.partial")
        if sequential or channels != "gram":
            options["resume"] = partial
        batches = Fingerprinted(reading.batches(source, tokenizer, window=window, batch_size=batch_size))
        try:
            stats = run_calibration(
                source,
                batches,
                progress=not as_json and rank() == 0,
                dataset=dataset or reading.label,
                outputs=outputs,
                channels=channels,
                strict=strict,
                distributed=several,
                **options,
            )
        except KeyboardInterrupt as stopped:
            goes_on = f"interrupted: the same command goes on from {partial}" if partial.exists() else "interrupted"
            errors.print(str(stopped) or goes_on, markup=False, highlight=False)
            raise typer.Exit(130) from None
        stats.shards = (shard or batches.label(),)
        if rank() == 0:
            stats.save(save_to)
            # Also what an interrupted run of more processes left: the result is there.
            for left in save_to.parent.glob(f".{glob.escape(save_to.name)}.[0-9]*.partial"):
                left.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
        first = rank() == 0
    if first:
        show_statistics(stats, save_to, as_json, batches.counts, batches.waiting)


def merge(
    statistics: Annotated[
        list[Path], typer.Argument(help="Files written by `moe-ext calibrate`, for one model.", show_default=False)
    ],
    save_to: Annotated[Path, destination("Statistics file to write.")],
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
