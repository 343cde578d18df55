"""What a SOURCE names: files, folders of them, data sets on the Hugging Face Hub, or rows that are at hand."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_ext.data.files import IN_FOLDERS, NEEDS_DATA, check_file, kind_of, rows_of, stem_of
from moe_ext.data.hub import hub_rows
from moe_ext.data.rows import Columns, Row, UnreadableRowError
from moe_ext.storage.formats import check_label, shown

FORM = "[NAME=]SOURCE[:split][@weight]"
_WEIGHT = re.compile(r"(?s)(.+)@([0-9.]+(?:e-?[0-9]+)?)")
_NAMED = re.compile(r"(?s)([\w.+ -]+)=(.+)")
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        name: the domain of its rows.
        place: a file, a folder, or a data set's name on the Hub; empty if ``rows`` are given.
        split: of a folder: a folder in it, a pattern of its files such as ``**/*.py``, or a word of their names. Of a
            data set on the Hub its split, ``train`` if None, or ``config/split``.
        weight: its share of the tokens, relative to the other sources'; None: not said.
        columns: of its rows.
        given: rows in the place of a place: mappings or texts.
    """

    name: str
    place: str = ""
    split: str | None = None
    weight: float | None = None
    columns: Columns = field(default_factory=Columns)
    given: Iterable[Mapping[str, Any] | str] | None = None

    def __post_init__(self) -> None:
        check_label("source", self.name)
        if not self.name:
            raise ValueError("source: expected a name, got none")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"source {shown(self.name)}: expected a weight above 0, got {self.weight}")

    @property
    def is_local(self) -> bool:
        """Whether it is a file or a folder."""
        return bool(self.place) and Path(self.place).exists()

    def check(self) -> None:
        """Finds out, without reading a row, what would fail later.

        Raises:
            ValueError: there is no such file or folder, it holds no file that is read, or a package is not there.
        """
        if self.given is not None:
            return
        if self.is_local:
            for file in self.files():
                check_file(file)
        elif _looks_like_a_path(self.place):
            raise ValueError(f"data {self.place} does not exist")
        elif find_spec("datasets") is None:
            raise ValueError(
                f"data {self.place} is no file here, and a data set on the Hub takes the package datasets: {NEEDS_DATA}"
            )

    def files(self) -> list[Path]:
        """Its files, in the order of their names."""
        place = Path(self.place)
        if not place.is_dir():
            if self.split is not None:
                raise ValueError(f"data {place} is one file and has no split {shown(self.split)}")
            return [place]
        return _files_in(place, self.split)

    def rows(self) -> Iterator[Row]:
        """Its rows in order.

        Raises:
            ValueError: a file that is damaged or in another format; says where.
            OSError: a file or data set that cannot be read.
        """
        if self.given is not None:
            for number, row in enumerate(self.given, 1):
                yield Row(_given(row), self.name, "row", number)
        elif self.is_local:
            for file in self.files():
                yield from rows_of(file)
        else:
            yield from hub_rows(self.place, self.split)


def _given(row: object) -> Mapping[str, Any] | str | UnreadableRowError:
    if isinstance(row, Mapping | str):
        return row
    return UnreadableRowError(f"is {type(row).__name__}; expected a mapping of columns, or a text")


def _files_in(folder: Path, split: str | None) -> list[Path]:
    if split is not None and any(mark in split for mark in "*?["):
        files = [file for file in sorted(folder.glob(split)) if file.is_file() and not _hidden(file, folder)]
        if not files:
            raise ValueError(f"folder {folder} holds no file like {split}")
        return files
    inside = folder if split is None or not (folder / split).is_dir() else folder / split
    files = [file for file in sorted(inside.iterdir()) if file.is_file() and kind_of(file) in IN_FOLDERS]
    if split is not None and inside == folder:
        files = [file for file in files if split in re.split(r"[^A-Za-z0-9]+", stem_of(file))]
    if not files:
        of_split = "" if split is None else f" of a split {shown(split)}"
        raise ValueError(
            f"folder {inside} holds no {', '.join(IN_FOLDERS)} file{of_split}; others are named by a pattern, such as "
            f"{folder}:**/*.py"
        )
    return files


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _looks_like_a_path(place: str) -> bool:
    return not _HUB_NAME.fullmatch(place) or kind_of(Path(place)) in (*IN_FOLDERS, ".json") or place.startswith(".")


