"""Whether a model keeps the rows of a packed batch apart."""

import torch
from transformers import PreTrainedModel

from moe_ext.models.blocks import evaluation_mode, input_device
from moe_ext.models.wrapped import unwrapped
from moe_ext.runtime.batches import vocabulary_of

_FIRST, _SECOND = 5, 7  # tokens of the two documents


def packs(model: PreTrainedModel) -> bool:
    """Whether a document of a packed row (:func:`moe_ext.data.batches` with ``packing``) is read as if it stood alone.

    Tried, not looked up: two short documents are run in one row, their positions beginning at 0 each, and the second
    one alone. Models with recurrent layers, and attention that does not read positions, let the first shine through.
    """
    model = unwrapped(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, min(vocabulary_of(model), 4096) // 2 + 1, (1, _FIRST + _SECOND), generator=generator)
    positions = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)])[None]
    device = input_device(model)
    try:
        with evaluation_mode(model), torch.no_grad():
            packed = _states(model, tokens.to(device), positions.to(device))[:, _FIRST:]
            alone = _states(model, tokens[:, _FIRST:].to(device), None)
            apart = _states(model, tokens.to(device), None)[:, _FIRST:]
    except (TypeError, ValueError, RuntimeError):
        return False  # it takes no positions, or not such ones
    # What the first document changes where it is seen, against what rounding does.
    return bool((packed - alone).norm() <= 0.05 * (apart - alone).norm())


def _states(model: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """(1, S, H) float32, the last hidden states."""
    options = {} if positions is None else {"position_ids": positions}
    states: torch.Tensor = model.base_model(input_ids=tokens, use_cache=False, **options)[0]
    return states.float()
