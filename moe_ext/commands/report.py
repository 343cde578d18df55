"""``moe-ext report``: the page about the experts."""

from pathlib import Path
from typing import Annotated

import typer

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.commands.options import Statistics, destination
from moe_ext.commands.output import out
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.evaluation.results import read_variants
from moe_ext.reconstruction.result import SearchResult, is_search
from moe_ext.report.page import write_figures, write_page
from moe_ext.report.sections import Report
from moe_ext.storage.files import file_destination


def report(
    statistics: Statistics,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="A search's losses, and JSON files of `moe-ext compare`, `eval` and `demo`."),
    ] = None,
    save_to: Annotated[Path | None, destination("HTML page to write.")] = None,
    png: Annotated[Path | None, destination("Folder for the figures alone.", "--png")] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan to mark in the heat maps, of every criterion, and where channels are shown."),
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Mark what each criterion removes to keep so many.")] = None,
) -> None:
    """Write a page about the experts: routing, criteria, skipping, a search's losses, evaluated variants."""
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
        out.print(f"{len(names)} figures: {png}")
    if save_to is not None:
        write_page(made, save_to)
        out.print(f"report: {save_to}")
