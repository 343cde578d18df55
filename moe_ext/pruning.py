"""Applies a :class:`PruningPlan` to a live model: compacts router rows and expert weights, and updates the config.

The result is a normal transformers model: ``save_pretrained`` writes a checkpoint that stock ``from_pretrained`` loads.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_ext.architectures import MoeBlock, check_layout, family_of, moe_blocks
from moe_ext.plan import PruningPlan


def check_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Checks that a plan was made for a model like this one, before anything is touched.

    Raises:
        TypeError, ValueError: what does not fit, and what was expected.
    """
    blocks = moe_blocks(model)
    if plan.model_type != model.config.model_type:
        raise ValueError(f"the plan is for model type {plan.model_type!r}; this model is {model.config.model_type!r}")
    names = tuple(block.name for block in blocks)
    if plan.layers != names:
        raise ValueError(
            f"the plan has {len(plan.layers)} layers from {plan.layers[0]!r}; "
            f"this model has {len(names)} MoE layers from {names[0]!r}"
        )
    for block in blocks:
        check_layout(block)
        if plan.num_experts != block.num_experts:
            raise ValueError(
                f"the plan is for {plan.num_experts} experts a layer; {block.name} has {block.num_experts}"
            )
    for name, keep in zip(names, plan.keep, strict=True):
        if len(keep) < blocks[0].top_k:
            raise ValueError(f"{name}: the plan keeps {len(keep)} experts; a token needs top_k = {blocks[0].top_k}")
    if len({len(keep) for keep in plan.keep}) > 1:
        raise ValueError(
            "the plan keeps different numbers of experts in different layers, which transformers' "
            f"{model.config.model_type} config cannot express; make a plan with the same number in every layer"
        )


def prune(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Removes the experts that a plan does not keep, in place; patched or not, the model stays so.

    At most one layer's experts are held twice at any moment. Skip thresholds in the config stay as they are; calibrate
    the pruned model for thresholds of its own. Should memory run out, every layer is either pruned or as it was, but
    the model as a whole is neither: load it again.

    Args:
        model: the model that the plan was made for.
        plan: experts to keep per layer, the same number in every layer.

    Returns:
        The same model, with ``len(plan.keep[0])`` experts in every MoE layer.

    Raises:
        TypeError, ValueError: the plan does not fit the model (see :func:`check_plan`). The model is left as it was.
    """
    check_plan(model, plan)
    family = family_of(model)
    with torch.no_grad():
        for block, keep in zip(moe_blocks(model), plan.keep, strict=True):
            _keep_experts(block, keep)
    kept = len(plan.keep[0])
    for field in family.num_experts_fields:
        setattr(model.config, field, kept)
    if hasattr(model, "num_experts"):  # the language model head's copy, for the auxiliary loss
        model.num_experts = kept
    return model


def _keep_experts(block: MoeBlock, keep: tuple[int, ...]) -> None:
    """Replaces every parameter of a block by its rows ``keep`` along the first (expert) dimension."""
    parts = [(module, *named) for module in (block.router, block.experts) for named in module.named_parameters()]
    # All rows are copied before any takes its place: a block is pruned as a whole or not at all.
    rows = [old.index_select(0, torch.tensor(keep, device=old.device)) for _, _, old in parts]
    for (module, name, old), kept in zip(parts, rows, strict=True):
        setattr(module, name, nn.Parameter(kept, requires_grad=old.requires_grad))
        module.num_experts = len(keep)  # type: ignore[assignment]