def parse_source(given: str | Path | Source, columns: Columns | None = None) -> Source:
    """A source as the command line names it: ``[NAME=]SOURCE[:split][@weight]``.

    The name is the file's or the folder's, without suffixes, or the last part of a data set's, unless it is given. A
    path that exists is taken as it is, whatever characters it holds.

    Raises:
        ValueError: not of this form, or a weight that is no number above 0.
    """
    if isinstance(given, Source):
        return given
    text = str(given)
    place, weight, split, name = text, None, None, None
    if not Path(place).exists():
        if isinstance(given, Path):
            raise ValueError(f"data {given} does not exist")
        if weighted := _WEIGHT.fullmatch(place):
            place, weight = weighted[1], _number(text, weighted[2])
        if not Path(place).exists() and (named := _NAMED.fullmatch(place)) and "/" not in named[1]:
            name, place = named[1], named[2]
        if not Path(place).exists() and ":" in place:
            place, split = _at_its_colon(place)
    if not place or split == "":
        raise ValueError(f"data {shown(text)}: expected {FORM}")
    if name is None:
        name = stem_of(Path(place)) if Path(place).is_file() else Path(place).resolve().name
        if not Path(place).exists():
            name = place.rstrip("/").rsplit("/", 1)[-1]
    return Source(name, place, split, weight, columns or Columns())


def _at_its_colon(text: str) -> tuple[str, str]:
    """Before and after the last colon that follows a path that exists; else the first."""
    for found in reversed(list(re.finditer(":", text))):
        if Path(text[: found.start()]).exists() and found.start():
            return text[: found.start()], text[found.end() :]
    place, _, split = text.partition(":")
    return place, split


def _number(text: str, digits: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise ValueError(f"data {shown(text)}: expected a weight above 0 after @, got {digits}") from None


def sources_of(
    given: str | Path | Source | Iterable[str | Path | Source] | Mapping[str, Iterable[Mapping[str, Any] | str]],
    columns: str | Columns | Iterable[str] | Mapping[str, str | Columns] | None = None,
) -> list[Source]:
    """Sources of all that names them, each with its columns and a name of its own.

    Args:
        given: one or more, or rows by the name of their domain.
        columns: of all sources; or by the name of a source, as ``"name:prompt=q,response=a"`` or in a mapping.

    Raises:
        ValueError: none, two of one name, a malformed one, or columns of a source that is not there.
    """
    if isinstance(given, Mapping):
        sources = [Source(name, given=rows) for name, rows in given.items()]
    else:
        sources = [parse_source(each) for each in ([given] if isinstance(given, str | Path | Source) else given)]
    if not sources:
        raise ValueError("data: expected one or more sources, got none")
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"data: two sources are named {shown(twice)}; give one another name: NAME=SOURCE")
    of_all, by_name = _columns(columns)
    if unknown := next((name for name in by_name if name not in names), None):
        raise ValueError(f"columns: there is no source {shown(unknown)}, only {shown(names, 200)}")
    return [
        Source(
            source.name,
            source.place,
            source.split,
            source.weight,
            by_name.get(source.name, of_all if of_all is not None else source.columns),
            source.given,
        )
        for source in sources
    ]


def _columns(
    given: str | Columns | Iterable[str] | Mapping[str, str | Columns] | None,
) -> tuple[Columns | None, dict[str, Columns]]:
    """Of all sources, and by the name of one."""
    if given is None or isinstance(given, Columns):
        return given, {}
    if isinstance(given, Mapping):
        return None, {name: each if isinstance(each, Columns) else Columns.parse(each) for name, each in given.items()}
    of_all, by_name = None, {}
    for each in [given] if isinstance(given, str) else given:
        name, colon, parts = each.rpartition(":")
        if colon:
            by_name[name] = Columns.parse(parts)
        elif of_all is not None:
            raise ValueError("columns: given twice for all sources; name one: NAME:text=body")
        else:
            of_all = Columns.parse(parts)
    return of_all, by_name
