"""What one calibration pass learns about the experts: accumulate, merge, save, load.

:class:`ExpertStatistics` holds plain sums, one row a Mixture-of-Experts layer, so that the statistics of two texts add
up to the statistics of both. The file is a safetensors file: the tensors under their field names, the rest as metadata.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_ext.models.layout import SAME_MODEL, Layout, WithLayout
from moe_ext.storage.formats import FileFormatError, Format, check_label, parse_json, shown
from moe_ext.storage.tensor_file import read_tensors, write_tensors

RATIO_BINS = 1024
"""Bins of equal width over [0, 1] that ``ratio_histogram`` counts ``w_j / w_1`` in; a ratio of 1 falls in the last."""

# 1: without output_pairs; 2: without domains, and what has none is still saved as 2.
FORMAT = Format("moe_ext.expert_statistics", 3, "a statistics file", oldest=1)

_OF_DOMAINS = "domain_"

MOST_COUNTED = 2**53
"""The largest count: beyond it float64, in which the moments count as well, leaves numbers out."""


class StatisticsFileError(FileFormatError):
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
        output_pairs: (L, E, E) float64, sum over tokens routed to both experts of ``g_i ||f_i||_2 g_j ||f_j||_2``
            (arXiv 2609.18916); None in statistics from files of format version 1.
        output_sum: (L, E, H) float64, sum over routed tokens of ``f_e``; None unless calibration was asked for it.
        channel_errors: (L, E, I) float64, sum over routed tokens of ``g_e^2 h_j^2 ||down[:, j]||^2``, what the squared
            error of the layer's output gains if channel j alone goes; None unless calibration was asked for it.
        channel_norms: (L, E, I) float64, ``||down[:, j]|| * ||up[j]||`` of the weights, for experts that no token
            reached; beside ``channel_errors``. Merging does not add them up.
        channel_order: (L, E, I) int32, each expert's channels in the order in which the one that costs least goes next,
            made up for by the others (:mod:`moe_ext.calibration.removal_order`); None unless calibration was asked for
            Gram matrices. Such statistics do not merge.
        model_digest: tells models of one family apart by their routers' weights; empty if not known.
        shards: labels of the runs that the sums are of, so that none is counted twice; empty if not known.
        domains: statistics of every domain of the text, by name, which add up to these; empty if the text had none.

    Raises:
        ValueError: a tensor's shape, dtype or device is not as above, or a label is no text.
    """

    layout: Layout
    gate: str
    dataset: str
    moments: torch.Tensor
    tokens: torch.Tensor
    ratio_histogram: torch.Tensor
    coactivation: torch.Tensor
    output_pairs: torch.Tensor | None = None
    output_sum: torch.Tensor | None = None
    channel_errors: torch.Tensor | None = None
    channel_norms: torch.Tensor | None = None
    channel_order: torch.Tensor | None = None
    model_digest: str = ""
    shards: tuple[str, ...] = ()
    domains: dict[str, ExpertStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_tensors(self.tensors(), self.num_layers, self.num_experts, self.top_k)
        if (self.channel_errors is None) != (self.channel_norms is None):
            raise ValueError("channel_norms: expected with channel_errors, and only then")
        if self.channel_order is not None and self.channel_errors is None:
            raise ValueError("channel_order: expected with channel_errors only")
        for name in ("gate", "dataset", "model_digest"):
            check_label(name, getattr(self, name))
        for shard in self.shards:
            check_label("shards", shard)
        for name, part in self.domains.items():
            check_label("domains", name)
            if part.tensors().keys() != self.tensors().keys() - {"channel_order"} or part.layout != self.layout:
                raise ValueError(f"domains: the statistics of {shown(name)} are not of the kind of all")

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
        width: int | None = None,
        ordered: bool = False,
    ) -> ExpertStatistics:
        """Statistics of no text at all, to accumulate into; arguments as the attributes.

        Args:
            num_experts: E, or the number of every layer.
            hidden_size: H, for an ``output_sum``.
            width: I, for ``channel_errors`` and ``channel_norms``.
            ordered: whether they have a ``channel_order``, too.

        Raises:
            ValueError: ``layers`` is empty or repeats a name, or ``top_k`` is not in 1..E.
        """
        experts = (num_experts,) * len(layers) if isinstance(num_experts, int) else num_experts
        layout = Layout(model_type, tuple(layers), experts, top_k, groups, fewest)
        return cls.empty(layout, gate, dataset, hidden_size, width, ordered)

    @classmethod
    def empty(
        cls,
        layout: Layout,
        gate: str,
        dataset: str = "",
        hidden_size: int | None = None,
        width: int | None = None,
        ordered: bool = False,
    ) -> ExpertStatistics:
        """:meth:`zeros`, for a layout."""
        tensors: dict[str, Any] = {
            name: torch.zeros(shape, dtype=dtype, device="cpu")
            for name, (shape, dtype) in _tensor_layout(
                layout.num_layers, layout.num_experts, layout.top_k, hidden_size, width
            ).items()
            if ordered or name != "channel_order"
        }
        if ordered:
            tensors["channel_order"] += torch.arange(tensors["channel_order"].shape[2], dtype=torch.int32)
        return cls(layout, gate, dataset, **tensors)

    @property
    def width(self) -> int | None:
        """I, if channels were observed."""
        return None if self.channel_errors is None else self.channel_errors.shape[2]

    def of_domain(self, name: str) -> ExpertStatistics:
        """The statistics of a domain; those of no text, added to these, if there are none yet."""
        if name not in self.domains:
            hidden_size = None if self.output_sum is None else self.output_sum.shape[2]
            self.domains[name] = ExpertStatistics.empty(self.layout, self.gate, name, hidden_size, self.width)
        return self.domains[name]

    def domain(self, name: str) -> ExpertStatistics:
        """The statistics of a domain; ValueError, naming those that there are, if it is none of them."""
        if name not in self.domains:
            known = ", ".join(map(shown, self.domains)) or "none"
            raise ValueError(f"domain: there is no {shown(name)} in the statistics; they have {known}")
        return self.domains[name]

    def add_up_domains(self, layer: int) -> None:
        """Makes the sums of a layer those of all domains, added in the order of their names."""
        for name, tensor in self.tensors().items():
            if name not in ("channel_norms", "channel_order"):
                parts = [self.domains[domain].tensors()[name][layer] for domain in sorted(self.domains)]
                tensor[layer] = torch.stack(parts).sum(0) if parts else 0

    def balanced(self) -> ExpertStatistics:
        """As if every domain had the same number of tokens, and all of them as many as now: each domain's sums times
        all tokens over the number of domains and its own tokens. Counts are rounded; the moments, which criteria use,
        are not.

        Raises:
            ValueError: fewer than two domains, or one without tokens (it is named).
        """
        if len(self.domains) < 2:
            raise ValueError(
                f"balance: expected statistics of two or more domains, got {len(self.domains)}; calibrate with several "
                "sources (--data)"
            )
        sums: dict[str, Any] = {
            name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self.tensors().items()
        }
        for domain in sorted(self.domains):
            part = self.domains[domain]
            if not bool((part.tokens > 0).all()):
                raise ValueError(f"balance: the domain {shown(domain)} has no tokens")
            factors = self.tokens.double() / (len(self.domains) * part.tokens.double())  # (L,)
            for name, tensor in part.tensors().items():
                sums[name] += tensor.double() * factors.view(-1, *[1] * (tensor.dim() - 1))
        for name, tensor in self.tensors().items():
            sums[name] = sums[name].to(tensor.dtype) if tensor.is_floating_point() else sums[name].round().long()
            if name in ("channel_norms", "channel_order"):
                sums[name] = tensor
        return replace(self, domains={}, **sums)

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
                hold the same shard; or a sum that is infinite or counts more than ``MOST_COUNTED``.
        """
        different = self.layout.difference(other.layout, names=(*SAME_MODEL, "groups", "fewest"))
        if different is None and self.gate != other.gate:
            different = f"gate {shown(self.gate)} and {shown(other.gate)}"
        if different is not None:
            raise ValueError(f"other: statistics of different models do not add up: {different}")
        if self.model_digest and other.model_digest and self.model_digest != other.model_digest:
            raise ValueError("other: statistics of different models do not add up: the weights of the routers differ")
        if (twice := sorted(set(self.shards) & set(other.shards))) and not allow_duplicates:
            raise ValueError(f"other: both hold the shard {shown(twice[0])}, which would count twice")
        if self.channel_order is not None or other.channel_order is not None:
            raise ValueError(
                "other: orders of channels do not add up; calibrate both texts in one run, in several processes if one "
                "takes too long"
            )
        self._check_optional(other)
        labels = {label for label in (*self.dataset.split(" + "), *other.dataset.split(" + ")) if label}
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.tensors() if name != "channel_norms"}
        dataset = " + ".join(sorted(labels))
        shards = tuple(sorted((*self.shards, *other.shards)))
        digest = self.model_digest and other.model_digest  # known only if both are
        domains = self._merged_domains(other)
        both = replace(self, dataset=dataset, shards=shards, model_digest=digest, domains=domains, **sums)
        try:
            both._check_values()
        except ValueError as error:
            raise ValueError(f"other: does not add up: {error}") from None
        return both

    def _merged_domains(self, other: ExpertStatistics) -> dict[str, ExpertStatistics]:
        """Both operands' domains; one that has none counts as the domain that its label names."""
        if not self.domains and not other.domains:
            return {}
        ours, theirs = (
            each.domains or {each.dataset or "unnamed": replace(each, shards=(), model_digest="")}
            for each in (self, other)
        )
        alone = {name: part for name, part in {**ours, **theirs}.items() if name not in ours or name not in theirs}
        both = {name: ours[name].merge(theirs[name]) for name in ours if name in theirs}
        return dict(sorted({**alone, **both}.items()))

    def _check_optional(self, other: ExpertStatistics) -> None:
        """ValueError unless both have the same optional tensors, of the same model."""
        for name in ("output_pairs", "output_sum", "channel_errors"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if (ours is None) != (theirs is None):
                raise ValueError(f"other: one of the two has {name} and the other has none; calibrate both alike")
            if ours is not None and ours.shape[-1] != theirs.shape[-1]:
                raise ValueError(
                    f"other: statistics of different models do not add up: {name} has {ours.shape[-1]} and "
                    f"{theirs.shape[-1]} dimensions"
                )
        ours, theirs = self.channel_norms, other.channel_norms
        if ours is not None and theirs is not None and not torch.equal(ours, theirs):
            raise ValueError("other: statistics of different models do not add up: the norms of the weights differ")

    def __add__(self, other: object) -> ExpertStatistics:
        """``merge`` as an operator."""
        return self.merge(other) if isinstance(other, ExpertStatistics) else NotImplemented

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; ``path`` is replaced whole or left as it was.

        Args:
            path: the destination, conventionally ``*.safetensors``.

        Raises:
            ValueError: a tensor holds a negative, infinite or NaN value, or a count beyond ``MOST_COUNTED``; nothing is
                written.
            OSError: the file cannot be written.
        """
        self._check_values()
        metadata = {
            **FORMAT.metadata(),
            "format_version": "1" if self.output_pairs is None else "3" if self.domains else "2",
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
            **({"domains": json.dumps(sorted(self.domains))} if self.domains else {}),
        }
        write_tensors(path, {**self.tensors(), **self._stacked()}, metadata)

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
            tensors, metadata = read_tensors(path, FORMAT)
            _check_names(tensors.keys(), int(metadata["format_version"]))
            of_domains = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith(_OF_DOMAINS)}
            fields: dict[str, Any] = {**_parse_metadata(metadata, tensors), **tensors}
            loaded = cls(**fields)
            loaded._read_domains(_parse_names("domains", metadata.get("domains", "[]")), of_domains)
            loaded._check_values()
        except ValueError as error:
            raise StatisticsFileError(f"{path}: {error}") from error
        return loaded

    def _stacked(self) -> dict[str, torch.Tensor]:
        """The domains' sums, by the name of the field after ``_OF_DOMAINS``, with the domain as the first dimension."""
        if not self.domains:
            return {}
        parts = [self.domains[name].tensors() for name in sorted(self.domains)]
        names = [name for name in parts[0] if name != "channel_norms"]
        return {f"{_OF_DOMAINS}{name}": torch.stack([part[name] for part in parts]) for name in names}

    def _read_domains(self, names: tuple[str, ...], stacked: dict[str, torch.Tensor]) -> None:
        """Takes the domains out of what :meth:`_stacked` gave.

        Raises:
            ValueError: names and tensors do not fit each other, or do not add up to the sums of all.
        """
        if not names and not stacked:
            return
        wanted = [name for name in self.tensors() if name not in ("channel_norms", "channel_order")]
        if sorted(stacked) != sorted(f"{_OF_DOMAINS}{name}" for name in wanted) or len(set(names)) != len(names):
            raise ValueError(f"domains: expected names, each once, and tensors {_OF_DOMAINS}*, one a sum")
        parts: dict[str, dict[str, Any]] = {domain: {} for domain in names}
        for name in wanted:
            tensor, of_all = stacked[f"{_OF_DOMAINS}{name}"], getattr(self, name)
            if tuple(tensor.shape) != (len(names), *of_all.shape) or tensor.dtype != of_all.dtype:
                raise ValueError(
                    f"{_OF_DOMAINS}{name}: has shape {tuple(tensor.shape)} and {tensor.dtype}; expected "
                    f"{(len(names), *of_all.shape)} and {of_all.dtype}"
                )
            total = tensor.sum(0)
            if not torch.equal(total, of_all) and not torch.allclose(total.double(), of_all.double(), rtol=1e-9):
                raise ValueError(f"{_OF_DOMAINS}{name}: does not add up to {name}")
            for part, of_part in zip(parts.values(), tensor, strict=True):
                part[name] = of_part.clone()
        for domain, part in parts.items():
            self.domains[domain] = ExpertStatistics(
                self.layout, self.gate, domain, channel_norms=self.channel_norms, **part
            )

    def every_tensor(self) -> dict[str, torch.Tensor]:
        """The sums by field name, those of domains by field and domain; themselves, not copies."""
        of_domains = {
            f"{name} of {domain}": tensor
            for domain, part in sorted(self.domains.items())
            for name, tensor in part.tensors().items()
        }
        return {**self.tensors(), **of_domains}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums by field name; themselves, not copies."""
        named = {name: getattr(self, name) for name in _tensor_layout(1, 1, 1, 1, 1)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _check_values(self) -> None:
        for part in self.domains.values():
            part._check_values()
        for name, tensor in self.tensors().items():
            signed = name == "output_sum"
            valid = tensor.isfinite() & (signed | (tensor >= 0))
            if name == "moments":
                valid[:, :, 0, 0] &= tensor[:, :, 0, 0] <= MOST_COUNTED
            elif not tensor.is_floating_point():
                valid &= tensor.long() <= MOST_COUNTED
            if not valid.all():
                layer, *index = (~valid).nonzero()[0].tolist()
                value = tensor[(layer, *index)].item()
                most = " up to 2^53" if value > MOST_COUNTED and math.isfinite(value) else ""
                raise ValueError(
                    f"{name}: layer {shown(self.layers[layer])} holds {value} at {index}; "
                    f"expected finite values{'' if signed else ' >= 0'}{most}"
                )
        if self.channel_order is not None:
            expected = torch.arange(self.channel_order.shape[2], dtype=torch.int32)
            odd = (self.channel_order.sort(dim=2).values != expected).any(2).nonzero()
            if len(odd):
                layer, expert = odd[0].tolist()
                raise ValueError(
                    f"channel_order: layer {shown(self.layers[layer])}, expert {expert}: expected every channel once"
                )


def _tensor_layout(
    layers: int, experts: int, top_k: int, hidden_size: int | None, width: int | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor field; ``output_sum`` with a hidden size only, those of channels with a width
    only."""
    optional = {} if hidden_size is None else {"output_sum": ((layers, experts, hidden_size), torch.float64)}
    if width is not None:
        optional |= dict.fromkeys(("channel_errors", "channel_norms"), ((layers, experts, width), torch.float64))
        optional["channel_order"] = ((layers, experts, width), torch.int32)
    return {
        "moments": ((layers, experts, 3, 3), torch.float64),
        "tokens": ((layers,), torch.int64),
        "ratio_histogram": ((layers, top_k - 1, RATIO_BINS), torch.int64),
        "coactivation": ((layers, experts, experts), torch.int64),
        "output_pairs": ((layers, experts, experts), torch.float64),
        **optional,
    }


def _check_tensors(tensors: dict[str, torch.Tensor], layers: int, experts: int, top_k: int) -> None:
    """ValueError, naming the field, for a tensor of another shape, dtype or device."""
    hidden_size, width = _last_size(tensors.get("output_sum")), _last_size(tensors.get("channel_errors"))
    for name, (shape, dtype) in _tensor_layout(layers, experts, top_k, hidden_size, width).items():
        tensor = tensors.get(name)
        if tensor is None:
            continue  # one that is missed is an error of its own
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(f"{name}: is {tensor.dtype} on {tensor.device}; expected {dtype} on cpu")


def _last_size(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.shape[-1] if tensor.dim() else 0


def _check_names(names: AbstractSet[str], version: int) -> None:
    """ValueError unless ``names`` are the tensor fields of a format version, with or without the optional ones."""
    later = {"output_pairs"} if version == 1 else set()
    if missing := sorted(_tensor_layout(1, 1, 1, None, None).keys() - names - later):
        raise ValueError(f"tensor {missing[0]!r} is missing")
    known = _tensor_layout(1, 1, 1, 1, 1).keys() - later
    if version >= 3:
        known |= {f"{_OF_DOMAINS}{name}" for name in known - {"channel_norms", "channel_order"}}
    if unexpected := sorted(names - known):
        raise ValueError(f"tensor {shown(unexpected[0])} is not part of format version {version}")


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
        raise ValueError(
            f"experts: expected {len(layers)} numbers, the largest {moments.shape[1]}, got {shown(experts)}"
        )
    return {
        "layout": Layout(metadata["model_type"], layers, experts, top_k, groups, fewest),
        "gate": metadata["gate"],
        "dataset": metadata["dataset"],
        # Absent in files from before several machines.
        "model_digest": metadata.get("model_digest", ""),
        "shards": _parse_names("shards", metadata.get("shards", "[]")),
    }


def _parse_integer(name: str, text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,40}", text):
        raise ValueError(f"metadata {name!r} is {shown(text, 40)}; expected an integer")
    return int(text)


def _parse_counts(name: str, text: str) -> tuple[int, ...]:
    return tuple(_parse_list(name, text, int, "integers"))


def _parse_names(name: str, text: str) -> tuple[str, ...]:
    return tuple(_parse_list(name, text, str, "names"))


def _parse_list(name: str, text: str, kind: type, called: str) -> list[Any]:
    try:
        entries = parse_json(text)
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not all(type(entry) is kind for entry in entries):
        raise ValueError(f"metadata {name!r} is {shown(text, 40)}; expected a JSON list of {called}")
    return entries
