"""Applies a :class:`PruningPlan` to a live model: compacts router rows and expert weights, and updates the config.

The result is a normal transformers model: ``save_pretrained`` writes a checkpoint that stock ``from_pretrained`` loads,
where every layer keeps the same number of experts, and :func:`moe_ext.from_pretrained` where they do not.
"""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import closing

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import (
    MoeBlock,
    check_layout,
    counted_of,
    counting_attributes,
    decoder_layers,
    expert_tensors,
    model_type_of,
    moe_blocks,
    prunable_blocks,
    refuse_novices,
    refuse_offloaded,
    refuse_shared_out,
    refuse_shared_weights,
    text_config,
)
from moe_ext.models.boundary import goes_through_interface, output_width
from moe_ext.models.config_section import section_of, section_with_novices, set_section
from moe_ext.models.counted import CountsPlace, with_counts
from moe_ext.models.families import FURTHER_LAYERS_FIELDS
from moe_ext.models.novices import add_novices
from moe_ext.models.only_pruned import is_only_pruned
from moe_ext.models.own_counts import configs_of_their_own
from moe_ext.models.packed_experts import refuse_packed
from moe_ext.models.replace import replace_tensor
from moe_ext.models.uneven_counts import counts_by_layer, place_of_counts
from moe_ext.models.wrapped import unwrapped_to_change
from moe_ext.pruning.keep_experts import keep_slices, remap_choices
from moe_ext.pruning.refit_layers import refitted_layers
from moe_ext.pruning.thin import Thinning
from moe_ext.storage.formats import shown


def check_plan(model: PreTrainedModel, blocks: list[MoeBlock], plan: PruningPlan) -> CountsPlace:
    """Checks that a plan was made for a model like this one, before anything is touched.

    Returns:
        Where the config is to say how many experts each layer has, if it keeps different numbers.

    Raises:
        ValueError: what does not fit, and what was expected.
    """
    if plan.model_type != model_type_of(model):
        raise ValueError(f"the plan is for model type {shown(plan.model_type)}; this model is {model_type_of(model)!r}")
    refuse_novices(blocks, "prune")
    refuse_offloaded(blocks, "prune")
    refuse_shared_out(blocks, "prune")
    refuse_shared_weights(blocks)
    names = tuple(block.name for block in blocks)
    if plan.layers != names:
        raise ValueError(
            f"the plan has {len(plan.layers)} layers from {shown(plan.layers[0])}; "
            f"this model has {len(names)} MoE layers from {names[0]!r}"
        )
    top_k = max(block.top_k for block in blocks)
    if plan.top_k != top_k:
        raise ValueError(f"the plan is for top_k {plan.top_k}; this model has {top_k}")
    for block in blocks:
        check_layout(block)
        if plan.num_experts != block.num_experts:
            raise ValueError(
                f"the plan is for {plan.num_experts} experts a layer; {block.name} has {block.num_experts}"
            )
    for block, keep in zip(blocks, plan.keep, strict=True):
        _check_keep(block, keep)
    counts = [len(keep) for keep in plan.keep]
    if len(set(counts)) == 1:
        return "per_layer_config"
    if any(is_only_pruned(block.experts) for block in blocks):
        raise ValueError(
            f"plan: keeps {min(counts)} to {max(counts)} experts a layer; {plan.model_type!r} models are pruned to one "
            "number for all layers (scope='layer')"
        )
    return place_of_counts(model, blocks, counts)


def blocks_to_prune(model: PreTrainedModel, plan: PruningPlan, *, refit: bool) -> list[MoeBlock]:
    """The MoE layers of a model that a plan is for; where it only takes whole experts away, also of one that is only
    pruned. TypeError, ValueError as :func:`moe_ext.models.blocks.moe_blocks`."""
    return moe_blocks(model) if refit or plan.channels is not None else prunable_blocks(model)


