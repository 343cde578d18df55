"""The one record of a model's MoE layers: what statistics, scores and plans are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from moe_ext.models.blocks import MoeBlock, model_type_of, refuse_shared_weights
from moe_ext.storage.formats import check_label, shown

MOST_EXPERTS = 1 << 16
"""Experts that a layer may have: far more than any model's, so that a damaged number is no matter of memory."""


SAME_MODEL = ("model_type", "layers", "num_experts", "experts", "top_k")
"""Fields of a layout that a file for the same model has alike; ``groups`` and ``fewest`` are not in old files."""


def check_layers(layers: object) -> None:
    """ValueError unless there are one or more layers with distinct names."""
    if not isinstance(layers, tuple) or not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers: expected one or more distinct names, got {shown(layers)}")
    for name in layers:
        check_label("layers", name)


@dataclass(frozen=True)
class Layout:
    """L Mixture-of-Experts layers of E experts, K chosen per token.

    Attributes:
        model_type: transformers' name of the model family, such as ``"mixtral"``.
        layers: L module names of the Mixture-of-Experts blocks, in model order.
        experts: number of experts of every layer.
        top_k: K, experts per token, the largest of any layer.
        groups: expert groups of a layer, contiguous and of equal size, that pruning must keep equal; 1: none.
        fewest: experts that a layer must keep for its router to choose K; 0 stands for K.

    Raises:
        ValueError: ``layers`` is empty or repeats a name, or the numbers do not fit.
    """

    model_type: str
    layers: tuple[str, ...]
    experts: tuple[int, ...]
    top_k: int
    groups: int = 1
    fewest: int = 0

    def __post_init__(self) -> None:
        check_label("model_type", self.model_type)
        check_layers(self.layers)
        if len(self.experts) != len(self.layers) or not 1 <= min(self.experts) <= max(self.experts) <= MOST_EXPERTS:
            raise ValueError(
                f"experts: expected {len(self.layers)} numbers, the largest {shown(self.num_experts)}, "
                f"got {shown(self.experts)}"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: expected 1 to {self.num_experts} experts, got {shown(self.top_k)}")
        if self.groups < 1 or any(count % self.groups for count in self.experts):
            raise ValueError(
                f"groups: {shown(self.groups)} groups of equal size do not hold {shown(self.experts)} experts"
            )
        object.__setattr__(self, "fewest", self.fewest or self.top_k)
        if not self.top_k <= self.fewest <= min(self.experts):
            raise ValueError(f"fewest: expected {self.top_k} to {min(self.experts)} experts, got {shown(self.fewest)}")

    def difference(self, other: Layout, *, names: Sequence[str] = SAME_MODEL) -> str | None:
        """What says that two layouts are not of one model, such as ``"top_k 2 and 4"``; None if nothing does.

        Args:
            names: the fields that are compared.
        """
        for name in names:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} {shown(ours)} and {shown(theirs)}"
        return None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def num_experts(self) -> int:
        """E, of the largest layer."""
        return max(self.experts, default=0)


def layout_of(model: PreTrainedModel, blocks: Sequence[MoeBlock]) -> Layout:
    """The layout of a live model, ``blocks`` being its MoE layers.

    Raises:
        ValueError: two of them have the same experts.
    """
    refuse_shared_weights(blocks)
    return Layout(
        model_type=model_type_of(model),
        layers=tuple(block.name for block in blocks),
        experts=tuple(block.num_experts for block in blocks),
        top_k=max(block.top_k for block in blocks),
        groups=blocks[0].groups,
        fewest=max(block.fewest_experts for block in blocks),
    )


class WithLayout:
    """What is about the MoE layers of a model: the fields of its ``layout``, as attributes of its own."""

    layout: Layout

    @property
    def model_type(self) -> str:
        """transformers' name of the model family."""
        return self.layout.model_type

    @property
    def layers(self) -> tuple[str, ...]:
        """L module names of the Mixture-of-Experts blocks."""
        return self.layout.layers

    @property
    def experts(self) -> tuple[int, ...]:
        """Number of experts of every layer."""
        return self.layout.experts

    @property
    def top_k(self) -> int:
        """K, experts per token."""
        return self.layout.top_k

    @property
    def groups(self) -> int:
        """Expert groups that pruning must keep equal."""
        return self.layout.groups

    @property
    def fewest(self) -> int:
        """Experts that a layer must keep."""
        return self.layout.fewest

    @property
    def num_layers(self) -> int:
        """L."""
        return self.layout.num_layers

    @property
    def num_experts(self) -> int:
        """E."""
        return self.layout.num_experts
