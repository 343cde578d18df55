"""What goes with the small Mixtral of the fixture ``tiny_mixtral``: a plan, thresholds, the type of the fixture."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import MixtralForCausalLM

from moe_ext.decision.pruning_plan import PruningPlan

MixtralFactory = Callable[..., MixtralForCausalLM]

THRESHOLDS = torch.tensor([[0.6], [0.4], [0.8]])
KEEP = ((0, 2, 3, 5, 7), (1, 2, 4, 5, 6), (0, 1, 3, 6, 7))


def plan_of(keep: tuple[tuple[int, ...], ...] = KEEP, **changes: Any) -> PruningPlan:
    fields: dict[str, Any] = {
        "model_type": "mixtral",
        "num_experts": 8,
        "top_k": 2,
        "layers": tuple(f"model.layers.{layer}.mlp" for layer in range(len(keep))),
        "keep": keep,
        "made_by": {"criterion": "by hand"},
    }
    return PruningPlan(**{**fields, **changes})
