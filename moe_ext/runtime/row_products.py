"""A matrix times one row, in a graph for the CPU, as the loop over the matrix that it is.

Decoding a batch of one multiplies every dense weight (N, K) by one row. torch hands that to a matrix product, which for
bfloat16 takes a multiple of the time that reading the weight does. Written as a sum of products, inductor makes a loop
of it that reads the weight once, at the speed of memory, and accumulates in float32::

    y[n] = sum over k of float32(W[n, k]) float32(x[k]), rounded once
"""

import torch
from torch import fx

from moe_ext.runtime.graph_calls import Calls, compute_first

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def replace_products(graph: fx.graph.Graph) -> None:
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if _is_row_product(node):
                _replace(graph, node)


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
    compute_first(row)
    with graph.inserting_before(node):
        call = Calls(graph, row)
        weight = call(aten.permute.default, matrix, [1, 0])  # (N, K), as Linear holds it
        products = call(aten.mul.Tensor, call.wide(weight), call.wide(row))
        sums = call(aten.unsqueeze.default, call(aten.sum.dim_IntList, products, [1]), 0)  # (1, N)
        if bias:
            sums = call(aten.add.Tensor, sums, call.wide(bias[0]))
        result = call.converted(sums, node.meta["val"].dtype)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
