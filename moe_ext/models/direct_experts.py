"""Experts in stacked tensors that their family's code calls itself, past transformers' experts interface.

A module that is called as the interface calls its own, with hidden states, experts and weights, is told by its forward
(step3p7). Two families differ in more than the door, and have a record here: what of them is brought into the form that
everything else in the package is about.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DirectExperts:
    """How a class of experts modules is brought into the interface's form.

    Attributes:
        experts: function of the module, (T, H) hidden states, (T, K) experts and (T, K) weights; None: its forward.
        router: forward of the router beside it that returns logits (T, E), weights (T, K) and experts (T, K); None: the
            router's own.
        block: forward of the module with both, which calls them so; None: its own.
        is_transposed: whether weights lie as (E, in, out).
        weighs_inputs: whether a token's weight is multiplied onto what the expert is given, in the place of what it
            returns; the weights that the experts are given are then 1.
        passes_on: attribute with the number of further choices that return a token as it is; None: there are none.
        count: attribute with E.
    """

    experts: Callable[..., Tensor] | None = None
    router: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    block: Callable[..., Any] | None = None
    is_transposed: bool = False
    weighs_inputs: bool = False
    passes_on: str | None = None
    count: str = "num_experts"


# ---- Llama 4: the experts are given every token, times a weight that is 0 for the tokens of others


def _llama4_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    own = cast(Any, self)
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= own.num_experts:
            continue
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[token] @ own.gate_up_proj[expert]).chunk(2, dim=-1)
        given = (up * own.act_fn(gate)) @ own.down_proj[expert]
        out = out.index_add(0, token, (given * top_k_weights[token, slot, None]).to(out.dtype))
    return out


def _llama4_router(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = nn.functional.linear(hidden_states, cast(Tensor, self.weight))
    highest, experts = torch.topk(logits, cast(int, self.top_k), dim=1)
    return logits, highest.float().sigmoid().to(logits.dtype), experts


def _llama4_block(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    own = cast(Any, self)
    x = hidden_states.reshape(-1, own.hidden_dim)
    logits, weights, experts = own.router(x)
    routed = own.experts(x * weights.to(x.dtype), experts, torch.ones_like(weights))
    return own.shared_expert(x) + routed, logits


# ---- LongCat: choices beyond the experts return the token


def _longcat_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    if top_k_index.shape[1] == 1:  # its forward takes away a dimension of one slot
        top_k_index = torch.cat([top_k_index, torch.zeros_like(top_k_index)], dim=1)
        top_k_weights = torch.cat([top_k_weights, torch.zeros_like(top_k_weights)], dim=1)
    return cast(Tensor, type(self).forward(self, hidden_states, top_k_index, top_k_weights))


_KNOWN = {
    "Llama4TextExperts": DirectExperts(
        _llama4_experts, _llama4_router, _llama4_block, is_transposed=True, weighs_inputs=True
    ),
    "LongcatFlashExperts": DirectExperts(_longcat_experts, passes_on="zero_expert_num", count="num_routed_experts"),
}
_LIKE_THE_INTERFACE = DirectExperts()
# What is read in every forward pass, and traced by torch.compile, which does not look into records.
_PASSING_ON = {name: record.passes_on for name, record in _KNOWN.items() if record.passes_on is not None}
_COUNTING = {name: record.count for name, record in _KNOWN.items()}


def direct_experts(experts: nn.Module) -> DirectExperts | None:
    """The record of an experts module that transformers calls past its interface; None for any other module."""
    return _of_class(cast(Any, type(experts))) if {"gate_up_proj", "down_proj"} <= experts._parameters.keys() else None


@cache
def _of_class(kind: Any) -> DirectExperts | None:
    if hasattr(kind.forward, "__wrapped__"):
        return None
    parameters = tuple(inspect.signature(kind.forward).parameters)
    alike = parameters == ("self", "hidden_states", "top_k_index", "top_k_weights")
    return _KNOWN.get(kind.__name__, _LIKE_THE_INTERFACE if alike else None)


def passed_on(experts: nn.Module) -> int:
    """Further choices of a layer's router, numbered after the experts, that return a token as it is."""
    attribute = _PASSING_ON.get(type(experts).__name__)
    return 0 if attribute is None else int(getattr(experts, attribute))


def counting_attribute(experts: nn.Module) -> str:
    """The attribute of an experts module that is E."""
    return _COUNTING.get(type(experts).__name__, "num_experts")


def router_code(experts: nn.Module) -> Callable[..., Any] | None:
    """The forward of the router beside an experts module, where the router's own returns something other than logits,
    weights and experts; None: its own."""
    record = direct_experts(experts)
    return None if record is None else record.router


def router_class(router: nn.Module, experts: nn.Module) -> type[nn.Module]:
    """A class for a router whose forward returns logits, weights and experts; its own, where that does."""
    code = router_code(experts)
    return type(router) if code is None else _with_forward(cast(Any, type(router)), code)


@cache
def _with_forward(kind: Any, forward: Callable[..., Any]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"forward": forward})


def block_forward(block: nn.Module, experts: nn.Module) -> Callable[..., Any] | None:
    """What has to take the place of a block's forward for its router and experts to be called in that form."""
    record = direct_experts(experts)
    return None if record is None or record.block is None else partial(record.block, block)
