"""``moe-ext prune``: a plan applied to a checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import read_tokenizer, save_checkpoint, size_on_disk
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
from moe_ext.commands.output import out, print_json, working
from moe_ext.commands.reading import Reading, say_counts
from moe_ext.commands.reading_options import reads
from moe_ext.commands.shared import load
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.pruning.prune import prune as apply_plan
from moe_ext.pruning.prune_folder import PrunedCheckpoint, prune_checkpoint
from moe_ext.pruning.prune_gguf import prune_gguf
from moe_ext.storage.files import folder_destination


@reads(windows=True, needed=False)
def prune(
    model: Model,
    save_to: Annotated[Path, destination("Folder for the pruned checkpoint; of a GGUF file, a file.")],
    reading: Reading,
    plan: Annotated[
        Path | None, typer.Argument(help="File written by `moe-ext plan` or `moe-ext search`.", show_default=False)
    ] = None,
    plan_option: Annotated[Path | None, typer.Option("--plan", help="The same.", show_default=False)] = None,
    novices: Annotated[
        Path | None, typer.Option(help="Statistics made with --outputs: means take the place of removed experts.")
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit", help="Fit the kept experts' down projections to make up for what goes; takes --text or --data."
        ),
    ] = False,
    window: Window = 512,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    shard_size: Annotated[float, typer.Option(min=1e-6, help="Gigabytes of weights a file.")] = 5.0,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Remove the experts and channels that a plan does not keep and write a checkpoint, or a GGUF file of a GGUF file.

    A checkpoint folder is pruned from file to file, whatever its size; a run that was interrupted goes on when it is
    started again. A name on the Hub, or --novices, takes the model into memory. Stock transformers loads the result,
    unless layers keep different numbers of experts or --novices is given: that takes moe_ext.from_pretrained.
    """
    if (plan is None) == (plan_option is None):
        raise typer.BadParameter("give the plan once, as an argument or with --plan")
    if refit != bool(reading):
        raise typer.BadParameter("--refit takes calibration text, --text or --data; and these go with --refit")
    if refit and novices is not None:
        raise typer.BadParameter("give --refit or --novices, one of them")
    made = PruningPlan.load(plan or plan_option or Path())
    reading.find()
    if Path(model).suffix.lower() == ".gguf":
        if novices is not None or refit or dtype != "auto":
            raise typer.BadParameter("--novices, --refit and --dtype take a checkpoint, not a GGUF file")
        _say(prune_gguf(model, made, save_to, progress=not as_json), save_to, as_json)
        return
    folder_destination(save_to)

    def batches_of(source: Any, tokenizer: Any) -> list[dict[str, Any]]:
        made = list(reading.batches(source, tokenizer, window=window, batch_size=batch_size))
        say_counts(reading.counts)
        return made

    if novices is None and Path(model).is_dir():
        tokenizer = read_tokenizer(model, trust_remote_code=trust_remote_code) if refit else None
        written = prune_checkpoint(
            model,
            made,
            save_to,
            refit=batches_of(Path(model), tokenizer) if refit else None,
            device=device,
            shard_size=int(shard_size * 1e9),
            dtype=dtype,
            progress=not as_json,
            trust_remote_code=trust_remote_code,
        )
    else:
        means = None if novices is None else ExpertStatistics.load(novices)
        loaded, tokenizer = load(model, dtype, device, trust_remote_code, allow_not_finite=True)
        before = loaded.num_parameters()
        apply_plan(
            loaded, made, novices=means, refit=batches_of(loaded, tokenizer) if refit else None, progress=not as_json
        )
        with working(f"writing {save_to}"):
            save_checkpoint(loaded, tokenizer, save_to)
        written = PrunedCheckpoint(save_to, before, loaded.num_parameters(), size_on_disk(save_to))
    _say(written, save_to, as_json)


def _say(written: PrunedCheckpoint, place: Path, as_json: bool) -> None:
    before, after, size = written.parameters_before, written.parameters, written.weight_bytes
    if as_json:
        print_json({"checkpoint": str(place), "parameters_before": before, "parameters": after, "weight_bytes": size})
    else:
        out.print(f"{before:,} -> {after:,} parameters, {size / 1e6:.1f} MB of weights: {place}")
