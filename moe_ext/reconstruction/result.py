"""What a search found: the plan, the loss of every subset that was evaluated, and the files that hold them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import comb
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_ext.decision.pruning_plan import PlanFileError, PruningPlan
from moe_ext.reconstruction.subsets import IMPROVEMENT
from moe_ext.storage.files import replace_file
from moe_ext.storage.formats import Format
from moe_ext.storage.tensor_file import write_tensors

FORMAT = Format("moe_ext.search", 1, "a search's result")


class SearchFileError(ValueError):
    """A file is not a search's result that this version can read in full."""


@dataclass(frozen=True, eq=False)
class LayerLosses:
    """Reconstruction losses of one layer's subsets.

    Attributes:
        keep: (S, E) bool, the experts that each evaluated subset keeps; every subset once.
        losses: (S,) float64, ``sum over calibration batches of ||F(x) - F_keep(x)||_F``.
    """

    keep: Tensor
    losses: Tensor

    def __post_init__(self) -> None:
        if self.keep.ndim != 2 or self.keep.dtype != torch.bool:
            raise ValueError(f"keep: is {self.keep.dtype} of shape {tuple(self.keep.shape)}; expected bool (S, E)")
        if tuple(self.losses.shape) != (len(self.keep),) or self.losses.dtype != torch.float64:
            raise ValueError(
                f"losses: is {self.losses.dtype} of shape {tuple(self.losses.shape)}; "
                f"expected float64 ({len(self.keep)},)"
            )

    def sizes(self) -> list[int]:
        """Numbers of kept experts that subsets were evaluated for, descending."""
        return sorted(set(self.keep.sum(1).tolist()), reverse=True)

    def is_exact(self, size: int) -> bool:
        """Whether every subset of that size was evaluated, so that :meth:`best` is the optimum."""
        return int((self.keep.sum(1) == size).sum()) == comb(self.keep.shape[1], size)

    def best(self, size: int) -> tuple[tuple[int, ...], float]:
        """The evaluated subset of that size with the lowest loss, and its loss. Equal losses (but for rounding): the
        lexicographically first set of dropped experts.

        Raises:
            ValueError: no subset of that size was evaluated.
        """
        candidates = (self.keep.sum(1) == size).nonzero().flatten()
        if len(candidates) == 0:
            raise ValueError(f"size: no subset of {size} experts was evaluated; there are {self.sizes()}")
        losses = self.losses[candidates]
        lowest = candidates[losses <= losses.min() * (1 + IMPROVEMENT)].tolist()
        first = min(lowest, key=lambda index: (~self.keep[index]).nonzero().flatten().tolist())
        return tuple(self.keep[first].nonzero().flatten().tolist()), float(self.losses[first])


