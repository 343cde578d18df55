"""``moe-ext skip``: thresholds into a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import check_config_file, save_checkpoint, write_thresholds
from moe_ext.commands.options import (
    AllowMissing,
    BatchSize,
    Device,
    Dtype,
    Json,
    Model,
    Statistics,
    Strict,
    TrustRemoteCode,
    Window,
    destination,
)
from moe_ext.commands.output import out, print_json
from moe_ext.commands.reading import Reading, say_counts
from moe_ext.commands.reading_options import reads
from moe_ext.commands.shared import load
from moe_ext.decision.thresholds import skip_thresholds
from moe_ext.evaluation.skip_rates import skip_rates
from moe_ext.models.blocks import layer_numbers, moe_blocks
from moe_ext.models.config_section import is_scale
from moe_ext.models.layout import layout_of
from moe_ext.runtime.patching import patch
from moe_ext.storage.files import folder_destination


@reads(windows=True, needed=False)
def skip(
    model: Model,
    statistics: Statistics,
    reading: Reading,
    quantile: Annotated[float, typer.Option(min=0, max=1, help="Share of the weaker slots to skip.")] = 0.5,
    save_to: Annotated[Path | None, destination("Folder for a copy with the thresholds.")] = None,
    renormalise: Annotated[
        str,
        typer.Option(
            help="Gate weights of kept experts: kept (they sum to what all K did), none (as they were), or a number: "
            "softmax over so many of the largest logits, for a model that runs with fewer experts than in training."
        ),
    ] = "kept",
    in_place: Annotated[bool, typer.Option("--in-place", help="Write them into the model's own config.json.")] = False,
    window: Window = 512,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    allow_missing: AllowMissing = False,
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Set the thresholds below which a token's weaker experts are skipped, and measure on text how often they are."""
    if (save_to is None) == (not in_place):
        raise typer.BadParameter("give --out or --in-place, one of them")
    scale: Any = int(renormalise) if renormalise.isascii() and renormalise.isdigit() else renormalise
    if not is_scale(scale):
        raise typer.BadParameter(f"--renormalise {renormalise}: expected kept, none or a number of experts")
    stats = ExpertStatistics.load(statistics)
    reading.find()
    if save_to is not None:
        folder_destination(save_to)
    else:
        check_config_file(model)
    loaded, tokenizer = load(model, dtype, device, trust_remote_code, allow_missing)
    blocks = moe_blocks(loaded)
    routed = replace(layout_of(loaded, blocks), experts=tuple(block.num_routed for block in blocks))
    if (different := stats.layout.difference(routed)) is not None:
        raise ValueError(f"{statistics} is of another model: {different}. Calibrate {model} itself")
    thresholds = skip_thresholds(stats, quantile)
    patch(loaded, skip=thresholds, strict=strict, renormalise=scale)
    rates = None
    if reading:
        rates = skip_rates(loaded, reading.batches(loaded, tokenizer, window=window, batch_size=batch_size))
        say_counts(reading.counts)
    if save_to is not None:
        save_checkpoint(loaded, tokenizer, save_to)
    else:
        numbers = layer_numbers(blocks)
        write_thresholds(model, thresholds, numbers, renormalise=scale, trust_remote_code=trust_remote_code)
    if as_json:
        print_json({"layers": list(stats.layers), "thresholds": thresholds.tolist(), "skip_rates": rates})
        return
    table = Table("layer", "thresholds (rank 2, 3, ...)", "slots skipped")
    for layer, name in enumerate(stats.layers):
        shown = " ".join(f"{value:.3f}" for value in thresholds[layer].tolist())
        table.add_row(name, shown, "not measured" if rates is None else f"{rates[layer]:.1%}")
    out.print(table, f"written to {save_to or Path(model) / 'config.json'}")
