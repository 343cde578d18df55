"""What one calibration pass learns about the experts: accumulate, merge, save, load.

:class:`ExpertStatistics` holds plain sums, one row a Mixture-of-Experts layer, so that the statistics of two texts add
up to the statistics of both. The file is a safetensors file: the tensors under their field names, the rest as metadata.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moe_ext.models.layout import Layout, WithLayout
from moe_ext.storage.formats import Format
from moe_ext.storage.tensor_file import write_tensors

RATIO_BINS = 1024
"""Bins of equal width over [0, 1] that ``ratio_histogram`` counts ``w_j / w_1`` in; a ratio of 1 falls in the last."""

FORMAT = Format("moe_ext.expert_statistics", 1, "a statistics file")


class StatisticsFileError(ValueError):
    """A file is not a statistics file that this version can read in full."""


@dataclass(eq=False)
class ExpertStatistics(WithLayout):
    """Sums over the calibration tokens for L layers of E experts, K chosen per token; all tensors on the CPU.

    Attributes:
        layout: the model's layers, experts and K; its fields are attributes here, too.
        gate: what ``g_e`` is, such as ``"softmax over the selected logits"``.
        dataset: label of the text; ``" + "`` joins the labels of merged statistics.
        moments: (L, E, 3, 3) float64; ``[l, e, a, b]`` = sum over routed tokens of ``g_e^a * ||f_e||_2^b``
            (arXiv 2606.15716), ``[l, e, 0, 0]`` = tokens routed to e.
        tokens: (L,) int64; tokens seen, padding not counted.
        ratio_histogram: (L, K - 1, RATIO_BINS) int64; ``[l, j]`` counts tokens by ``w_{j + 2} / w_1``, the routing
            weight of rank j + 2 over the largest (arXiv 2402.14800, dynamic skipping).
        coactivation: (L, E, E) int64; tokens routed to both experts, on the diagonal tokens routed to e.
        output_sum: (L, E, H) float64, sum over routed tokens of ``f_e``; None unless calibration was asked for it.
        model_digest: tells models of one family apart by their routers' weights; empty if not known.
        shards: labels of the runs that the sums are of, so that none is counted twice; empty if not known.

    Raises:
        ValueError: a tensor's shape, dtype or device is not as above.
    """

    layout: Layout
    gate: str
    dataset: str
    moments: torch.Tensor
    tokens: torch.Tensor
    ratio_histogram: torch.Tensor
    coactivation: torch.Tensor
    output_sum: torch.Tensor | None = None
    model_digest: str = ""
    shards: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_tensors(self.tensors(), self.num_layers, self.num_experts, self.top_k)

    @classmethod
    def zeros(
        cls,
        model_type: str,
        layers: tuple[str, ...],
        num_experts: int | tuple[int, ...],
        top_k: int,
        gate: str,
        dataset: str = "",
        *,
        groups: int = 1,
        fewest: int = 0,
        hidden_size: int | None = None,
    ) -> ExpertStatistics:
        """Statistics of no text at all, to accumulate into; arguments as the attributes.

        Args:
            num_experts: E, or the number of every layer.
            hidden_size: H, for an ``output_sum``.

        Raises:
            ValueError: ``layers`` is empty or repeats a name, or ``top_k`` is not in 1..E.
        """
        experts = (num_experts,) * len(layers) if isinstance(num_experts, int) else num_experts
        return cls.empty(Layout(model_type, tuple(layers), experts, top_k, groups, fewest), gate, dataset, hidden_size)

    @classmethod
    def empty(cls, layout: Layout, gate: str, dataset: str = "", hidden_size: int | None = None) -> ExpertStatistics:
        """:meth:`zeros`, for a layout."""
        tensors: dict[str, Any] = {
            name: torch.zeros(shape, dtype=dtype, device="cpu")
            for name, (shape, dtype) in _tensor_layout(
                layout.num_layers, layout.num_experts, layout.top_k, hidden_size
            ).items()
        }
        return cls(layout, gate, dataset, **tensors)

    def routing_counts(self) -> torch.Tensor:
        """(L, E) float64, a copy: ``n_e``, the tokens routed to each expert."""
        return self.moments[:, :, 0, 0].clone()

    def merge(self, other: ExpertStatistics, *, allow_duplicates: bool = False) -> ExpertStatistics:
        """The statistics of both texts; neither operand changes.

        Counts add exactly. The other moments add in float64, so the order of several merges matters to rounding only.
        Different dataset labels are joined with ``" + "``, each once, in alphabetical order.

        Args:
            other: statistics of the same model, from other text.
            allow_duplicates: whether both may hold a run of the same shard label; it then counts twice.

        Raises:
            ValueError: model type, layers, numbers of experts, ``top_k``, gate definition or groups differ (names
                which), the routers' weights differ, one of them has no ``output_sum`` or one of another size, or both
                hold the same shard.
        """
        for name in ("model_type", "layers", "num_experts", "experts", "top_k", "gate", "groups", "fewest"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(f"other: statistics of different models do not add up: {name} {ours!r} and {theirs!r}")
        if self.model_digest and other.model_digest and self.model_digest != other.model_digest:
            raise ValueError("other: statistics of different models do not add up: the weights of the routers differ")
        if (twice := sorted(set(self.shards) & set(other.shards))) and not allow_duplicates:
            raise ValueError(f"other: both hold the shard {twice[0]!r}, which would count twice")
        if (self.output_sum is None) != (other.output_sum is None):
            raise ValueError("other: one of the two has an output_sum and the other has none; calibrate both alike")
        if self.output_sum is not None and other.output_sum is not None:
            ours, theirs = self.output_sum.shape[-1], other.output_sum.shape[-1]
            if ours != theirs:
                raise ValueError(
                    f"other: statistics of different models do not add up: output_sum has {ours} and "
                    f"{theirs} dimensions"
                )
        labels = {label for label in (*self.dataset.split(" + "), *other.dataset.split(" + ")) if label}
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.tensors()}
        dataset = " + ".join(sorted(labels))
        shards = tuple(sorted((*self.shards, *other.shards)))
        digest = self.model_digest and other.model_digest  # known only if both are
        return replace(self, dataset=dataset, shards=shards, model_digest=digest, **sums)

    def __add__(self, other: object) -> ExpertStatistics:
        """``merge`` as an operator."""
        return self.merge(other) if isinstance(other, ExpertStatistics) else NotImplemented

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; ``path`` is replaced whole or left as it was.

        Args:
            path: the destination, conventionally ``*.safetensors``.

        Raises:
            ValueError: a tensor holds a negative, infinite or NaN value; nothing is written.
            OSError: the file cannot be written.
        """
        self._check_values()
        metadata = {
            **FORMAT.metadata(),
            "model_type": self.model_type,
            "layers": json.dumps(self.layers),
            "top_k": str(self.top_k),
            "gate": self.gate,
            "dataset": self.dataset,
            "token_count": str(int(self.tokens.max())),
            "groups": str(self.groups),
            "experts": json.dumps(self.experts),
            "fewest": str(self.fewest),
            "model_digest": self.model_digest,
            "shards": json.dumps(self.shards),
        }
        write_tensors(path, self.tensors(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertStatistics:
        """Read what :meth:`save` wrote, bit for bit.

        Args:
            path: a statistics file.

        Raises:
            StatisticsFileError: the file is truncated, foreign, from a newer version, or its content is not valid.
            OSError: the file cannot be read.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = FORMAT.check_metadata(file.metadata())
                # Clones: the originals are views of the mapped file.
                tensors = {name: file.get_tensor(name).clone() for name in _present_tensors(file.keys())}
            loaded = cls(**_parse_metadata(metadata, tensors), **tensors)
            loaded._check_values()
        except SafetensorError as error:
            raise StatisticsFileError(f"{path}: truncated, or not a safetensors file ({error})") from error
        except ValueError as error:
            raise StatisticsFileError(f"{path}: {error}") from error
        return loaded

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums by field name; themselves, not copies."""
        named = {name: getattr(self, name) for name in _tensor_layout(1, 1, 1, 1)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _check_values(self) -> None:
        for name, tensor in self.tensors().items():
            signed = name == "output_sum"
            valid = tensor.isfinite() & (signed | (tensor >= 0))
            if not valid.all():
                layer, *index = (~valid).nonzero()[0].tolist()
                value = tensor[(layer, *index)].item()
                raise ValueError(
                    f"{name}: layer {self.layers[layer]!r} holds {value} at {index}; "
                    f"expected finite values{'' if signed else ' >= 0'}"
                )


def _tensor_layout(
    layers: int, experts: int, top_k: int, hidden_size: int | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor field; ``output_sum`` with a hidden size only."""
    optional = {} if hidden_size is None else {"output_sum": ((layers, experts, hidden_size), torch.float64)}
    return {
        "moments": ((layers, experts, 3, 3), torch.float64),
        "tokens": ((layers,), torch.int64),
        "ratio_histogram": ((layers, top_k - 1, RATIO_BINS), torch.int64),
        "coactivation": ((layers, experts, experts), torch.int64),
        **optional,
    }


def _check_tensors(tensors: dict[str, torch.Tensor], layers: int, experts: int, top_k: int) -> None:
    """ValueError, naming the field, for a tensor of another shape, dtype or device."""
    hidden_size = tensors["output_sum"].shape[-1] if "output_sum" in tensors else None
    for name, (shape, dtype) in _tensor_layout(layers, experts, top_k, hidden_size).items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(f"{name}: is {tensor.dtype} on {tensor.device}; expected {dtype} on cpu")


def _present_tensors(names: list[str]) -> list[str]:
    """``names`` when they are the tensor fields, with or without the optional one; ValueError otherwise."""
    if missing := sorted(_tensor_layout(1, 1, 1, None).keys() - set(names)):
        raise ValueError(f"tensor {missing[0]!r} is missing")
    if unexpected := sorted(set(names) - _tensor_layout(1, 1, 1, 1).keys()):
        raise ValueError(f"tensor {unexpected[0]!r} is not part of format version {FORMAT.version}")
    return names


def _parse_metadata(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of :class:`ExpertStatistics` that are not tensors; ValueError where one is not as it should be."""
    if missing := [name for name in ("model_type", "layers", "top_k", "gate", "dataset") if name not in metadata]:
        raise ValueError(f"metadata {missing[0]!r} is missing")
    layers = _parse_names("layers", metadata["layers"])
    top_k = _parse_integer("top_k", metadata["top_k"])
    # Absent in files from before models with groups and with layers of different sizes.
    groups = _parse_integer("groups", metadata.get("groups", "1"))
    experts = _parse_counts("experts", metadata.get("experts", "[]"))
    fewest = _parse_integer("fewest", metadata.get("fewest", "0"))
    # The tensors before the numbers of experts: a file without them has what the tensors have.
    moments = tensors["moments"]
    if moments.ndim != 4:
        raise ValueError(f"moments: has shape {tuple(moments.shape)}; expected (L, E, 3, 3)")
    if not 1 <= top_k <= moments.shape[1]:
        raise ValueError(f"top_k: expected 1 to {moments.shape[1]} experts, got {top_k}")
    _check_tensors(tensors, len(layers), moments.shape[1], top_k)
    experts = experts or (moments.shape[1],) * len(layers)
    if layers and max(experts) != moments.shape[1]:
        raise ValueError(f"experts: expected {len(layers)} numbers, the largest {moments.shape[1]}, got {experts}")
    return {
        "layout": Layout(metadata["model_type"], layers, experts, top_k, groups, fewest),
        "gate": metadata["gate"],
        "dataset": metadata["dataset"],
        # Absent in files from before several machines.
        "model_digest": metadata.get("model_digest", ""),
        "shards": _parse_names("shards", metadata.get("shards", "[]")),
    }


def _parse_integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"metadata {name!r} is {text[:40]!r}; expected an integer") from None


def _parse_counts(name: str, text: str) -> tuple[int, ...]:
    try:
        counts = json.loads(text)
    except (ValueError, RecursionError):
        counts = None
    if not isinstance(counts, list) or not all(type(entry) is int for entry in counts):
        raise ValueError(f"metadata {name!r} is {text[:40]!r}; expected a JSON list of integers")
    return tuple(counts)


def _parse_names(name: str, text: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise ValueError(f"metadata {name!r} is {text[:40]!r}; expected a JSON list of names")
    return tuple(names)
