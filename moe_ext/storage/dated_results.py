"""The versions that a result names, and how a result file is written."""

import datetime
import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers

from moe_ext.storage.files import replace_file
from moe_ext.version import __version__


def versions() -> dict[str, str]:
    return {"moe_ext": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def result_of(what: str, **content: Any) -> dict[str, Any]:
    """A dated result: ``what`` says in a sentence what the numbers are and where they come from."""
    return {"what": what, "date": datetime.date.today().isoformat(), "versions": versions(), **content}


def write_result(path: Path, what: str, **content: Any) -> None:
    """Writes :func:`result_of` as a JSON file; numbers that are not finite are null."""
    with replace_file(path) as temporary:
        content = without_infinities(result_of(what, **content))
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def without_infinities(value: Any) -> Any:
    """The value with None, JSON's null, for every number that is infinite or NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: without_infinities(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(each) for each in value]
    return value


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    header = list(rows[0])
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = ["| " + " | ".join(line) + " |" for line in [header, *cells]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
