"""How often a patched model skips, on text."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.models.blocks import base_of, input_device
from moe_ext.models.wrapped import unwrapped
from moe_ext.runtime.batches import check_batch
from moe_ext.runtime.skipping import count_skips


def skip_rates(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
    """Share of every MoE layer's slots that a patched model skips, padding not counted.

    Args:
        batches: as for :func:`moe_ext.calibrate`.

    Raises:
        ValueError: a malformed batch, or a token that the model does not have.
    """
    model = unwrapped(model)
    device = input_device(model)
    with count_skips(model) as count, torch.inference_mode():
        for index, batch in enumerate(batches):
            inputs, _ = check_batch(index, batch, model)
            base_of(model)(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False)
    return count.rates()
