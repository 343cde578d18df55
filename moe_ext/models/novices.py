"""Novices (arXiv 2507.00390): a removed expert's place is taken by the mean of its outputs, a constant vector.

The router keeps a row for every expert that it was trained with; the experts that are left are compacted. In front of
them, a table leads the router's choice to an expert's new place or to a mean. No stock modeling code knows that: such a
checkpoint loads through :func:`moe_ext.from_pretrained`, which reads from ``config.moe_ext`` how many experts are left.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_ext.models.boundary import MEANS, PLACES, is_experts, output_width
from moe_ext.models.config_section import LEFT_KEY

MARK = "moe_ext_novices"
"""Buffer of a decoder layer with means: how many. vLLM leaves out tensors of experts that it does not know, and would
serve the checkpoint without its means; it refuses an unknown tensor of a layer."""


def add_novices(layer: nn.Module, experts: nn.Module, places: Tensor, means: Tensor) -> None:
    """Puts means in the place of experts that are not there any more.

    Args:
        layer: the decoder layer.
        experts: its module with E' experts, below a router that chooses from E.
        places: (E,) int64; where the router's expert e is: below E' an expert, E' + r the mean r.
        means: (E - E', H), dtype and device of the experts' weights.
    """
    experts.register_buffer(PLACES, places)
    experts.register_buffer(MEANS, means)
    layer.register_buffer(MARK, torch.full((1,), means.shape[0], dtype=torch.int64, device=places.device))
    experts.forward = partial(_forward, experts)  # a bound method would not unpickle


def _forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts with their means: (T, H), (T, K) of the router's experts, (T, K) -> (T, H)."""
    places, means = cast(Tensor, getattr(self, PLACES)), cast(Tensor, getattr(self, MEANS))
    left, removed = cast(int, self.num_experts), means.shape[0]
    # A skipped slot carries index E: it goes to the place after the last mean.
    place = torch.cat([places, torch.full_like(places[:1], left + removed)])[top_k_index]  # (T, K)
    is_expert = place < left
    # A slot without an expert costs nothing in our operators. Not every other implementation knows the sentinel: there
    # the slot goes to any expert, with weight 0.
    ours = cast(Any, self.config)._experts_implementation == "moe_ext" and not torch.is_grad_enabled()
    index = place.masked_fill(~is_expert, left if ours else 0)
    out = type(self).forward(self, hidden_states, index, top_k_weights.masked_fill(~is_expert, 0.0))
    column = (place - left).masked_fill(is_expert, removed)  # (T, K), of a mean; the last for anything else
    spread = torch.zeros(len(place), removed + 1, dtype=top_k_weights.dtype, device=place.device)
    spread = spread.scatter_add(1, column, top_k_weights)[:, :removed]  # (T, E - E'), a token's weight of every mean
    return cast(Tensor, out + (spread.to(means.dtype) @ means).to(out.dtype))


def make_room(layer: nn.Module, left: int) -> None:
    """Gives a decoder layer that was just built the shapes of one with novices, for a checkpoint to fill.

    Raises:
        ValueError: it has no experts, or fewer than are said to be left.
    """
    found = [module for module in layer.modules() if is_experts(module)]
    if len(found) != 1 or cast(int, found[0].num_experts) < left:
        raise ValueError(
            f"config.moe_ext.{LEFT_KEY} says {left} experts of a {type(layer).__name__} that has not so many"
        )
    experts, routed = found[0], cast(int, found[0].num_experts)
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, nn.Parameter(parameter.detach()[:left].clone(), requires_grad=parameter.requires_grad))
    experts.num_experts = left  # type: ignore[assignment]
    weight = cast(Tensor, experts.down_proj)
    places = torch.arange(routed, device=weight.device)
    add_novices(layer, experts, places, weight.new_zeros(routed - left, output_width(experts)))
