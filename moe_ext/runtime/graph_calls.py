"""Calls that a pass inserts into a graph on its way to inductor, each with the value that lowering goes by."""

from typing import Any

import torch
from torch import fx

prims = torch.ops.prims


class Calls:
    """Inserts calls where ``graph.inserting_before`` says, their values computed beside that of the node ``like``."""

    def __init__(self, graph: fx.graph.Graph, like: fx.Node) -> None:
        self._graph, self._mode = graph, like.meta["val"].fake_mode

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        result = self._graph.call_function(target, args)
        values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in args]
        with self._mode:
            result.meta["val"] = target(*values)
        return result

    def converted(self, one: Any, dtype: torch.dtype) -> fx.Node:
        return self(prims.convert_element_type.default, one, dtype)

    def wide(self, one: Any) -> fx.Node:
        return self.converted(one, torch.float32)


def compute_first(node: fx.Node) -> None:
    """What a node gives is stored, once, instead of computed again in every turn of the loops that read it."""
    node.meta["inductor_realize_to_strides"] = True
