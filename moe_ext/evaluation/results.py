"""What was measured of a model's variants, read from the files of `moe-ext compare`, `moe-ext eval` and the demo."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_ext.storage.formats import FileFormatError, check_label, parse_json, shown


class VariantsFileError(FileFormatError):
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

    Raises:
        ValueError: no name, or a number that is no finite positive one; says which.
    """

    name: str
    perplexity: float
    weight_bytes: int | None = None
    speed: float | None = None
    speed_unit: str = "tokens/s"

    def __post_init__(self) -> None:
        check_label("name", self.name)
        if not self.name:
            raise ValueError("name: expected a text, got ''")
        _check_number(self.name, "perplexity", self.perplexity)
        if self.weight_bytes is not None:
            _check_number(self.name, "weight_bytes", self.weight_bytes, whole=True)
        if self.speed is not None:
            _check_number(self.name, "speed", self.speed)


def _check_number(name: str, field: str, value: object, *, whole: bool = False) -> None:
    """ValueError unless it is a positive finite number, and a whole one if asked for."""
    kinds = (int,) if whole else (int, float)
    try:
        valid = type(value) in kinds and 0 < value < math.inf and math.isfinite(float(value))  # type: ignore[operator,arg-type]
    except OverflowError:  # beyond float64
        valid = False
    if not valid:
        number = "whole number" if whole else "number"
        raise ValueError(f"{shown(name)}: {field} is {shown(value)}; expected a finite positive {number}")


def read_variants(path: str | Path) -> list[Variant]:
    """The variants in a JSON file that ``moe-ext compare --json``, ``moe-ext eval --json`` or ``moe-ext demo`` wrote.

    Raises:
        VariantsFileError: the file holds none; the message begins with the path.
        OSError: it cannot be read.
    """
    try:
        variants = _variants_in(parse_json(Path(path).read_bytes()))
    except ValueError as error:
        raise VariantsFileError(f"{path}: {error}") from error
    if not variants:
        raise VariantsFileError(f"{path}: holds no evaluated variant")
    return variants


def _variants_in(content: Any) -> list[Variant]:
    if not isinstance(content, dict):
        raise ValueError(_FOREIGN)
    if "rows" in content:  # the demo's
        return [
            Variant(row["name"], row["mean"], row["file_bytes"], row["speed"], "x")
            for row in _objects(content["rows"], "name", "mean", "file_bytes", "speed")
        ]
    return [
        Variant(row["checkpoint"], row["mean"], row["weight_bytes"], row.get("tokens_per_second"))
        for row in _objects(content.get("checkpoints", [content]), "checkpoint", "mean", "weight_bytes")
    ]


_FOREIGN = "not what moe-ext compare, eval or demo writes"


def _objects(rows: object, *names: str) -> list[dict[str, Any]]:
    """The rows; ValueError unless they are objects that have entries of those names."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{_FOREIGN} (expected a list of objects, got {shown(rows)})")
    for row in rows:
        if missing := [name for name in names if name not in row]:
            raise ValueError(f"{_FOREIGN} (an object has no {missing[0]!r})")
    return rows
