"""Whether a model keeps the rows of a packed batch apart."""

import torch
from transformers import PreTrainedModel

from moe_ext.models.blocks import base_of, evaluation_mode, input_device
from moe_ext.models.wrapped import unwrapped
from moe_ext.runtime.batches import vocabulary_of

_FIRST, _SECOND = 5, 7  # tokens of the two documents


def packs(model: PreTrainedModel) -> bool:
    """Whether a document of a packed row (:func:`moe_ext.data.batches` with ``packing``) is read as if it stood alone.

    Tried, not looked up: two short documents are run in one row, their positions beginning at 0 each; the second one
    once more behind another first one, and alone. Models with recurrent layers, and attention that does not read
    positions, let the first shine through.
    """
    model = unwrapped(model)
    generator = torch.Generator().manual_seed(0)
    most = min(vocabulary_of(model), 4096) // 2 + 1
    first, other = (torch.randint(1, most, (1, _FIRST), generator=generator) for _ in range(2))
    second = torch.randint(1, most, (1, _SECOND), generator=generator)
    positions = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)])[None]
    try:
        with evaluation_mode(model), torch.no_grad():
            packed = _states(model, torch.cat([first, second], 1), positions)[:, _FIRST:]
            again = _states(model, torch.cat([other, second], 1), positions)[:, _FIRST:]
            alone = _states(model, second, None)
            seen = _states(model, torch.cat([first, second], 1), None)[:, _FIRST:]
            # Against what the first document changes where it is seen. Behind another one nothing differs but the order
            # of sums, if that; alone, what is computed at once differs as well, and rounds, in bfloat16 to 8 bits.
            change = (seen - alone).norm()
            return bool((packed - again).norm() <= 1e-3 * change and (packed - alone).norm() <= 0.05 * change)
    except (TypeError, ValueError, RuntimeError):
        return False  # it takes no positions, or not such ones


def _states(model: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """(1, S, H) float32, the last hidden states."""
    device = input_device(model)
    options = {} if positions is None else {"position_ids": positions.to(device)}
    states: torch.Tensor = base_of(model)(input_ids=tokens.to(device), use_cache=False, **options)[0]
    return states.float()
