"""The pruning plan: which experts each layer keeps, how that was decided, and the JSON file that says so."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.models.layout import MOST_EXPERTS, SAME_MODEL, Layout, check_layers
from moe_ext.storage.files import replace_file
from moe_ext.storage.formats import FileFormatError, Format, check_label, parse_json, shown

FORMAT = Format("moe_ext.pruning_plan", 2, "a pruning plan", oldest=1)  # 1: without channels


class PlanFileError(FileFormatError):
    """A text or file is not a pruning plan that this version can read."""


@dataclass(frozen=True)
class PruningPlan:
    """The experts that every layer keeps, and the channels that these keep.

    Attributes:
        model_type: transformers' name of the model family.
        num_experts: E, experts of every layer before pruning.
        top_k: K, experts per token, which pruning does not change.
        layers: L module names of the Mixture-of-Experts blocks, in model order.
        keep: for every layer the ascending indices, in 0..E - 1, of the experts it keeps; at least K.
        made_by: how the plan came about, as JSON values: criterion, dataset, keep or ratio, version.
        channels: of the kept experts, in their order; None: all.

    Raises:
        ValueError: an attribute breaks the rules above; names the layer where one is at fault.
    """

    model_type: str
    num_experts: int
    top_k: int
    layers: tuple[str, ...]
    keep: tuple[tuple[int, ...], ...]
    made_by: dict[str, Any] = field(default_factory=dict)
    channels: KeptChannels | None = None

    def __post_init__(self) -> None:
        check_label("model_type", self.model_type)
        check_layers(self.layers)
        if type(self.num_experts) is not int or not 1 <= self.num_experts <= MOST_EXPERTS:
            raise ValueError(f"num_experts: expected 1 to {MOST_EXPERTS} experts, got {shown(self.num_experts)}")
        if type(self.top_k) is not int or not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: expected 1 to {self.num_experts} experts, got {shown(self.top_k)}")
        if len(self.keep) != len(self.layers):
            raise ValueError(f"keep: expected one entry for each of {len(self.layers)} layers, got {len(self.keep)}")
        if not _survives_json(self.made_by):
            raise ValueError(f"made_by: expected a dict of JSON values, got {shown(self.made_by)}")
        for layer, kept in zip(self.layers, self.keep, strict=True):
            where = f"keep: layer {shown(layer)}"
            if not isinstance(kept, tuple):
                raise ValueError(f"{where}: expected a tuple of integers, got {shown(kept)}")
            check_kept(where, kept, self.num_experts)
            if len(kept) < self.top_k:
                raise ValueError(f"{where}: expected at least top_k = {self.top_k} experts, got {len(kept)}")
        if self.channels is not None and [len(masks) for masks in self.channels.masks] != list(map(len, self.keep)):
            raise ValueError("channels: expected those of every expert that is kept, in every layer")

    @classmethod
    def of(
        cls,
        layout: Layout,
        keep: tuple[tuple[int, ...], ...],
        made_by: dict[str, Any],
        channels: KeptChannels | None = None,
    ) -> PruningPlan:
        """A plan for the model of a layout, whose layers have equal numbers of experts."""
        return cls(layout.model_type, layout.num_experts, layout.top_k, layout.layers, keep, made_by, channels)

    def misfit(self, layout: Layout) -> str | None:
        """What says that the plan is not for the model of a layout, such as ``"top_k 2 and 4"``; None if nothing does.
        The layers of the layout may have been pruned."""
        own = Layout(self.model_type, self.layers, (self.num_experts,) * len(self.layers), self.top_k)
        return own.difference(layout, names=[name for name in SAME_MODEL if name != "experts"])

    def removed(self, layer: int) -> tuple[int, ...]:
        """The ascending indices of the experts that a layer loses.

        Args:
            layer: index into ``layers``.

        Raises:
            IndexError: there is no such layer.
        """
        kept = set(self.keep[layer])
        return tuple(expert for expert in range(self.num_experts) if expert not in kept)

    def to_json(self) -> str:
        """The plan as a JSON object, one field a line."""
        fields = {
            **FORMAT.marks(),
            "model_type": self.model_type,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "layers": self.layers,
            "keep": self.keep,
            "made_by": self.made_by,
            **({} if self.channels is None else {"channels": self.channels.to_json()}),
        }
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> PruningPlan:
        """Read what :meth:`to_json` wrote.

        Args:
            text: a JSON object.

        Raises:
            PlanFileError: not JSON, not a plan, from a newer version, or a plan that breaks the rules.
        """
        try:
            fields = parse_json(text)
            FORMAT.check(fields)
        except ValueError as error:
            raise PlanFileError(str(error)) from None
        if fields["format_version"] == 1 and "channels" in fields:
            raise PlanFileError("field 'channels' is not part of format version 1")
        for mark in FORMAT.marks():
            del fields[mark]
        _check_field_types(fields)
        fields["layers"] = tuple(fields["layers"])
        fields["keep"] = tuple(tuple(kept) if isinstance(kept, list) else kept for kept in fields["keep"])
        try:
            if "channels" in fields:
                fields["channels"] = KeptChannels.from_json(fields["channels"])
            return cls(**fields)
        except ValueError as error:
            raise PlanFileError(str(error)) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file; ``path`` is replaced whole or left as it was.

        Args:
            path: the destination, conventionally ``*.json``.

        Raises:
            OSError: the file cannot be written.
        """
        with replace_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read what :meth:`save` wrote.

        Args:
            path: a plan file.

        Raises:
            PlanFileError: as :meth:`from_json`; the message begins with the path.
            OSError: the file cannot be read.
        """
        try:
            return cls.from_json(Path(path).read_bytes())
        except ValueError as error:
            raise PlanFileError(f"{path}: {error}") from error


def check_kept(where: str, kept: Sequence[object], num_experts: int) -> None:
    """ValueError, beginning with ``where``, unless a layer's kept experts are ascending indices, each once."""
    before = -1
    for expert in kept:
        if type(expert) is not int:
            raise ValueError(f"{where}: expected a tuple of integers, got {shown(kept)}")
        if not 0 <= expert < num_experts:
            raise ValueError(f"{where}: expected 0 to {num_experts - 1}, got expert {shown(expert)}")
        if expert <= before:
            raise ValueError(f"{where}: expected ascending indices, each once, got {shown(kept)}")
        before = expert


def _survives_json(value: object) -> bool:
    try:
        return bool(parse_json(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _check_field_types(fields: dict[str, Any]) -> None:
    """PlanFileError unless ``fields`` are those of :class:`PruningPlan` with JSON's counterparts of their types."""
    expected = {"model_type": str, "num_experts": int, "top_k": int, "layers": list, "keep": list, "made_by": dict}
    if missing := [name for name in expected if name not in fields]:
        raise PlanFileError(f"field {missing[0]!r} is missing")
    if unexpected := [name for name in fields if name not in (*expected, "channels")]:
        raise PlanFileError(f"field {shown(unexpected[0])} is not part of format version {FORMAT.version}")
    for name, kind in expected.items():
        if type(fields[name]) is not kind:
            raise PlanFileError(f"{name}: expected a JSON {kind.__name__}, got {shown(fields[name])}")
    if not all(isinstance(layer, str) for layer in fields["layers"]):
        raise PlanFileError(f"layers: expected names, got {shown(fields['layers'])}")