@dataclass(frozen=True, eq=False)
class SearchResult:
    """A search's decision and what it rests on.

    Attributes:
        plan: the experts that every layer keeps; ``made_by`` says how it was found.
        losses: for every layer of the plan the losses of all evaluated subsets.

    Raises:
        ValueError: not one entry of losses a layer, or for another number of experts.
    """

    plan: PruningPlan
    losses: tuple[LayerLosses, ...]

    def __post_init__(self) -> None:
        if len(self.losses) != len(self.plan.layers):
            raise ValueError(f"losses: expected one entry for each of {len(self.plan.layers)} layers")
        for name, layer in zip(self.plan.layers, self.losses, strict=True):
            if layer.keep.shape[1] != self.plan.num_experts:
                raise ValueError(f"losses: layer {name!r} has {layer.keep.shape[1]} experts, the plan another number")

    def layer_losses(self) -> list[float]:
        """The loss of what the plan keeps, layer by layer."""
        return [layer.best(len(kept))[1] for layer, kept in zip(self.losses, self.plan.keep, strict=True)]

    def is_exact(self) -> bool:
        """Whether every layer's subset is the best of all of its size, rather than one that a heuristic found."""
        return all(layer.is_exact(len(kept)) for layer, kept in zip(self.losses, self.plan.keep, strict=True))

    def to_json(self) -> str:
        """The plan and all losses as a JSON object, one layer a line."""
        layers = [
            json.dumps(
                {
                    "name": name,
                    "exact": layer.is_exact(len(kept)),
                    "keep": [row.nonzero().flatten().tolist() for row in layer.keep],
                    "losses": layer.losses.tolist(),
                }
            )
            for name, layer, kept in zip(self.plan.layers, self.losses, self.plan.keep, strict=True)
        ]
        lines = ",\n".join(f"    {layer}" for layer in layers)
        plan = json.dumps(json.loads(self.plan.to_json()))
        return (
            f'{{\n  "format": "{FORMAT.name}",\n  "format_version": {FORMAT.version},\n  "plan": {plan},\n'
            f'  "layers": [\n{lines}\n  ]\n}}\n'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result; ``path`` is replaced whole or left as it was.

        Args:
            path: ``*.safetensors`` or ``*.json``; :meth:`load` reads both.

        Raises:
            ValueError: another suffix.
            OSError: the file cannot be written.
        """
        suffix = Path(path).suffix
        if suffix == ".json":
            with replace_file(path) as temporary:
                temporary.write_text(self.to_json(), encoding="utf-8")
        elif suffix == ".safetensors":
            write_layers(path, dict(enumerate(self.losses)), {"plan": self.plan.to_json()})
        else:
            raise ValueError(f"path: expected a name that ends in .safetensors or .json, got {os.fspath(path)!r}")

    @classmethod
    def from_json(cls, text: str) -> SearchResult:
        """Read what :meth:`to_json` wrote.

        Raises:
            SearchFileError: not JSON, not a search's result, of another version, or not valid.
        """
        try:
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError(f"not {FORMAT.title}: expected a JSON object with format {FORMAT.name!r}")
            FORMAT.check(content)
            plan = PruningPlan.from_json(json.dumps(content["plan"]))
            losses = []
            for layer in content["layers"]:
                keep = torch.zeros(len(layer["keep"]), plan.num_experts, dtype=torch.bool)
                for row, kept in zip(keep, layer["keep"], strict=True):
                    row[kept] = True
                losses.append(LayerLosses(keep, torch.tensor(layer["losses"], dtype=torch.float64)))
            return cls(plan, tuple(losses))
        except KeyError as error:
            raise SearchFileError(f"{error} is missing") from error
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            raise SearchFileError(str(error)) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SearchResult:
        """Read the file that :meth:`save` wrote, ``*.json`` or safetensors.

        Raises:
            SearchFileError: the file is truncated, foreign, of an unfinished search, or not valid; names the path.
            OSError: the file cannot be read.
        """
        if Path(path).suffix == ".json":
            try:
                return cls.from_json(Path(path).read_text(encoding="utf-8"))
            except ValueError as error:
                raise SearchFileError(f"{path}: {error}") from error
        losses, metadata = read_layers(path)
        if "plan" not in metadata:
            raise SearchFileError(f"{path}: the search is not finished; run it again to go on")
        try:
            plan = PruningPlan.from_json(metadata["plan"])
            if sorted(losses) != list(range(len(plan.layers))):
                raise ValueError(f"expected losses of {len(plan.layers)} layers, got those of layers {sorted(losses)}")
            return cls(plan, tuple(losses[layer] for layer in range(len(plan.layers))))
        except (PlanFileError, ValueError) as error:
            raise SearchFileError(f"{path}: {error}") from error


def is_search(path: str | os.PathLike[str]) -> bool:
    """Whether a JSON file says that it is a search's result, valid or not; False for a file of anything else.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT.name


def write_layers(path: str | os.PathLike[str], losses: dict[int, LayerLosses], metadata: dict[str, str]) -> None:
    """Writes layers' losses, all of a search's or those that it has so far, as a safetensors file."""
    tensors = {}
    for layer, found in losses.items():
        tensors[f"layers.{layer}.keep"] = found.keep
        tensors[f"layers.{layer}.losses"] = found.losses
    write_tensors(path, tensors, {**FORMAT.metadata(), **metadata})


def read_layers(path: str | os.PathLike[str]) -> tuple[dict[int, LayerLosses], dict[str, str]]:
    """What :func:`write_layers` wrote.

    Raises:
        SearchFileError: the file is truncated, foreign, from a newer version, or its content is not valid.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = FORMAT.check_metadata(file.metadata())
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  no dict
        layers = sorted({int(name.split(".")[1]) for name in tensors})
        losses = {
            layer: LayerLosses(tensors.pop(f"layers.{layer}.keep"), tensors.pop(f"layers.{layer}.losses"))
            for layer in layers
        }
        if tensors:
            raise ValueError(f"tensor {next(iter(tensors))!r} is not part of format version {FORMAT.version}")
    except SafetensorError as error:
        raise SearchFileError(f"{path}: truncated, or not a safetensors file ({error})") from error
    except (ValueError, KeyError, IndexError) as error:
        raise SearchFileError(f"{path}: {error}") from error
    return losses, metadata