def _check_keep(block: MoeBlock, keep: tuple[int, ...]) -> None:
    """ValueError, naming the layer, if the router could not choose K of the kept experts."""
    if len(keep) < block.top_k:
        raise ValueError(f"{block.name}: the plan keeps {len(keep)} experts; a token needs top_k = {block.top_k}")
    size = block.num_experts // block.groups
    kept = [sum(expert // size == group for expert in keep) for group in range(block.groups)]
    if len(set(kept)) > 1:
        raise ValueError(
            f"{block.name}: the plan keeps {kept} experts of {block.groups} groups (config field "
            f"{block.family.groups_field}); the router needs the same number in every group"
        )
    if len(keep) < block.fewest_experts:
        raise ValueError(
            f"{block.name}: the plan keeps {len(keep)} experts; the family's router needs {block.fewest_experts}"
            + (
                f" ({block.fewest_experts // block.groups} in each of {block.groups} groups)"
                if block.groups > 1
                else ""
            )
        )


def prune(
    model: PreTrainedModel,
    plan: PruningPlan,
    *,
    novices: ExpertStatistics | None = None,
    refit: Iterable[Mapping[str, Tensor]] | None = None,
    progress: bool = False,
) -> PreTrainedModel:
    """Removes the experts and channels that a plan does not keep, in place; patched or not, the model stays so.

    With the experts go their rows of the router, its correction biases and every count of experts in the model and its
    config; where a table says a token's experts, others take a removed one's tokens
    (:mod:`moe_ext.models.fixed_choices`). The config counts no layers for multi-token prediction any more:
    transformers has left them out. Where layers keep different numbers, the config says so in transformers'
    ``per_layer_config``; it then refuses reading the one global count, so that code which needs it (the auxiliary loss
    of training) fails clearly. Families whose config or code takes one number for all layers keep the largest there,
    and the layers' own in ``config.moe_ext``.

    At most one layer's experts are held twice at any moment. Skip thresholds in the config stay as they are; calibrate
    the pruned model for thresholds of its own. Should memory run out, every layer is either pruned or as it was, but
    the model as a whole is neither: load it again.

    Args:
        model: the model that the plan was made for, compiled by ``torch.compile`` or not.
        plan: experts to keep per layer, and of these the channels.
        novices: statistics of this model with an ``output_sum``. The mean output of a removed expert then takes its
            place (MoNE, arXiv 2507.00390) and the router stays whole: a token is routed as before. Such a
            model saves as usual and loads through :func:`moe_ext.from_pretrained` only; it is neither calibrated nor
            pruned again, and skips by thresholds of the unpruned model. An expert that no token reached has mean 0.
        refit: calibration text, batches as for :func:`moe_ext.calibrate`: the kept experts' down projections are then
            fitted to make up for what goes, layer by layer (:mod:`moe_ext.pruning.refit_layers`), with a warning where
            there is little text for that. Without it no weight changes.
        progress: whether to show a progress bar of the refit.

    Returns:
        The same model, with ``len(plan.keep[layer])`` experts in every MoE layer.

    Raises:
        TypeError, ValueError: the plan or the statistics do not fit the model (see :func:`check_plan`), or a wrapper
            around it (DistributedDataParallel, PEFT) keeps account of its weights; or no refit is possible (see
            :func:`moe_ext.pruning.refit_layers.refitted_layers`). The model is left as it was.
    """
    given, model = model, unwrapped_to_change(model, "prune")
    if novices is not None:
        blocks = moe_blocks(model)
        check_plan(model, blocks, plan)
        if plan.channels is not None:
            raise ValueError("novices: go with experts that keep all their channels; this plan thins them")
        for block in blocks:
            refuse_packed(f"novices: {block.name}", block.experts, "prune")
            if not goes_through_interface(block.experts):
                raise ValueError(
                    f"novices: {block.name}: {type(block.experts).__name__} are called past transformers' experts "
                    "interface, where means have no place; prune without"
                )
        if refit is not None:
            raise ValueError("refit: kept experts make up for removed ones already by novices; expected one of the two")
        _put_novices(model, blocks, plan, novices)
        return given
    prune_whole(model, plan, refit=refit, progress=progress)
    return given


def prune_whole(
    model: PreTrainedModel,
    plan: PruningPlan,
    *,
    refit: Iterable[Mapping[str, Tensor]] | None = None,
    progress: bool = False,
    further_layers: bool = False,
) -> None:
    """:func:`prune` of a model without a wrapper, without novices.

    Args:
        further_layers: whether layers for multi-token prediction, which the model does not have, are kept where it is
            saved; the config then goes on counting them.
    """
    blocks = blocks_to_prune(model, plan, refit=refit is not None)
    place = check_plan(model, blocks, plan)
    thinning = None if plan.channels is None else Thinning.of(model, blocks, plan.channels, list(map(len, plan.keep)))
    fitted: dict[int, Tensor] = {}
    if refit is not None:
        for block in blocks:
            refuse_packed(f"refit: {block.name}", block.experts, "refit")
        with closing(refitted_layers(model, blocks, plan, list(refit), progress=progress)) as layers:
            fitted.update(layers)
    counts, fields = [len(keep) for keep in plan.keep], counted_of(model).fields
    attributes = counting_attributes(model, counts)
    parts = [block.routing_tensors() + block.expert_parts() for block in blocks]
    with torch.no_grad():
        for block, keep in zip(blocks, plan.keep, strict=True):
            remap_choices(block, keep)
            keep_slices(keep, plan.num_experts, parts.pop(0))  # the only other holder of the old tensors
            inside = set(block.module.modules())
            for module, name, value in attributes:
                if module in inside:
                    setattr(module, name, value)
    for module, name, value in attributes:  # those of no block, too
        setattr(module, name, value)
    with_counts(text_config(model), fields, counts_by_layer(blocks, counts), place)
    if place == "moe_ext":
        configs_of_their_own(blocks, counts, fields)
    if not further_layers:
        _announce_no_further_layers(model, on_disk=any(each.is_meta for each in model.parameters()))
    if thinning is not None:
        thinning.apply(model, blocks)
    for layer, down in fitted.items():
        replace_tensor(blocks[layer].experts, "down_proj", expert_tensors(blocks[layer])["down_proj"], down)


def _announce_no_further_layers(model: PreTrainedModel, *, on_disk: bool) -> None:
    """Layers that predict several tokens ahead come after the decoder's, in checkpoints only: transformers' models have
    none, and ``generate(use_mtp=True)`` reads those of the folder that a model came from, where all experts are. What
    is saved has none, and its config does not count them."""
    config = text_config(model)
    advice = "" if on_disk else ". moe_ext.prune_checkpoint keeps them, from folder to folder"
    for name in FURTHER_LAYERS_FIELDS:
        if announced := getattr(config, name, None):
            setattr(config, name, type(announced)())
            warnings.warn(
                f"the config's {name} is {announced}; layers for multi-token prediction are not in the pruned model, "
                f"and its config counts none{advice}",
                stacklevel=3,
            )


def _put_novices(model: PreTrainedModel, blocks: list[MoeBlock], plan: PruningPlan, stats: ExpertStatistics) -> None:
    """Leaves the routers as they are, compacts the experts, and puts means in the place of the others."""
    if stats.output_sum is None:
        raise ValueError("novices: the statistics have no sums of outputs: calibrate(..., outputs=True)")
    if (different := plan.misfit(stats.layout)) is not None:
        raise ValueError(f"novices: the statistics are of another model than the plan: {different}")
    if stats.output_sum.shape[-1] != output_width(blocks[0].experts):
        raise ValueError(
            f"novices: the statistics' outputs have {stats.output_sum.shape[-1]} dimensions; "
            f"the model's have {output_width(blocks[0].experts)}"
        )
    section = section_with_novices(
        {str(block.layer): len(keep) for block, keep in zip(blocks, plan.keep, strict=True)},
        section_of(model.config),
    )
    _, layers, inside = decoder_layers(model, blocks)
    with torch.no_grad():
        for layer, (block, keep) in enumerate(zip(blocks, plan.keep, strict=True)):
            removed = list(plan.removed(layer))
            mean = stats.output_sum[layer, removed] / stats.routing_counts()[layer, removed, None].clamp(min=1)
            weight = next(block.experts.parameters())
            places = torch.empty(plan.num_experts, dtype=torch.int64)
            places[[*keep, *removed]] = torch.arange(plan.num_experts)
            # Copied before the experts change: a layer is pruned as a whole or not at all.
            places, mean = places.to(weight.device), mean.to(weight.device, weight.dtype)
            keep_slices(keep, plan.num_experts, block.expert_parts())
            block.experts.num_experts = len(keep)  # type: ignore[assignment]
            add_novices(layers[inside[layer]], block.experts, places, mean)
    set_section(model.config, section)
