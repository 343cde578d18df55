"""``moe-ext score``, ``plan`` and ``redundancy``: from statistics to a decision."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.commands.options import (
    AllowSuper,
    Balance,
    Criterion,
    Domain,
    Json,
    Objective,
    Seed,
    Statistics,
    TrustRemoteCode,
    destination,
)
from moe_ext.commands.output import out, print_json, working
from moe_ext.commands.shared import removed_experts
from moe_ext.decision.criteria import Scores
from moe_ext.decision.criteria import score as scores_of
from moe_ext.decision.plan import plan as plan_from
from moe_ext.decision.redundancy import redundant_pairs
from moe_ext.decision.super_experts import named
from moe_ext.decision.thin_plan import MULTIPLE, thin_plan
from moe_ext.decision.weights_only import aimer
from moe_ext.storage.formats import shown


def statistics_of(file: Path, domain: str | None, balance: bool) -> ExpertStatistics:
    """The statistics of all text, of one domain, or of all domains alike."""
    if domain is not None and balance:
        raise typer.BadParameter("give --domain or --balance, one of them")
    stats = ExpertStatistics.load(file)
    try:
        return stats.balanced() if balance else stats if domain is None else stats.domain(domain)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def scores_for(
    statistics: Path,
    criterion: str | None,
    objective: str | None,
    seed: int | None,
    domain: str | None,
    balance: bool,
    trust_remote_code: bool,
) -> Scores:
    if criterion is not None and objective is not None:
        raise typer.BadParameter("give --criterion or --objective, not both")
    if criterion == "aimer":
        if seed is not None:
            raise typer.BadParameter("--seed goes with --criterion random")
        if domain is not None or balance:
            raise typer.BadParameter("--domain and --balance go with statistics, which aimer does not take")
        with working(f"loading {statistics}"):
            return aimer(load_checkpoint(str(statistics), trust_remote_code=trust_remote_code)[0])
    return scores_of(statistics_of(statistics, domain, balance), criterion, objective=objective, seed=seed)


def score(
    statistics: Statistics,
    criterion: Criterion = None,
    objective: Objective = None,
    seed: Seed = None,
    domain: Domain = None,
    balance: Balance = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show the score of every expert, the lowest of which is removed first, and the model's super experts."""
    scores = scores_for(statistics, criterion, objective, seed, domain, balance, trust_remote_code)
    for name, count, row in zip(scores.layers, scores.experts, scores.values, strict=True):
        if not bool(row[:count].isfinite().all()):
            raise ValueError(f"layer {shown(name)}: {scores.criterion} gives scores beyond what float64 holds")
    if as_json:
        layers = dict(zip(scores.layers, scores.values.tolist(), strict=True))
        outliers = [asdict(each) for each in scores.super_experts]
        print_json({"criterion": scores.criterion, "scores": layers, "super_experts": outliers})
        return
    table = Table("layer", *(str(expert) for expert in range(scores.values.shape[1])), title=scores.criterion)
    for layer, row in enumerate(scores.values.tolist()):
        table.add_row(str(layer), *(f"{value:.4g}" for value in row))
    out.print(table)
    if scores.super_experts:
        out.print(named(scores.super_experts))


def plan(
    statistics: Statistics,
    save_to: Annotated[Path, destination("Plan file to write.")],
    keep: Annotated[int | None, typer.Option(min=1, help="Experts that every layer keeps.")] = None,
    ratio: Annotated[float | None, typer.Option(min=0, max=1, help="Share of experts that every layer loses.")] = None,
    size: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of expert parameters that is left: experts lose channels.", show_default=False
        ),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, help="Channels that every expert keeps.", show_default=False)
    ] = None,
    select: Annotated[
        Literal["energy", "obs"] | None,
        typer.Option(
            help="Which channels are kept: energy, if absent, or obs (better with --refit; takes --channels gram).",
            show_default=False,
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help="Bytes that all weights may take, such as 48GB or 44.7GiB; with --model.", show_default=False
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder that is to fit; no weight is read.", show_default=False)
    ] = None,
    multiple: Annotated[int, typer.Option(min=1, help="What the number of channels is a multiple of.")] = MULTIPLE,
    blocks: Annotated[
        int, typer.Option(min=1, help="Channels that stay or go together: 128 for float8 weights with scales of 128.")
    ] = 1,
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
    domain: Domain = None,
    balance: Balance = False,
    allow_super: AllowSuper = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Decide which experts each layer keeps, which channels its experts keep, or both: experts first, then channels.

    --size, --channels and --fit need statistics made with --channels energy or gram.
    """
    thinner = [size, channels, fit].count(None) < 3
    if keep is not None and ratio is not None:
        raise typer.BadParameter("give --keep or --ratio, one of them")
    if keep is None and ratio is None and not thinner:
        raise typer.BadParameter(
            "give --keep or --ratio for fewer experts, --size, --channels or --fit for thinner ones"
        )
    if [size, channels, fit].count(None) < 2:
        raise typer.BadParameter("give --size, --channels or --fit, one of them")
    if (fit is None) != (model is None):
        raise typer.BadParameter("--fit goes with --model, the checkpoint folder")
    if blocks != 1 and not thinner:
        raise typer.BadParameter("--blocks goes with --size, --channels or --fit")
    if select is not None and not thinner:
        raise typer.BadParameter("--select goes with --size, --channels or --fit")
    if normalise is not None and scope == "layer":
        raise typer.BadParameter("--normalise goes with --scope model")
    made = None
    if keep is not None or ratio is not None:
        scores = scores_for(statistics, criterion, objective, seed, domain, balance, trust_remote_code)
        made = plan_from(scores, keep=keep, ratio=ratio, scope=scope, normalise=normalise, allow_super=allow_super)
    elif criterion is not None or objective is not None or seed is not None or scope != "layer":
        raise typer.BadParameter("--criterion, --objective, --seed and --scope go with --keep or --ratio")
    if thinner or made is None:
        made = thin_plan(
            statistics_of(statistics, domain, balance),
            size=size,
            channels=channels,
            fit=fit,
            model=model,
            plan=made,
            multiple=multiple,
            blocks=blocks,
            select=select or "energy",
            trust_remote_code=trust_remote_code,
            allow_super=allow_super,
        )
    made.save(save_to)
    width = None if made.channels is None else made.channels.width(0)
    if as_json:
        print_json({"plan": str(save_to), "keep": dict(zip(made.layers, made.keep, strict=True)), "channels": width})
        return
    if keep is not None or ratio is not None:
        out.print(removed_experts(made))
    if made.channels is not None:
        out.print(f"every expert keeps {width} of {made.channels.intermediate_size} channels")
    if fit is not None:
        out.print(f"all weights will take {made.made_by['weight_bytes']:,} bytes")
    out.print(f"written to {save_to}")


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
