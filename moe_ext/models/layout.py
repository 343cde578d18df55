"""The one record of a model's MoE layers: what statistics, scores and plans are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from moe_ext.models.blocks import MoeBlock, model_type_of


@dataclass(frozen=True)
class Layout:
    """L Mixture-of-Experts layers of E experts, K chosen per token.

    Attributes:
        model_type: transformers' name of the model family, such as ``"mixtral"``.
        layers: L module names of the Mixture-of-Experts blocks, in model order.
        experts: number of experts of every layer.
        top_k: K, experts per token.
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
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers: expected one or more distinct names, got {self.layers!r}")
        if len(self.experts) != len(self.layers) or min(self.experts, default=0) < 1:
            raise ValueError(
                f"experts: expected {len(self.layers)} numbers, the largest {self.num_experts}, got {self.experts}"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: expected 1 to {self.num_experts} experts, got {self.top_k}")
        if self.groups < 1 or any(count % self.groups for count in self.experts):
            raise ValueError(f"groups: {self.groups} groups of equal size do not hold {self.experts} experts")
        object.__setattr__(self, "fewest", self.fewest or self.top_k)
        if not self.top_k <= self.fewest <= min(self.experts):
            raise ValueError(f"fewest: expected {self.top_k} to {min(self.experts)} experts, got {self.fewest}")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def num_experts(self) -> int:
        """E, of the largest layer."""
        return max(self.experts, default=0)


def layout_of(model: PreTrainedModel, blocks: Sequence[MoeBlock]) -> Layout:
    """The layout of a live model, ``blocks`` being its MoE layers."""
    return Layout(
        model_type=model_type_of(model),
        layers=tuple(block.name for block in blocks),
        experts=tuple(block.num_experts for block in blocks),
        top_k=blocks[0].top_k,
        groups=blocks[0].groups,
        fewest=blocks[0].fewest_experts,
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
