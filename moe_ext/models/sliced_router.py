"""A layer's router with some of its experts: the family's own code on the slices of its per-expert tensors.

Exact for whatever the code computes (scores, correction biases, groups, weights that do not sum to one), as pruning the
layer for good would leave it. The model is not touched: a twin of the module shares its tensors.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from moe_ext.models.blocks import MoeBlock, PerExpert, counted_of
from moe_ext.models.direct_experts import router_class
from moe_ext.models.fixed_choices import gate_rows, remapped, tables


class Routes(NamedTuple):
    """What a router gives T tokens.

    Attributes:
        weights: (T, K) routing weights, as the family's code rounds them.
        experts: (T, K) int64, in the indices of the unpruned layer.
        more: what the family's router returns besides.
    """

    weights: Tensor
    experts: Tensor
    more: tuple[Any, ...]


class SlicedRouter:
    """Runs a layer's router among some of the experts.

    Args:
        block: the layer; its weights are in memory.

    Raises:
        ValueError: a tensor of the router does not say which of its dimensions counts experts.
    """

    def __init__(self, block: MoeBlock) -> None:
        self._block, self._twin = block, router_twin(block)
        names = {id(tensor): name for name, tensor in (*self._twin.named_parameters(), *self._twin.named_buffers())}
        self._own: dict[str, PerExpert] = {}
        self._given: list[PerExpert] = []  # tensors of the block's, which its router is called with
        for part in block.routing_tensors():
            if id(part.tensor) in names:
                self._own[names[id(part.tensor)]] = part
            else:
                self._given.append(part)
        self._tables = tables(block)
        counted = counted_of(block.model)
        path = next(name for name, module in block.model.named_modules() if module is block.router)
        self._attributes = [
            (self._twin.get_submodule(owner[len(path) + 1 :]), name, built, each)
            for (owner, name), (built, each) in counted.attributes.items()
            if owner == path or owner.startswith(f"{path}.")
        ]
        self._fields = counted.fields if hasattr(self._twin, "config") else ()
        if self._fields:  # which the code may read as it runs
            self._twin.config = copy.copy(self._twin.config)

    def is_of_block(self, value: object) -> bool:
        """Whether an argument of the router is a tensor that its block holds, with numbers for every expert."""
        return any(value is part.tensor for part in self._given)

    @torch.no_grad()
    def route(self, keep: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Routes:
        """What the router returns when its layer has the experts ``keep``, ascending, only.

        Args:
            args, kwargs: of a call of the unpruned layer's router.

        Raises:
            ValueError: the router returns something other than logits, weights (T, K) and experts (T, K).
        """
        experts = self._block.num_routed
        some = len(keep) < experts
        device = next(self._block.router.parameters()).device
        index = torch.tensor(list(keep), device=device)
        tensors = {name: part.kept(keep, experts) if some else part.tensor for name, part in self._own.items()}

        if some:
            rows = gate_rows(self._block) if self._tables else None
            for name, table in self._tables.items():
                assert rows is not None
                tensors[name] = remapped(table, keep, rows)

        def sliced(value: Any) -> Any:
            for part in self._given:
                if value is part.tensor and some:
                    return part.kept(keep, experts)
            return value

        for module in self._twin.modules():
            if hasattr(module, "num_experts"):
                module.num_experts = len(keep)
        for module, name, built, each in self._attributes:
            setattr(module, name, int(built + each * (len(keep) - experts)))
        for field in self._fields:
            setattr(self._twin.config, field, len(keep))
        given = {name: sliced(value) for name, value in kwargs.items()}
        output = torch.func.functional_call(self._twin, tensors, tuple(map(sliced, args)), given)
        if not isinstance(output, tuple) or len(output) < 3 or not _are_routes(*output[1:3]):
            raise ValueError(f"{self._block.name}: the router returns something other than logits, weights and experts")
        weights, chosen = cast(Tensor, output[1]), cast(Tensor, output[2])
        return Routes(weights, index[chosen.long()], output[3:])


def _are_routes(weights: object, experts: object) -> bool:
    if not isinstance(weights, Tensor) or not isinstance(experts, Tensor):
        return False
    return weights.dim() == 2 and weights.shape == experts.shape and not experts.is_floating_point()


def router_twin(block: MoeBlock) -> Any:
    """A twin of a block's router that returns logits, weights and experts."""
    twin = twin_of(block.router)
    twin.__class__ = router_class(block.router, block.experts)
    return twin


# What a module has from others than its class: moe_ext.patch and accelerate replace its forward.
_FROM_OTHERS = ("forward", "_old_forward", "_hf_hook", "_moe_ext")


def twin_of(module: nn.Module) -> Any:
    """A module of the same class and with the same tensors, which runs the class's own forward without hooks."""
    twin = module.__class__.__new__(module.__class__)
    attributes = {name: value for name, value in vars(module).items() if name not in _FROM_OTHERS}
    for name, value in attributes.items():
        if isinstance(value, dict):
            attributes[name] = OrderedDict() if "_hooks" in name else type(value)(value)
    attributes["_modules"] = {name: child and twin_of(child) for name, child in module._modules.items()}
    vars(twin).update(attributes)
    return twin
