"""Where a search is: the finished layers, in a file from which an interrupted search goes on."""

import json
import os
from typing import Any

from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.reconstruction.result import LayerLosses, read_layers, write_layers
from moe_ext.runtime.processes import from_first, rank
from moe_ext.storage.files import file_destination
from moe_ext.storage.formats import parse_json


class SearchProgress:
    """The finished layers of a search, in a file if there is one to write to; of several processes the first writes.

    Raises:
        ValueError: the file is of another search.
    """

    def __init__(self, path: str | os.PathLike[str] | None, asked: dict[str, Any], distributed: bool) -> None:
        self._path = None if path is None else file_destination(path)
        self._metadata = {"search": json.dumps(asked)}
        self._writes = not distributed or rank() == 0
        self.layers = from_first(lambda: self._read(asked)) if distributed else self._read(asked)

    def _read(self, asked: dict[str, Any]) -> dict[int, LayerLosses]:
        if self._path is None or not self._path.exists():
            return {}
        layers, metadata = read_layers(self._path)
        try:
            before = parse_json(metadata.get("search", "{}"))
        except ValueError as error:
            raise ValueError(f"resume: {self._path}: metadata 'search' is {error}") from None
        if not isinstance(before, dict):
            before = {}
        for name, value in (("loss", "reconstruction"), ("measure", "norms")):
            before.setdefault(name, value)  # which files of format version 1 do not say
        if differing := [name for name, value in asked.items() if before.get(name) != value]:
            raise ValueError(
                f"resume: {self._path} is of another search ({', '.join(differing)} differ); "
                "name a new file, or delete it"
            )
        return layers

    def write(self) -> None:
        if self._path is not None and self._writes:
            write_layers(self._path, self.layers, self._metadata)

    def finish(self, plan: PruningPlan) -> None:
        self._metadata["plan"] = plan.to_json()
        self.write()
