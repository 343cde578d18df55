"""Attention of one query a sequence, in a graph for the CPU, as loops over keys and values.

Decoding has one new token a sequence. torch's attention for the CPU goes through matrix products with one row, of every
head its own, which for bfloat16 take a multiple of the time that reading keys and values does. As sums of products
inductor reads both once, also where several heads share them (what repeats them is then an index), in float32::

    s[l] = scale sum over d of q[d] K[l, d] + mask[l],  p = softmax(s),  y[d] = sum over l of p[l] V[l, d], rounded once
"""

from typing import Any

import torch
from torch import fx

from moe_ext.runtime.graph_calls import Calls, compute_first

aten = torch.ops.aten


def replace_attention(graph: fx.graph.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten._scaled_dot_product_flash_attention_for_cpu.default):
        if _has_one_query(node):
            _replace(graph, node)


def _has_one_query(node: fx.Node) -> bool:
    """Whether q is (B, H, 1, D) beside k and v (B, H, L, D), with a mask to add or none, and only y is used."""
    arguments: tuple[Any, ...] = node.args
    q, k, v = (argument.meta["val"] for argument in arguments[:3])
    mask: Any = node.kwargs.get("attn_mask")
    heads = [tensor.shape[:2] for tensor in (q, k, v)]
    return (
        q.shape[2] == 1
        and heads[0] == heads[1] == heads[2]
        and not any(arguments[3:])  # dropout, causal
        and (mask is None or (mask.meta["val"].dim() == 4 and mask.meta["val"].is_floating_point()))
        and all(user.args[1] == 0 for user in node.users)  # y
    )


def _replace(graph: fx.graph.Graph, node: fx.Node) -> None:
    arguments: tuple[Any, ...] = node.args
    q, k, v = arguments[:3]
    like, mask, scale = q.meta["val"], node.kwargs.get("attn_mask"), node.kwargs.get("scale")
    compute_first(q)
    with graph.inserting_before(node):
        call = Calls(graph, q)
        products = call(aten.mul.Tensor, call.wide(q), call.wide(k))
        scores = call(aten.sum.dim_IntList, products, [3])  # (B, H, L)
        scores = call(aten.mul.Tensor, scores, like.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            scores = call(aten.add.Tensor, scores, call(aten.squeeze.dim, call.wide(mask), 2))
        largest = call(aten.amax.default, scores, [2], True)
        weights = call(aten.exp.default, call(aten.sub.Tensor, scores, largest))
        compute_first(weights)
        weighted = call(aten.mul.Tensor, call(aten.unsqueeze.default, weights, 3), call.wide(v))
        sums = call(aten.sum.dim_IntList, weighted, [2])  # (B, H, D)
        mean = call(aten.div.Tensor, sums, call(aten.sum.dim_IntList, weights, [2], True))
        y = call.converted(call(aten.unsqueeze.default, mean, 2), like.dtype)
    for user in list(node.users):  # of the operator's results the first
        user.replace_all_uses_with(y)
        graph.erase_node(user)
    graph.erase_node(node)
