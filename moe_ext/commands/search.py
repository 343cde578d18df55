"""``moe-ext search``: a plan by reconstruction loss, or by what the model's predictions lose."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.commands.destinations import check_places
from moe_ext.commands.options import (
    AllowMissing,
    AllowSuper,
    BatchSize,
    Device,
    Dtype,
    Json,
    Keep,
    Model,
    Scratch,
    Sequential,
    Strict,
    Timeout,
    TrustRemoteCode,
    Window,
    counts_in,
    destination,
)
from moe_ext.commands.output import out, print_json
from moe_ext.commands.reading import Reading, say_counts
from moe_ext.commands.reading_options import reads
from moe_ext.commands.shared import removed_experts, source_of
from moe_ext.reconstruction.result import SearchResult
from moe_ext.reconstruction.search import search as run_search
from moe_ext.runtime.processes import process_group, rank, started_by_torchrun
from moe_ext.storage.files import file_destination


@reads(windows=True)
def search(
    model: Model,
    save_to: Annotated[Path, destination("Plan file to write.")],
    reading: Reading,
    keep: Keep = None,
    ratio: Annotated[float | None, typer.Option(min=0, max=1, help="Share of experts that every layer loses.")] = None,
    loss: Annotated[
        Literal["reconstruction", "fisher"],
        typer.Option(help="How far layers' outputs move (NAEE), or what that costs the model's predictions, in nats."),
    ] = "reconstruction",
    labels: Annotated[
        Literal["model", "text", "kl"] | None,
        typer.Option(help="Of --loss fisher: sampled from the model (default), the text's tokens, or random signs."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of what --loss fisher samples (0 if absent), and of the rows of --data.")
    ] = None,
    method: Annotated[
        Literal["layerwise", "progressive", "greedy"],
        typer.Option(
            help="Judge layers on the unpruned model's inputs, on the pruned layers' before, or heuristically."
        ),
    ] = "layerwise",
    budget: Annotated[
        Literal["layer", "model"] | None,
        typer.Option(help="Same number a layer, or the total shared out by loss; by default the latter for fisher."),
    ] = None,
    equal: Annotated[
        bool, typer.Option("--equal", help="Short for --budget layer: what stock transformers and engines load.")
    ] = False,
    skip: Annotated[
        bool, typer.Option("--skip", help="Judge layers that skip by the checkpoint's thresholds.")
    ] = False,
    max_subsets: Annotated[int, typer.Option(min=0, help="Subsets up to which a layer is searched exactly.")] = 50_000,
    losses: Annotated[
        Path | None,
        destination(
            "File of all losses; an interrupted search goes on from it. <plan>.safetensors if absent.", "--losses"
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="File written by `moe-ext calibrate`: super experts that it shows are kept."),
    ] = None,
    allow_super: AllowSuper = False,
    dataset: Annotated[str, typer.Option(help="Label of the text; the domain names if empty.")] = "",
    sequential: Sequential = False,
    scratch: Scratch = None,
    timeout: Timeout = 600,
    window: Window = 512,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    strict: Strict = True,
    trust_remote_code: TrustRemoteCode = False,
    allow_missing: AllowMissing = False,
    as_json: Json = False,
) -> None:
    """Find the experts whose removal changes the layers' outputs (NAEE), or the model's predictions, least.

    Started by torchrun, every process takes its share of the batches, and the first one writes.
    """
    if (keep is None) == (ratio is None):
        raise typer.BadParameter("give --keep or --ratio, one of them")
    if allow_super and statistics is None:
        raise typer.BadParameter("--allow-super goes with --statistics: nothing else looks for super experts")
    if scratch is not None and not sequential:
        raise typer.BadParameter("--scratch goes with --sequential")
    if equal and budget == "model":
        raise typer.BadParameter("--equal is --budget layer: give one of them")
    if labels is not None and loss != "fisher":
        raise typer.BadParameter("--labels goes with --loss fisher")
    if seed is not None and loss != "fisher" and not reading.has_rows:
        raise typer.BadParameter("--seed goes with --loss fisher, or with --data")
    counts = counts_in(keep)
    file_destination(save_to)
    losses = losses or save_to.with_suffix(".safetensors")
    check_places({"--out": save_to, "--losses": losses}, {"model": model, **reading.given})
    file_destination(losses)
    stats = None if statistics is None else ExpertStatistics.load(statistics)
    reading.find()
    several = started_by_torchrun()
    with process_group(device, timeout) if several else nullcontext(device) as place:
        source, tokenizer, options = source_of(
            model, sequential, scratch, dtype, place, trust_remote_code, allow_missing
        )
        result = run_search(
            source,
            reading.batches(source, tokenizer, window=window, batch_size=batch_size),
            keep=counts,
            ratio=ratio,
            loss=loss,
            labels=labels,
            seed=seed if loss == "fisher" else None,
            method=method,
            budget="layer" if equal else budget,
            skip="config" if skip else None,
            max_subsets=max_subsets,
            resume=losses,
            statistics=stats,
            allow_super=allow_super,
            progress=not as_json and rank() == 0,
            dataset=dataset or reading.label,
            distributed=several,
            strict=strict,
            **options,
        )
        first = rank() == 0
        if first:
            result.plan.save(save_to)
    if not first:
        return
    say_counts(reading.counts)
    exact = result.plan.made_by["exact"]
    if as_json:
        rows = zip(result.plan.layers, result.plan.keep, result.layer_losses(), exact, strict=True)
        layers = {name: {"keep": kept, "loss": loss, "exact": best} for name, kept, loss, best in rows}
        predicted = result.plan.made_by.get("predicted")
        print_json(
            {
                "plan": str(save_to),
                "losses": str(losses),
                "measure": result.measure,
                "predicted": predicted,
                "layers": layers,
            }
        )
        return
    shown = [f"{loss:.4g}" for loss in result.layer_losses()]
    subsets = [
        f"{'all ' if best else 'greedily, '}{int((layer.keep.sum(1) == len(kept)).sum())}"
        for best, layer, kept in zip(exact, result.losses, result.plan.keep, strict=True)
    ]
    out.print(removed_experts(result.plan, loss=shown, evaluated=subsets))
    if loss == "fisher":
        out.print(_predicted(result))
    out.print(f"written to {save_to}, losses to {losses}")


def _predicted(result: SearchResult) -> str:
    """What the plan is predicted to cost, and what the other budget would."""
    asked, nats = result.plan.made_by["budget"], result.plan.made_by["predicted"]
    others = {"layer": "shared out over the layers", "model": "with the same number in every layer (--equal)"}
    other = "model" if asked == "layer" else "layer"
    if result.plan.made_by.get("keep") and not isinstance(result.plan.made_by["keep"], int):
        others["model"] = "with the numbers as given (--budget layer)"
    known = f"; {nats[other]:.4g} {others[asked]}" if other in nats else ""
    return f"predicted to cost {nats[asked]:.4g} nats a token{known}"
