"""A pass over a compiled graph: what decoding does with one row a sequence becomes loops that inductor writes."""

from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from moe_ext.runtime import graph_calls, row_attention, row_products


class OneRow(CustomGraphPass):
    """For inductor's option ``post_grad_custom_pre_pass``. Any two are the same pass."""

    def __call__(self, graph: fx.graph.Graph) -> None:
        row_products.replace_products(graph)
        row_attention.replace_attention(graph)

    def uuid(self) -> Any:
        modules = (graph_calls, row_attention, row_products)
        return get_hash_for_files((__file__, *(str(module.__file__) for module in modules)))

    def __eq__(self, other: object) -> bool:  # transformers compares configs of compilation, which hold it
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))
