"""What several commands do alike: load a model, show statistics, show a plan."""

from pathlib import Path
from typing import Any

import transformers
import typer
from rich.table import Table

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint, read_tokenizer
from moe_ext.commands.output import errors, out, print_json, working
from moe_ext.commands.reading import say_counts
from moe_ext.data import Counts
from moe_ext.decision.pruning_plan import PruningPlan


def load(
    model: str, dtype: str, device: str, trust_remote_code: bool, allow_missing: bool = False, **options: bool
) -> tuple[transformers.PreTrainedModel, Any]:
    with working(f"loading {model}"):
        return load_checkpoint(
            model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_missing=allow_missing,
            **options,
        )


def source_of(
    model: str,
    sequential: bool,
    scratch: Path | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    allow_missing: bool,
) -> tuple[Any, Any, dict[str, Any]]:
    """What calibrate and search take as the model, its tokenizer, and the options that go with it."""
    if not sequential:
        return *load(model, dtype, device, trust_remote_code, allow_missing), {}
    if allow_missing:
        raise typer.BadParameter("--allow-missing takes the model into memory: not with --sequential")
    if not Path(model).is_dir():
        raise FileNotFoundError(f"--sequential needs a checkpoint folder; there is none at {model}")
    tokenizer = read_tokenizer(model, trust_remote_code=trust_remote_code)
    options = {"dtype": dtype, "device": device, "scratch": scratch, "trust_remote_code": trust_remote_code}
    return Path(model), tokenizer, options


def show_statistics(
    stats: ExpertStatistics, path: Path, as_json: bool, counts: Counts | None = None, waiting: float | None = None
) -> None:
    """What statistics are of, what became of the rows, and the share of the time that the model waited for text."""
    tokens = int(stats.tokens.max())
    domains = {name: int(part.tokens.max()) for name, part in stats.domains.items()}
    if as_json:
        content: dict[str, Any] = {"statistics": str(path), "tokens": tokens, "layers": list(stats.layers)}
        if domains:
            content["domains"] = domains
        if counts is not None:
            content |= {"data": counts.as_json(), "waiting": waiting}
        print_json(content)
        return
    out.print(f"{tokens} tokens through {stats.num_layers} layers of {stats.num_experts} experts: {path}")
    for name, count in domains.items():
        out.print(f"  {name}: {count} tokens, {count / tokens:.1%}")
    if counts is not None:
        say_counts(counts)
        errors.print(f"waited for text: {waiting:.2%} of the time", highlight=False)


def removed_experts(plan: PruningPlan, **columns: list[str]) -> Table:
    """What a plan keeps and removes, a layer a row; further columns by their titles."""
    table = Table("layer", "keeps", "removes", *columns)
    for layer, (name, keep) in enumerate(zip(plan.layers, plan.keep, strict=True)):
        more = [cells[layer] for cells in columns.values()]
        table.add_row(name, " ".join(map(str, keep)), " ".join(map(str, plan.removed(layer))), *more)
    return table
