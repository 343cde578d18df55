"""What calibration learns about the channels of experts: from their energies, their Gram matrices and the weights."""

from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from moe_ext.calibration.removal_order import removal_order
from moe_ext.calibration.routed_inputs import RoutedInputs
from moe_ext.models.blocks import MoeBlock
from moe_ext.models.expert_width import width_of
from moe_ext.runtime.formulas import ExpertsLayer, experts_layer
from moe_ext.runtime.supported import reason_unsupported

CHANNELS = ("energy", "gram")
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
    if channels == "gram":
        check_gram_memory(width_of(blocks[0]))
    return width_of(blocks[0])


def check_gram_memory(width: int) -> int:
    """The bytes that one expert's Gram matrix takes with what is computed from it: three more of its size.

    Raises:
        MemoryError: so much is not free.
    """
    needed, free = 4 * 8 * width**2, psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"channels: the Gram matrix of an expert with {width} channels takes {needed / 1e9:.2f} GB with what is "
            f'computed from it, {free / 1e9:.2f} GB are free; channels="energy" needs none'
        )
    return needed


def channel_errors(energies: Tensor, layer: ExpertsLayer) -> Tensor:
    """What the squared error of the layer's output gains if a channel alone goes.

    Args:
        energies: (E, I) float64, ``sum g^2 h_j^2``, as ``ops.experts_observed`` adds up.

    Returns:
        (E, I) float64, on the device of ``energies``: ``sum g^2 h_j^2 ||down[:, j]||^2``.
    """
    downs = (layer.outputs(expert).detach() for expert in range(len(energies)))
    norms = [down.double().square().sum(0) for down in downs]  # one expert in float64 at a time
    return energies * torch.stack(norms).to(energies.device)


def channel_norms(layer: ExpertsLayer) -> Tensor:
    """(E, I) float64 on the CPU: ``||down[:, j]|| * ||up[j]||`` of the weights."""
    rows = []
    for expert in range(len(layer.down)):
        rows.append(layer.outputs(expert).double().norm(dim=0) * layer.up(expert).double().norm(dim=1))
    return torch.stack(rows).detach().cpu()


def removal_orders(block: MoeBlock, inputs: RoutedInputs, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Every expert's channels in their :func:`removal_order`, one expert's Gram matrix in memory at a time; those of an
    expert that no token reached by ``||down[:, j]|| * ||up[j]||``.

    Args:
        inputs: of this process's batches.
        total: adds up over the processes.

    Returns:
        (E, I) int32 on the CPU.

    Raises:
        ValueError: sums that are not finite (layer and expert are named).
    """
    layer = experts_layer(block.experts)
    unreached = channel_norms(layer).sort(dim=1, stable=True).indices
    rows = []
    for expert in range(len(layer.down)):
        mine, _ = inputs.gram(expert, layer)
        gram = total(mine).to(mine.device)
        if not bool(gram.isfinite().all()):
            raise ValueError(f"layer {block.name}: expert {expert} gave activations that are not finite")
        reached = bool(gram.diagonal().any())
        rows.append(removal_order(gram, layer.outputs(expert).detach()).cpu() if reached else unreached[expert])
    return torch.stack(rows).int()
