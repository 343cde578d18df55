"""How often a patched model skips, on text."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.models.blocks import input_device
from moe_ext.runtime.skipping import count_skips


def skip_rates(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
    """Share of every MoE layer's slots that a patched model skips, padding not counted.

    Args:
        batches: mappings with ``input_ids`` (B, S) and optionally ``attention_mask`` (B, S).
    """
    device = input_device(model)
    with count_skips(model) as count, torch.inference_mode():
        for batch in batches:
            model.base_model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
    return count.rates()
