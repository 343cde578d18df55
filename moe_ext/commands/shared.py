"""What several commands do alike: load a model, show statistics, show a plan."""

from pathlib import Path
from typing import Any

import transformers
from rich.table import Table

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.commands.output import out, print_json, working
from moe_ext.decision.pruning_plan import PruningPlan


def load(model: str, dtype: str, device: str) -> tuple[transformers.PreTrainedModel, Any]:
    with working(f"loading {model}"):
        return load_checkpoint(model, dtype=dtype, device=device)


def source_of(
    model: str, sequential: bool, scratch: Path | None, dtype: str, device: str
) -> tuple[Any, Any, dict[str, Any]]:
    """What calibrate and search take as the model, its tokenizer, and the options that go with it."""
    if not sequential:
        return *load(model, dtype, device), {}
    if not Path(model).is_dir():
        raise FileNotFoundError(f"--sequential needs a checkpoint folder; there is none at {model}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return Path(model), tokenizer, {"dtype": dtype, "device": device, "scratch": scratch}


def show_statistics(stats: ExpertStatistics, path: Path, as_json: bool) -> None:
    tokens = int(stats.tokens.max())
    if as_json:
        print_json({"statistics": str(path), "tokens": tokens, "layers": list(stats.layers)})
    else:
        out.print(f"{tokens} tokens through {stats.num_layers} layers of {stats.num_experts} experts: {path}")


def removed_experts(plan: PruningPlan, **columns: list[str]) -> Table:
    """What a plan keeps and removes, a layer a row; further columns by their titles."""
    table = Table("layer", "keeps", "removes", *columns)
    for layer, (name, keep) in enumerate(zip(plan.layers, plan.keep, strict=True)):
        more = [cells[layer] for cells in columns.values()]
        table.add_row(name, " ".join(map(str, keep)), " ".join(map(str, plan.removed(layer))), *more)
    return table
