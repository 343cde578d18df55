"""A pass over a compiled graph: a matrix times one row, on the CPU, as the loop over the matrix that it is.

Decoding a batch of one multiplies every dense weight (N, K) by one row. torch hands that to a matrix product, which for
bfloat16 takes a multiple of the time that reading the weight does. Written as a sum of products, inductor makes a loop
of it that reads the weight once, at the speed of memory, and accumulates in float32::

    y[n] = sum over k of float32(W[n, k]) float32(x[k]), rounded once
"""

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

aten, prims = torch.ops.aten, torch.ops.prims

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RowProducts(CustomGraphPass):
    """For inductor's option ``post_grad_custom_pre_pass``. Any two are the same pass."""

    def __call__(self, graph: fx.graph.Graph) -> None:
        for target in (aten.mm.default, aten.addmm.default):
            for node in graph.find_nodes(op="call_function", target=target):
                if _is_row_product(node):
                    _replace(graph, node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))

    def __eq__(self, other: object) -> bool:  # transformers compares configs of compilation, which hold it
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


def _is_row_product(node: fx.Node) -> bool:
    """Whether an mm or addmm is (1, K) by (K, N), plainly, on the CPU."""
    if node.kwargs:  # alpha, beta
        return False
    tensors = [argument.meta.get("val") for argument in node.args if isinstance(argument, fx.Node)]
    found = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if len(found) != len(node.args):
        return False
    row, matrix = found[-2:]
    return (
        row.device.type == matrix.device.type == "cpu"
        and row.dtype == matrix.dtype
        and row.dtype in _DTYPES
        and isinstance(row.shape[0], int)
        and row.shape[0] == 1
    )


def _replace(graph: fx.graph.Graph, node: fx.Node) -> None:
    *bias, row, matrix = node.args
    assert isinstance(row, fx.Node)
    # The row is computed before the loop, not again for each of its N turns.
    row.meta["inductor_realize_to_strides"] = True

    def call(target: Any, *args: Any) -> fx.Node:
        result = graph.call_function(target, args)
        values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in args]
        with row.meta["val"].fake_mode:
            result.meta["val"] = target(*values)
        return result

    def wide(one: Any) -> fx.Node:
        return call(prims.convert_element_type.default, one, torch.float32)

    with graph.inserting_before(node):
        weight = call(aten.permute.default, matrix, [1, 0])  # (N, K), as Linear holds it
        products = call(aten.mul.Tensor, wide(weight), wide(row))
        sums = call(aten.unsqueeze.default, call(aten.sum.dim_IntList, products, [1]), 0)  # (1, N)
        if bias:
            sums = call(aten.add.Tensor, sums, wide(bias[0]))
        result = call(prims.convert_element_type.default, sums, node.meta["val"].dtype)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
