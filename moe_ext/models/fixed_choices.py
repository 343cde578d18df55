"""Routers that look a token's experts up in a table (hash layers of DeepSeek-V4), where no scores choose.

A removed expert's tokens go to the kept expert whose row of the gate is nearest to its own (cosine), of those that the
token does not have already: the gate's rows are what such a router weighs experts by, and the nearest row gives a
token's hidden state the most similar weight. Nothing was measured about how good a choice that is; a plan that keeps
all experts of such layers leaves their tables alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_ext.models.blocks import MoeBlock, tensors_of


def tables(block: MoeBlock) -> dict[str, Tensor]:
    """Tables (tokens of the vocabulary, K) of experts in a block's router, by name in it."""
    return {
        name: tensor
        for name, tensor in tensors_of(block.router).items()
        if tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[1] == block.top_k
    }


def gate_rows(block: MoeBlock) -> Tensor:
    """The router's matrix (E, H) of a row an expert.

    Raises:
        ValueError: there is none, or several.
    """
    found = [
        part.tensor for part in block.routing_tensors() if part.tensor.dim() == 2 and part.tensor.is_floating_point()
    ]
    if len(found) != 1:
        raise ValueError(
            f"{block.name}: {type(block.router).__name__} has {len(found)} matrices of a row an expert; expected one, "
            "to say which experts take the tokens of removed ones"
        )
    return found[0]


def remapped(table: Tensor, keep: Sequence[int], rows: Tensor) -> Tensor:
    """A table for the experts ``keep`` alone, by their new numbers; of the old one's dtype and device.

    Args:
        table: (V, K) experts of every token, distinct in a row.
        keep: ascending, K or more of E.
        rows: (E, H), the gate's.
    """
    old = table.detach().long().cpu()
    unit = torch.nn.functional.normalize(rows.detach().double().cpu(), dim=1)
    kept = torch.tensor(list(keep))
    nearest = (unit @ unit[kept].T).sort(dim=1, descending=True, stable=True).indices  # (E, E') places among the kept
    place = torch.full((len(unit),), -1).index_put((kept,), torch.arange(len(kept)))
    new = place[old]  # (V, K); -1 where the expert is gone
    for slot in range(old.shape[1]):
        for rank in range(old.shape[1]):  # a token has K - 1 others: one of the K nearest is free
            gone = (new[:, slot] < 0).nonzero().flatten()
            candidate = nearest[old[gone, slot], rank]
            free = (new[gone] != candidate[:, None]).all(1)
            new[gone[free], slot] = candidate[free]
    return new.to(table)
