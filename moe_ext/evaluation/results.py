"""What was measured of a model's variants, read from the files of `moe-ext compare`, `moe-ext eval` and the demo."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class VariantsFileError(ValueError):
    """A file does not hold measurements of variants."""


@dataclass(frozen=True)
class Variant:
    """One model that was evaluated.

    Attributes:
        name: what tells it from the others.
        perplexity: geometric mean over the domains; lower is better.
        weight_bytes: size of the weights; None: not measured.
        speed: decode speed in ``speed_unit``; None: not measured.
        speed_unit: "tokens/s", or "x" for a multiple of the first variant's speed.
    """

    name: str
    perplexity: float
    weight_bytes: int | None = None
    speed: float | None = None
    speed_unit: str = "tokens/s"


def read_variants(path: str | Path) -> list[Variant]:
    """The variants in a JSON file that ``moe-ext compare --json``, ``moe-ext eval --json`` or ``moe-ext demo`` wrote.

    Raises:
        VariantsFileError: the file holds none; the message begins with the path.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise VariantsFileError(f"{path}: truncated, or not JSON ({error})") from error
    try:
        variants = _variants_in(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise VariantsFileError(f"{path}: not what moe-ext compare, eval or demo writes ({error!r})") from error
    if not variants:
        raise VariantsFileError(f"{path}: holds no evaluated variant")
    return variants


def _variants_in(content: Any) -> list[Variant]:
    if "rows" in content:  # the demo's
        return [
            Variant(str(row["name"]), float(row["mean"]), _whole(row["file_bytes"]), _real(row["speed"]), "x")
            for row in content["rows"]
        ]
    rows = content.get("checkpoints", [content])
    return [
        Variant(
            str(row["checkpoint"]), float(row["mean"]), _whole(row["weight_bytes"]), _real(row.get("tokens_per_second"))
        )
        for row in rows
    ]


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _real(value: Any) -> float | None:
    return None if value is None else float(value)
