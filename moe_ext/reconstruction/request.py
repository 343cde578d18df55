"""What a search is asked for, and what that means for the model at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.models.config_section import check_thresholds, scale_in_config, thresholds_in_config
from moe_ext.models.layout import Layout
from moe_ext.reconstruction.budgets import allowed_sizes, counts_per_layer
from moe_ext.reconstruction.measures import Measure
from moe_ext.reconstruction.subsets import count_subsets
from moe_ext.runtime.head_gradients import LabelKind, Labels
from moe_ext.storage.formats import check_label

Loss = Literal["reconstruction", "fisher"]
Method = Literal["layerwise", "progressive", "greedy"]
Budget = Literal["layer", "model"]
LOSSES = ("reconstruction", "fisher")
METHODS = ("layerwise", "progressive", "greedy")
BUDGETS = ("layer", "model")


@dataclass(frozen=True, eq=False)
class SearchRequest:
    """The arguments of :func:`moe_ext.search` that decide its result, beside model and text; fields as there."""

    keep: int | Sequence[int] | None
    ratio: float | None
    method: Method
    budget: Budget | None
    skip: Tensor | Literal["config"] | None
    max_subsets: int
    dataset: str
    loss: Loss = "reconstruction"
    labels: LabelKind | None = None
    seed: int | None = None

    @property
    def shares(self) -> Budget:
        """The budget: the model's if the losses are the model's own."""
        return self.budget or ("model" if self.loss == "fisher" else "layer")

    @property
    def measure(self) -> Measure:
        """What the losses measure: the paper's norms, but what layers can be compared by where they share a budget."""
        if self.loss == "fisher":
            return "nats"
        return "squares" if self.shares == "model" else "norms"

    def every_size(self, layout: Layout) -> bool:
        """Whether subsets of all sizes are evaluated: for a model-wide budget, or to know what one would cost, where
        that is quick."""
        most = 0 if self.method == "greedy" else self.max_subsets
        sizes = allowed_sizes(layout)[1:]
        quick = all(count_subsets(layout.num_experts, size, layout.groups) <= most for size in sizes)
        return self.shares == "model" or (self.loss == "fisher" and quick)

    @property
    def drawn(self) -> Labels:
        """The labels of the loss whose gradients are taken."""
        return Labels(self.labels or "model", self.seed or 0)

    def __post_init__(self) -> None:
        check_label("dataset", self.dataset)  # before the search, which ends with a file that names it
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        for name, value in (("labels", self.labels), ("seed", self.seed)):
            if self.loss != "fisher" and value is not None:
                raise ValueError(f"{name}: goes with loss='fisher', got {value!r} with loss={self.loss!r}")
        assert self.drawn

    def counts(self, layout: Layout) -> list[int]:
        """Experts that every layer keeps, before a model-wide budget shares them out.

        Raises:
            ValueError: no such numbers, method or budget, or a budget that the method cannot have.
        """
        of_layer = layout.num_experts, layout.top_k, layout.groups, layout.fewest
        counts = counts_per_layer(self.keep, self.ratio, layout.num_layers, *of_layer)
        if self.method not in METHODS or self.shares not in BUDGETS:
            raise ValueError(
                f"method and budget are {self.method!r} and {self.shares!r}; expected one of {METHODS} and {BUDGETS}"
            )
        if self.method == "progressive" and self.loss == "fisher":
            raise ValueError(
                "method: 'progressive' judges layers on what pruned layers give them, and loss='fisher' has the "
                "gradients of the unpruned model; expected layerwise or greedy"
            )
        if self.method == "progressive" and self.shares == "model":
            raise ValueError(
                "budget: 'model' shares out by the losses of all layers, and progressive knows those of earlier ones "
                "only; search layerwise with budget='model', then progressive with "
                "keep=[len(kept) for kept in plan.keep]"
            )
        return counts

    def thresholds(self, model: PreTrainedModel, layers: Sequence[int], top_k: int) -> Tensor | None:
        """(L, K - 1) float32 skip thresholds or None; ValueError if they do not fit, or the config has none."""
        if self.skip is None:
            return None
        if not isinstance(self.skip, str):
            return check_thresholds(self.skip, len(layers), top_k)
        if self.skip != "config":
            raise ValueError(f"skip is {self.skip!r}; expected thresholds, 'config' or None")
        if (scale := scale_in_config(model.config)) != "kept":
            raise ValueError(
                f"skip: the model's config has renormalise={scale!r}, which search does not judge; pass its thresholds"
            )
        found = thresholds_in_config(model.config, layers, top_k)
        if found is None:
            raise ValueError(f"skip: {model.config.name_or_path} holds no skip thresholds; moe-ext skip sets them")
        return found

    def as_json(self, layout: Layout, counts: list[int], thresholds: Tensor | None, tokens: int) -> dict[str, Any]:
        """The request as plans and files of unfinished searches remember it."""
        return {
            "loss": self.loss,
            **({"labels": self.drawn.kind, "seed": self.drawn.seed} if self.loss == "fisher" else {}),
            "method": self.method,
            "budget": self.shares,
            "measure": self.measure,
            **(
                {"ratio": self.ratio}
                if self.ratio is not None
                else {"keep": self.keep if isinstance(self.keep, int) else counts}
            ),
            "max_subsets": self.max_subsets,
            "skip": None if thresholds is None else thresholds.tolist(),
            "dataset": self.dataset,
            "tokens": tokens,
            **({"groups": layout.groups} if layout.groups > 1 else {}),
        }
