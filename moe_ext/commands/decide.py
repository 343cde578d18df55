"""``moe-ext score``, ``plan`` and ``redundancy``: from statistics to a decision."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.commands.options import Criterion, Json, Objective, Seed, Statistics, TrustRemoteCode, destination
from moe_ext.commands.output import errors, out, print_json
from moe_ext.commands.shared import removed_experts
from moe_ext.decision.criteria import Scores
from moe_ext.decision.criteria import score as scores_of
from moe_ext.decision.plan import plan as plan_from
from moe_ext.decision.redundancy import redundant_pairs
from moe_ext.decision.weights_only import aimer


def scores_for(
    statistics: Path, criterion: str | None, objective: str | None, seed: int | None, trust_remote_code: bool
) -> Scores:
    if criterion is not None and objective is not None:
        raise typer.BadParameter("give --criterion or --objective, not both")
    if criterion == "aimer":
        if seed is not None:
            raise typer.BadParameter("--seed goes with --criterion random")
        with errors.status(f"loading {statistics}"):
            return aimer(load_checkpoint(str(statistics), trust_remote_code=trust_remote_code)[0])
    return scores_of(ExpertStatistics.load(statistics), criterion, objective=objective, seed=seed)


def score(
    statistics: Statistics,
    criterion: Criterion = None,
    objective: Objective = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show the score of every expert; the lowest is removed first."""
    scores = scores_for(statistics, criterion, objective, seed, trust_remote_code)
    if as_json:
        layers = dict(zip(scores.layers, scores.values.tolist(), strict=True))
        print_json({"criterion": scores.criterion, "scores": layers})
        return
    table = Table("layer", *(str(expert) for expert in range(scores.values.shape[1])), title=scores.criterion)
    for layer, row in enumerate(scores.values.tolist()):
        table.add_row(str(layer), *(f"{value:.4g}" for value in row))
    out.print(table)


def plan(
    statistics: Statistics,
    save_to: Annotated[Path, destination("Plan file to write.")],
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
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Decide which experts each layer keeps."""
    if (keep is None) == (ratio is None):
        raise typer.BadParameter("give --keep or --ratio, one of them")
    if normalise is not None and scope == "layer":
        raise typer.BadParameter("--normalise goes with --scope model")
    scores = scores_for(statistics, criterion, objective, seed, trust_remote_code)
    made = plan_from(scores, keep=keep, ratio=ratio, scope=scope, normalise=normalise)
    made.save(save_to)
    if as_json:
        print_json({"plan": str(save_to), "keep": dict(zip(made.layers, made.keep, strict=True))})
    else:
        out.print(removed_experts(made), f"written to {save_to}")


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
