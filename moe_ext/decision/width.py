"""How wide thinner experts are to be: a share of their parameters, a number, or what makes a checkpoint fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.checkpoint_size import CheckpointSize, checkpoint_size
from moe_ext.storage.byte_counts import bytes_in


@dataclass(frozen=True)
class Request:
    """What was asked for; fields as the arguments of :func:`moe_ext.thin_plan`.

    Attributes:
        multiple: what the width is a multiple of, blocks of channels included.
    """

    size: float | None
    channels: int | None
    fit: int | str | None
    model: PreTrainedModel | str | Path | None
    multiple: int
    trust_remote_code: bool


def planned_width(
    request: Request, stats: ExpertStatistics, keep: Sequence[Sequence[int]]
) -> tuple[int, dict[str, Any]]:
    """I', the channels that every kept expert keeps; and what a plan says of why.

    Args:
        stats: with sums over channels.
        keep: experts that every layer keeps.

    Raises:
        CheckpointError, OSError, ValueError: as :func:`moe_ext.thin_plan` says.
    """
    before = stats.width
    assert before is not None
    asked = {"size": request.size, "channels": request.channels, "fit": request.fit}
    if list(asked.values()).count(None) != 2:
        given = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        raise ValueError(f"size: expected exactly one of size, channels and fit, got {given}")
    if (request.fit is None) != (request.model is None):
        raise ValueError("model: expected with fit, and only then")
    if request.size is not None:
        share = sum(map(len, keep)) / (stats.num_experts * stats.num_layers)
        return _width_for_size(request.size, before, share, request.multiple), {"size": request.size}
    if request.fit is None or request.model is None:
        return _checked_width(request.channels, before, request.multiple), {}
    fit = _bytes(request.fit)
    size = checkpoint_size(request.model, keep, trust_remote_code=request.trust_remote_code)
    width = _width_that_fits(fit, size, stats, request.multiple)
    return width, {"fit": fit, "weight_bytes": size.at(width)}


def _width_for_size(size: float, before: int, share: float, multiple: int) -> int:
    """I' for experts of ``before`` channels, of which a ``share`` is kept."""
    if not 0 < size < 1:
        raise ValueError(f"size: expected a share in (0, 1), got {size!r}")
    # A share such as 0.75 of 0.75 is a hair below 1 in floating point.
    width = math.floor(size / share * before / multiple + 1e-9) * multiple
    if width >= before:
        raise ValueError(f"size: {size!r} is no less than what the kept experts have, {share:.4g} of all parameters")
    if width < multiple:
        raise ValueError(
            f"size: {size!r} leaves fewer than {multiple} of {before} channels; give a larger one, or a smaller "
            "multiple"
        )
    return width


def _bytes(fit: int | str) -> int:
    try:
        if isinstance(fit, str):
            return bytes_in(fit)
        if type(fit) is not int or fit < 1:
            raise ValueError(f"expected a number of bytes, got {fit!r}")
    except ValueError as error:
        raise ValueError(f"fit: {error}") from None
    return fit


def _width_that_fits(fit: int, model: CheckpointSize, stats: ExpertStatistics, multiple: int) -> int:
    """I' with which a checkpoint, its kept experts thinned, takes no more than so many bytes."""
    if (different := stats.layout.difference(model.layout)) is not None:
        raise ValueError(f"model: is another than that of the statistics: {different}")
    if model.width != stats.width:
        raise ValueError(f"model: has experts of {model.width} channels; those of the statistics have {stats.width}")
    if multiple % model.block:
        raise ValueError(
            f"blocks: the model stores {model.block} channels together, or with one scale; give blocks={model.block}"
        )
    if model.at(model.width) <= fit:
        raise ValueError(
            f"fit: {fit:,} bytes hold the kept experts with all their channels, {model.at(model.width):,} bytes; no "
            "channel has to go"
        )
    width = model.widest(fit, multiple)
    if width == 0:
        raise ValueError(
            f"fit: expected {model.at(multiple):,} bytes or more, which the weights take with {multiple} of "
            f"{model.width} channels an expert, got {fit:,}; keep fewer experts, or give a smaller multiple"
        )
    return width


def _checked_width(channels: int | None, before: int, multiple: int) -> int:
    if type(channels) is not int or not multiple <= channels < before or channels % multiple:
        raise ValueError(
            f"channels: expected a multiple of {multiple} (see multiple and blocks) below {before}, got {channels!r}"
        )
    return channels
