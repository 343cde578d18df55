"""Experts on machines with several memory nodes (NUMA): a node's threads multiply the output rows that lie on it.

Weights lie where they were first written, which after loading is one node: the threads of the others wait for it. The
operators know which rows a thread is near to (csrc/cpu/nodes.h) and give it those first; here the rows are moved to
where they are expected. Results have the same bits, wherever weights lie and whoever multiplies them.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.binary import _C
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.wrapped import unwrapped
from moe_ext.runtime.formulas import experts_layer
from moe_ext.runtime.patching import is_patched, layer_state


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model's experts lie.

    Attributes:
        nodes: memory nodes that the process may use.
        num_bytes: of the weights, in whole pages; their scales and biases stay where they are.
        placed: of those on the node of their rows. The rest is in pages that other processes share.
    """

    nodes: int
    num_bytes: int
    placed: int


def place_on_nodes(model: PreTrainedModel) -> Placement:
    """Moves the weights of a patched model's experts to the memory nodes whose threads multiply them, in place.

    Every expert's output rows are shared out over the nodes in equal parts. Worth calling once, after ``patch``, on a
    machine with several nodes whose processors the model's threads are spread over; weights that are replaced later lie
    where they are written. Transposed experts (gpt_oss in bfloat16) are shared out page by page.

    Args:
        model: a patched model on the CPU.

    Returns:
        What lies where. With one node nothing is moved: ``num_bytes`` and ``placed`` are 0.

    Raises:
        ValueError: the model is not patched, or its experts are not on the CPU.
        RuntimeError: the system does not move memory: not Linux, or a container without the capability SYS_NICE.
    """
    inside = unwrapped(model)
    if not is_patched(inside):
        raise ValueError("model is not patched: call moe_ext.patch(model) first")
    layers = [experts_layer(block.experts) for block in moe_blocks(inside) if not layer_state(block).stock]
    for layer in layers:
        if layer.gate_up.device.type != "cpu":
            raise ValueError(f"model has experts on {layer.gate_up.device}; memory nodes are the CPU's")
    nodes = _C.memory_nodes()
    num_bytes = placed = 0
    if nodes > 1:
        for layer in layers:
            formula = layer.formula
            halves = formula.gated and not formula.interleaved
            for weight, order in ((layer.gate_up, "halves" if halves else "plain"), (layer.down, "plain")):
                whole, there = _placed(weight, "transposed" if formula.transposed else order)
                num_bytes, placed = num_bytes + whole, placed + there
    return Placement(nodes, num_bytes, placed)


def _placed(weight: Tensor, order: str) -> tuple[int, int]:
    matrices, rows, columns = weight.shape
    return _C.place_rows(weight.data_ptr(), matrices, rows, columns * weight.element_size(), order)
