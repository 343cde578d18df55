"""What a search found: the plan, the loss of every subset that was evaluated, and the files that hold them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ext.decision.pruning_plan import PruningPlan, check_kept
from moe_ext.reconstruction.measures import MEASURES, Measure
from moe_ext.reconstruction.subsets import IMPROVEMENT, count_subsets
from moe_ext.storage.files import replace_file
from moe_ext.storage.formats import FileFormatError, Format, parse_json, shown
from moe_ext.storage.tensor_file import read_tensors, write_tensors

FORMAT = Format("moe_ext.search", 2, "a search's result", oldest=1)  # 1: the losses are norms


class SearchFileError(FileFormatError):
    """A file is not a search's result that this version can read in full."""


@dataclass(frozen=True, eq=False)
class LayerLosses:
    """Losses of one layer's subsets.

    Attributes:
        keep: (S, E) bool, the experts that each evaluated subset keeps; every subset once.
        losses: (S,) float64, in what :attr:`SearchResult.measure` says.

    Raises:
        ValueError: another shape or dtype, a subset twice, or a loss that is negative, infinite or NaN.
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
        wrong = ~(self.losses.isfinite() & (self.losses >= 0))
        if bool(wrong.any()):
            raise ValueError(f"losses: holds {float(self.losses[wrong][0])}; expected finite values >= 0")
        if len({row.tobytes() for row in self.keep.numpy()}) != len(self.keep):
            raise ValueError("keep: a subset is there twice")

    def sizes(self) -> list[int]:
        """Numbers of kept experts that subsets were evaluated for, descending."""
        return sorted(set(self.keep.sum(1).tolist()), reverse=True)

    def is_exact(self, size: int, groups: int = 1) -> bool:
        """Whether every subset of that size was evaluated, so that :meth:`best` is the optimum.

        Args:
            groups: of experts, of which a subset keeps as many each (:attr:`SearchResult.groups`).
        """
        return int((self.keep.sum(1) == size).sum()) == count_subsets(self.keep.shape[1], size, groups)

    def that_keep(self, experts: Iterable[int]) -> LayerLosses:
        """The subsets that keep all of those experts."""
        fitting = self.keep[:, list(experts)].all(1)
        return LayerLosses(self.keep[fitting], self.losses[fitting])

    def loss_of(self, kept: Sequence[int]) -> float:
        """The loss of a subset.

        Raises:
            ValueError: it was not evaluated.
        """
        row = torch.zeros(self.keep.shape[1], dtype=torch.bool)
        row[list(kept)] = True
        places = (self.keep == row).all(1).nonzero().flatten()
        if len(places) == 0:
            raise ValueError(f"kept: the subset {tuple(kept)} was not evaluated")
        return float(self.losses[int(places[0])])

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
        ValueError: not one entry of losses a layer, for another number of experts, or without what the plan keeps; or a
            measure that this version does not know.
    """

    plan: PruningPlan
    losses: tuple[LayerLosses, ...]

    def __post_init__(self) -> None:
        if len(self.losses) != len(self.plan.layers):
            raise ValueError(f"losses: expected one entry for each of {len(self.plan.layers)} layers")
        for name, layer, kept in zip(self.plan.layers, self.losses, self.plan.keep, strict=True):
            if layer.keep.shape[1] != self.plan.num_experts:
                raise ValueError(
                    f"losses: layer {shown(name)} has {layer.keep.shape[1]} experts, the plan another number"
                )
            row = torch.zeros(self.plan.num_experts, dtype=torch.bool)
            row[list(kept)] = True
            if not bool((layer.keep == row).all(1).any()):
                raise ValueError(f"losses: layer {shown(name)} has none for the experts that the plan keeps")
        groups = self.plan.made_by.get("groups", 1)
        if type(groups) is not int or groups < 1 or self.plan.num_experts % groups:
            raise ValueError(f"made_by: groups: {shown(groups)} do not hold {self.plan.num_experts} experts")
        if self.measure not in MEASURES:
            raise ValueError(f"made_by: measure: expected one of {', '.join(MEASURES)}, got {shown(self.measure)}")

    @property
    def measure(self) -> Measure:
        """What the losses measure: one of :data:`moe_ext.reconstruction.measures.MEASURES`."""
        measure: Measure = self.plan.made_by.get("measure", "norms")
        return measure

    @property
    def groups(self) -> int:
        """Groups of a layer's experts, of which every subset keeps as many; 1: none."""
        return int(self.plan.made_by.get("groups", 1))

    def layer_losses(self) -> list[float]:
        """The loss of what the plan keeps, layer by layer."""
        return [layer.loss_of(kept) for layer, kept in zip(self.losses, self.plan.keep, strict=True)]

    def predicted(self, counts: Sequence[int] | None = None) -> float:
        """The sum of the layers' losses: with ``loss="fisher"`` the nats a token that the model is predicted to lose.

        Args:
            counts: experts that every layer keeps, each the best of its size; None: what the plan keeps.

        Raises:
            ValueError: losses of layers do not add up (norms), not one number a layer, or a size that was not
                evaluated.
        """
        if self.measure == "norms":
            raise ValueError("norms of different layers do not add up; search with budget='model' or loss='fisher'")
        if counts is None:
            return sum(self.layer_losses())
        sizes = list(counts)
        if len(sizes) != len(self.losses):
            raise ValueError(f"counts: expected one number for each of {len(self.losses)} layers, got {len(sizes)}")
        return sum(layer.best(size)[1] for layer, size in zip(self.losses, sizes, strict=True))

    def is_exact(self) -> bool:
        """Whether every layer's subset is the best of all of its size, rather than one that a heuristic found."""
        of_layers = zip(self.losses, self.plan.keep, strict=True)
        return all(layer.is_exact(len(kept), self.groups) for layer, kept in of_layers)

    def to_json(self) -> str:
        """The plan and all losses as a JSON object, one layer a line."""
        layers = [
            json.dumps(
                {
                    "name": name,
                    "exact": layer.is_exact(len(kept), self.groups),
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
    def from_json(cls, text: str | bytes) -> SearchResult:
        """Read what :meth:`to_json` wrote.

        Raises:
            SearchFileError: not JSON, not a search's result, of another version, or not valid.
        """
        try:
            content = parse_json(text)
            FORMAT.check(content)
            for name in ("plan", "layers"):
                if name not in content:
                    raise ValueError(f"{name!r} is missing")
            plan, layers = PruningPlan.from_json(json.dumps(content["plan"])), content["layers"]
            if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
                raise ValueError(f"layers: expected a JSON list of objects, got {shown(layers)}")
            if [layer.get("name") for layer in layers] != list(plan.layers):
                raise ValueError("layers: have other names than those of the plan")
            return cls(plan, tuple(_losses_in(layer, plan.num_experts) for layer in layers))
        except ValueError as error:
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
                return cls.from_json(Path(path).read_bytes())
            except ValueError as error:
                raise SearchFileError(f"{path}: {error}") from error
        losses, metadata = read_layers(path)
        if "plan" not in metadata:
            raise SearchFileError(f"{path}: the search is not finished; run it again to go on")
        try:
            plan = PruningPlan.from_json(metadata["plan"])
            if sorted(losses) != list(range(len(plan.layers))):
                raise ValueError(
                    f"expected losses of {len(plan.layers)} layers, got those of layers {shown(sorted(losses))}"
                )
            return cls(plan, tuple(losses[layer] for layer in range(len(plan.layers))))
        except ValueError as error:
            raise SearchFileError(f"{path}: {error}") from error


def is_search(path: str | os.PathLike[str]) -> bool:
    """Whether a JSON file says that it is a search's result, valid or not; False for a file of anything else.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        content = parse_json(Path(path).read_bytes())
    except ValueError:
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
        tensors, metadata = read_tensors(path, FORMAT)
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if (place := _PLACE.fullmatch(name)) is None:
                raise ValueError(f"tensor {shown(name)} is not part of format version {FORMAT.version}")
            found.setdefault(int(place[1]), {})[place[2]] = tensor
        for layer, pair in found.items():
            if missing := {"keep", "losses"} - pair.keys():
                raise ValueError(f"tensor 'layers.{layer}.{missing.pop()}' is missing")
        losses = {}
        for layer, pair in sorted(found.items()):
            try:
                losses[layer] = LayerLosses(pair["keep"], pair["losses"])
            except ValueError as error:
                raise ValueError(f"layers.{layer}.{error}") from None
    except ValueError as error:
        raise SearchFileError(f"{path}: {error}") from error
    return losses, metadata


_PLACE = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(keep|losses)")


def _losses_in(layer: dict[str, Any], num_experts: int) -> LayerLosses:
    """What a layer's JSON object says, its name checked already; ValueError, naming the layer, if it is not as
    written."""
    name, subsets, losses = layer.get("name"), layer.get("keep"), layer.get("losses")
    where = f"layer {shown(name)}"
    if not isinstance(subsets, list) or not all(isinstance(kept, list) for kept in subsets):
        raise ValueError(f"{where}: keep: expected a JSON list of lists, got {shown(subsets)}")
    if not isinstance(losses, list) or any(type(loss) not in (int, float) for loss in losses):
        raise ValueError(f"{where}: losses: expected a JSON list of numbers, got {shown(losses)}")
    if len(subsets) != len(losses):
        raise ValueError(f"{where}: expected a loss for each of {len(subsets)} subsets, got {len(losses)}")
    for kept in subsets:
        check_kept(f"{where}: keep", kept, num_experts)
    keep = torch.zeros(len(subsets), num_experts, dtype=torch.bool)
    for row, kept in zip(keep, subsets, strict=True):
        row[kept] = True
    try:
        return LayerLosses(keep, torch.tensor(losses, dtype=torch.float64))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None
