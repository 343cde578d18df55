"""Statistics to a plan of thinner experts, and of fewer and thinner ones."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.channels import kept_by_score
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.decision.super_experts import named, super_experts
from moe_ext.decision.width import Request, planned_width
from moe_ext.storage.formats import shown
from moe_ext.version import __version__

MULTIPLE = 64
"""What a width is a multiple of, unless asked otherwise: tensor cores, groups of scales and tensor parallel ranks share
such widths out evenly."""


def thin_plan(
    stats: ExpertStatistics,
    *,
    size: float | None = None,
    channels: int | None = None,
    fit: int | str | None = None,
    model: PreTrainedModel | str | Path | None = None,
    plan: PruningPlan | None = None,
    multiple: int = MULTIPLE,
    select: Literal["energy", "obs"] = "energy",
    blocks: int = 1,
    trust_remote_code: bool = False,
    allow_super: bool = False,
) -> PruningPlan:
    """Keep the channels of every expert that contribute most, the same number of each.

    An expert that no token reached keeps the channels with the largest ``||down[:, j]|| * ||up[j]||``, with a warning.

    Args:
        stats: of the unpruned model, from ``calibrate(..., channels="energy")``.
        size: share of the expert parameters that is left, in (0, 1): the width is the largest multiple within it.
            Exactly one of ``size``, ``channels`` and ``fit`` is given.
        channels: I', the channels that every expert keeps.
        fit: bytes that all weights of the checkpoint may take as they are stored, a number or a text such as
            ``"48GB"`` (powers of 1000) or ``"44.7GiB"`` (of 1024): the width is the largest multiple within them.
        model: what is to fit, with ``fit`` only: a checkpoint folder, of which no weight is read, or a loaded model.
        plan: experts to keep; ``size`` is then what is left of all of them. None: all.
        multiple: what the width is a multiple of.
        select: "energy": by a channel's error, what the squared error of the layer's output gains if it alone goes.
            "obs": those that the optimal brain surgeon leaves (:mod:`moe_ext.calibration.removal_order`), for which the
            statistics are from ``calibrate(..., channels="gram")``. The kept channels make up for the others only once
            they are refitted, ``prune(..., refit=batches)``.
        blocks: channels that stay or go together, by the sum of their errors, or with "obs" of their places in the
            order of removal; the width is a multiple of this, too. Float8 weights with a scale a block want the rows
            and columns of a block here.
        trust_remote_code: as for :func:`moe_ext.from_pretrained`, with a folder.
        allow_super: whether ``plan`` may remove super experts (:func:`moe_ext.super_experts`).

    Returns:
        A plan with ``channels``; ``made_by`` holds what was asked for, and that of ``plan``.

    Raises:
        ValueError: statistics without sums over channels, or of a model whose layers differ; a plan for another model
            or with channels; a plan without super experts, unless they are allowed to go (they are named); other than
            one of size, channels and fit; a width below ``multiple``, not a multiple of it, or not below what the
            experts have; bytes that the checkpoint takes anyway or that are too few for it; a model that is not the
            statistics'; or blocks that do not divide the experts.
        CheckpointError, OSError: the folder is not whole.
    """
    if stats.channel_errors is None or stats.channel_norms is None:
        raise ValueError('stats: hold no sums over channels; calibrate(..., channels="energy"), or --channels energy')
    if select not in ("energy", "obs"):
        raise ValueError(f"select: expected 'energy' or 'obs', got {select!r}")
    if select == "obs" and stats.channel_order is None:
        raise ValueError(
            'select: the statistics hold no order of channels, which obs takes; calibrate(..., channels="gram"), or '
            "--channels gram"
        )
    if len(set(stats.experts)) > 1:
        raise ValueError("stats: the layers differ in experts already; plan from statistics of the unpruned model")
    experts, before = stats.num_experts, stats.channel_errors.shape[2]
    keep = (tuple(range(experts)),) * stats.num_layers if plan is None else plan.keep
    made_by: dict[str, Any] = {"dataset": stats.dataset}
    if plan is not None:
        if plan.channels is not None:
            raise ValueError("plan: says already which channels are kept")
        if (different := plan.misfit(stats.layout)) is not None:
            raise ValueError(f"plan: is for another model than the statistics: {different}")
        gone = [each for each in super_experts(stats) if each.expert not in keep[each.layer]]
        if gone and not allow_super:
            raise ValueError(f"plan: removes {named(gone)}; keep them, or allow_super=True (--allow-super)")
        made_by = dict(plan.made_by)
    for name, number in (("multiple", multiple), ("blocks", blocks)):
        if type(number) is not int or number < 1:
            raise ValueError(f"{name}: expected 1 or more, got {number!r}")
    if before % blocks:
        raise ValueError(f"blocks: expected a divisor of the {before} channels that experts have, got {blocks}")
    _check_finite(stats)
    request = Request(size, channels, fit, model, math.lcm(multiple, blocks), trust_remote_code)
    width, asked = planned_width(request, stats, keep)
    unreached = stats.routing_counts() == 0
    scores = _scores(stats, stats.channel_errors, stats.channel_norms) if select == "energy" else _places(stats)
    kept = [kept_by_score(scores[layer, list(row)], width, blocks) for layer, row in enumerate(keep)]
    alone = sum(int(unreached[layer, list(row)].sum()) for layer, row in enumerate(keep))
    if alone:
        warnings.warn(f"{alone} experts that no token reached keep the channels with the largest weights", stacklevel=2)
    made_by |= {**asked, "channels": width, "select": select, "blocks": blocks}
    made_by |= {"unreached_experts": alone, "moe_ext": __version__}
    return PruningPlan.of(stats.layout, keep, made_by, KeptChannels.of(kept, before))


def _check_finite(stats: ExpertStatistics) -> None:
    """ValueError, naming layer and expert, unless all sums over channels are finite."""
    for name in ("channel_errors", "channel_norms"):
        strange = ~getattr(stats, name).isfinite()
        if bool(strange.any()):
            layer, expert, channel = strange.nonzero()[0].tolist()
            raise ValueError(
                f"stats: {name} of layer {shown(stats.layers[layer])}, expert {expert}, channel {channel} is "
                f"{getattr(stats, name)[layer, expert, channel].item()}; expected a finite number"
            )


def _scores(stats: ExpertStatistics, errors: Tensor, norms: Tensor) -> Tensor:
    """(L, E, I): channels' errors; the norms of their weights where no token reached the expert."""
    return torch.where((stats.routing_counts() == 0)[:, :, None], norms, errors)


def _places(stats: ExpertStatistics) -> Tensor:
    """(L, E, I) float64: every channel's place in the order of removal."""
    assert stats.channel_order is not None
    return stats.channel_order.argsort(dim=2).double()
