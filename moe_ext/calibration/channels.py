"""What calibration learns about the channels of experts, from their energies and the weights."""

import torch
from torch import Tensor

from moe_ext.models.blocks import MoeBlock, expert_tensors
from moe_ext.models.expert_width import width_of
from moe_ext.runtime.supported import reason_unsupported

CHANNELS = ("energy",)
"""What :func:`moe_ext.calibrate` can observe of channels."""


def check_channels(channels: str | None, blocks: list[MoeBlock]) -> int | None:
    """The width of the experts whose channels are to be observed; None if none are.

    Raises:
        ValueError: another kind of observation, experts that the operators do not run, or layers whose experts differ
            in width (the layer is named).
    """
    if channels is None:
        return None
    if channels not in CHANNELS:
        raise ValueError(f"channels: expected one of {', '.join(CHANNELS)}, or None, got {channels!r}")
    for block in blocks:
        if (reason := reason_unsupported(block)) is not None:
            raise ValueError(f"channels: are observed by the operators only; {reason}")
        if width_of(block) != width_of(blocks[0]):
            raise ValueError(
                f"channels: {blocks[0].name} has experts of {width_of(blocks[0])} channels, {block.name} of "
                f"{width_of(block)}; expected one width"
            )
    return width_of(blocks[0])


def channel_errors(energies: Tensor, down: Tensor) -> Tensor:
    """What the squared error of the layer's output gains if a channel alone goes.

    Args:
        energies: (E, I) float64, ``sum g^2 h_j^2``, as ``ops.experts_observed`` adds up.
        down: (E, H, I), any floating dtype.

    Returns:
        (E, I) float64, on the device of ``energies``: ``sum g^2 h_j^2 ||down[:, j]||^2``.
    """
    norms = [expert.double().square().sum(0) for expert in down]  # one expert in float64 at a time
    return energies * torch.stack(norms).to(energies.device)


def channel_norms(block: MoeBlock) -> Tensor:
    """(E, I) float64 on the CPU: ``||down[:, j]|| * ||up[j]||`` of the weights."""
    tensors = expert_tensors(block)
    rows = []
    for gate_up, down in zip(tensors["gate_up_proj"], tensors["down_proj"], strict=True):
        up = gate_up.chunk(2)[1]
        rows.append(down.double().norm(dim=0) * up.double().norm(dim=1))
    return torch.stack(rows).detach().cpu()
