"""How a checkpoint is to be compressed, and whether the model at hand can be: found before anything runs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from moe_ext.calibration.channels import check_channels
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.meta_model import skeleton_of
from moe_ext.checkpoints.stored_tensors import stored_tensors
from moe_ext.decision.criteria import score
from moe_ext.decision.plan import plan
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.decision.thin_plan import MULTIPLE, thin_plan
from moe_ext.models.blocks import moe_blocks, refuse_novices, text_config
from moe_ext.models.counted import counts_differ
from moe_ext.models.layout import layout_of
from moe_ext.models.router_formula import gate_of
from moe_ext.pruning.kept_parts import parts_of, slices_of
from moe_ext.pruning.prune import prune
from moe_ext.pruning.refit_folder import down_projections, planned
from moe_ext.storage.byte_counts import bytes_in

Method = Literal["thin", "thin-obs", "experts", "experts+thin", "search"]
METHODS: tuple[Method, ...] = get_args(Method)
CRITERION = "weighted_ean"
"""By which experts go: of those that sum norms the best on text like the calibration text."""


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`moe_ext.compress` that say what becomes of the experts; fields as there.

    Raises:
        ValueError: an unknown method, or sizes that are out of range or not the method's.
    """

    method: Method = "thin"
    size: float | None = None
    fit: int | str | None = None
    keep: int | None = None
    ratio: float | None = None
    multiple: int = MULTIPLE
    blocks: int = 1
    refit: bool = True
    skip: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        thinner = {"size": self.size, "fit": self.fit}
        fewer = {"keep": self.keep, "ratio": self.ratio}
        for wanted, given in ((self.thins, thinner), (self.removes, fewer)):
            names, values = " and ".join(given), ", ".join(f"{name}={value!r}" for name, value in given.items())
            if list(given.values()).count(None) != 1 and wanted:
                raise ValueError(f"method {self.method!r}: expected one of {names}, got {values}")
            if list(given.values()).count(None) != 2 and not wanted:
                raise ValueError(f"method {self.method!r}: takes none of {names}, got {values}")
        for name, share in (("size", self.size), ("ratio", self.ratio)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name}: expected a share in (0, 1), got {share!r}")
        for name, number in (("keep", self.keep), ("multiple", self.multiple), ("blocks", self.blocks)):
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(f"{name}: expected a whole number of 1 or more, got {number!r}")
        if isinstance(self.fit, str):
            try:
                bytes_in(self.fit)
            except ValueError as error:
                raise ValueError(f"fit: {error}") from None

    @property
    def thins(self) -> bool:
        """Whether experts lose channels."""
        return self.method in ("thin", "thin-obs", "experts+thin")

    @property
    def removes(self) -> bool:
        """Whether experts go."""
        return self.method in ("experts", "experts+thin", "search")

    @property
    def channels(self) -> Literal["energy", "gram"] | None:
        """What calibration observes of channels."""
        if not self.thins:
            return None
        return "gram" if self.method == "thin-obs" else "energy"

    def plan(self, stats: ExpertStatistics, folder: Path, trust_remote_code: bool, criterion: str) -> PruningPlan:
        """From statistics, by every method but "search".

        Raises:
            ValueError, OSError: as for :func:`moe_ext.plan` and :func:`moe_ext.thin_plan`.
        """
        made = None
        if self.removes:
            made = plan(score(stats, criterion), keep=self.keep, ratio=self.ratio)
        if self.thins or made is None:
            made = thin_plan(
                stats,
                size=self.size,
                fit=self.fit,
                model=None if self.fit is None else folder,
                plan=made,
                multiple=self.multiple,
                select="obs" if self.method == "thin-obs" else "energy",
                blocks=self.blocks,
                trust_remote_code=trust_remote_code,
            )
        return made


def check_possible(request: Request, folder: Path, *, judged: bool, dtype: str, trust_remote_code: bool) -> int | None:
    """Goes through the decision and the pruning without reading a weight: any experts and channels stand for those that
    the text will choose.

    Returns:
        Positions that the model has; None where it has no bound.

    Raises:
        CheckpointError, OSError: the folder is not whole.
        ValueError: sizes that this model cannot have; a model that was pruned already; or quantised weights, one
            expert a token and experts that the operators do not run where what was asked for does not go with them.
    """
    stored = stored_tensors(folder)
    skeleton = skeleton_of(folder, stored, dtype=dtype, trust_remote_code=trust_remote_code)
    model = skeleton.model
    if counts_differ(text_config(model)):
        raise ValueError(f"{folder}: its layers differ already; compress the model that it was made of")
    blocks = moe_blocks(model)
    refuse_novices(blocks, "compress")
    held = skeleton.format
    if held is not None and request.refit:
        raise ValueError(f"refit: {folder} holds {held} weights, which are not fitted; refit=False (--no-refit)")
    if held is not None and judged:
        raise ValueError(f"judge: {folder} holds {held} weights, which do not run in memory; judge=None (--no-judge)")
    layout = layout_of(model, blocks)
    if request.skip and layout.top_k < 2:
        raise ValueError(f"skip: {folder} has one expert a token, which is never skipped; skip=False (--no-skip)")
    # The operators run the experts of a refit, too.
    width = check_channels(request.channels or ("energy" if request.refit else None), blocks)
    width = width if request.thins else None
    stats = ExpertStatistics.empty(layout, gate_of(blocks[0]), "", None, width, request.channels == "gram")
    _spread_out(stats)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these would say of no text, or prune will say again
        made = request.plan(stats, folder, trust_remote_code, "random")
        slices, downs = slices_of(skeleton, blocks, made), down_projections(skeleton, blocks)
        prune(model, made)
        parts_of(skeleton, stored, slices, planned(skeleton, downs if request.refit else []))
    positions = getattr(text_config(model), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def _spread_out(stats: ExpertStatistics) -> None:
    """Makes every second channel the best: where float8 scales want whole blocks of them, only those that are asked
    for are whole."""
    if stats.channel_norms is not None:
        stats.channel_norms[:, :, ::2] = 1
    if stats.channel_order is not None:
        channels = torch.arange(stats.channel_order.shape[2], dtype=stats.channel_order.dtype)
        stats.channel_order.copy_(torch.cat([channels[1::2], channels[::2]]).expand_as(stats.channel_order))
