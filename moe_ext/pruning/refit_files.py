"""Refitted down projections on their way into a checkpoint: a file a layer, in the folder in which the checkpoint
grows, so that a run that was interrupted fits no layer twice.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from moe_ext.checkpoints.stored_tensors import StoredTensor, stored_file
from moe_ext.storage.formats import Format
from moe_ext.storage.tensor_file import read_tensors, write_tensors

FOLDER = "refit"

_FORMAT = Format("moe_ext.refit", 1, "a refitted layer")


class RefitFiles:
    """The files of one job.

    Args:
        work: the folder of the unfinished checkpoint.
    """

    def __init__(self, work: Path) -> None:
        self._folder = work / FOLDER
        self._folder.mkdir(exist_ok=True)

    def known(self, layer: int) -> Tensor | None:
        """A MoE layer's down projections (E', H, I'), if an earlier run has come to it."""
        return read_tensors(self._path(layer), _FORMAT)[0]["down"] if self.holds(layer) else None

    def holds(self, layer: int) -> bool:
        return self._path(layer).is_file()

    def write(self, layer: int, down: Tensor) -> None:
        """The file takes its name once it is whole."""
        if not self.holds(layer):
            write_tensors(self._path(layer), {"down": down.detach().cpu()}, _FORMAT.metadata())

    def stored(self, layer: int) -> StoredTensor:
        """Where a layer's down projections lie."""
        return stored_file(self._path(layer))["down"]

    def remove(self) -> None:
        shutil.rmtree(self._folder)

    def _path(self, layer: int) -> Path:
        return self._folder / f"{layer}.safetensors"
