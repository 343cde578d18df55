"""Quantises the experts of a model in memory, in place."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext import ops
from moe_ext.checkpoints.finite import is_finite
from moe_ext.checkpoints.saved_packed import save_as_packed
from moe_ext.models.blocks import (
    MoeBlock,
    expert_tensors,
    moe_blocks,
    refuse_novices,
    refuse_offloaded,
    refuse_shared_out,
)
from moe_ext.models.boundary import goes_through_interface, is_transposed
from moe_ext.models.packed_experts import (
    IMPLEMENTATION,
    Packer,
    WeightFormat,
    hold_packed,
    refuse_packed,
    weight_names,
)
from moe_ext.models.wrapped import unwrapped_to_change
from moe_ext.quantisation.rounding import check_search, rounded
from moe_ext.runtime.formulas import FORMULA, find_formula
from moe_ext.runtime.supported import check_tensors, reason_unsupported


def quantize(
    model: PreTrainedModel,
    weights: str,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    search_scales: bool = False,
) -> PreTrainedModel:
    """Quantises the weights of a model's routed experts, in place; everything else stays, biases of experts too.

    The experts modules stay where they are and hold packed weights and scales as buffers, on which moe_ext's operators
    run: products and sums are float32, activations are not quantised. Numbers are rounded to the nearest. At any moment
    one layer's float weights are in memory beside its packed ones. Such a model computes no gradients; it is pruned and
    thinned as it is, and ``save_pretrained`` writes what ``moe-ext quantize`` writes.

    Args:
        model: a transformers model whose experts the operators can run, in memory, patched or not.
        weights: "int8": a scale a row. "int4": a scale for every ``group_size`` columns. "fp8": e4m3, a scale a row, or
            a block. "mxfp4": e2m1 with powers of two as scales, as gpt-oss is published.
        group_size: int4: 32, 64 or 128 (default); mxfp4: 32; int8: 0; fp8: 0 (default), or 128 for blocks of 128 by
            128.
        symmetric: False: int4 with zero points.
        search_scales: of symmetric int4, takes for every group the one of eight scales with the least sum of squared
            errors, instead of that of its largest number; eight times the work.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: an unknown type, a group size that it does not have, weights that are not finite, or a
            model that the operators cannot run (see :func:`moe_ext.patch`) or that is quantised already. The model is
            left as it was.
    """
    form = WeightFormat.of(weights, group_size, symmetric)
    check_search(form, search_scales)
    inside = unwrapped_to_change(model, "quantise")
    blocks = moe_blocks(inside)
    _check(blocks, form)
    with torch.no_grad():
        for block in blocks:
            _quantise(block.experts, form, search_scales)
    inside.set_experts_implementation(IMPLEMENTATION)
    save_as_packed(inside)
    return model


def _check(blocks: list[MoeBlock], form: WeightFormat) -> None:
    refuse_novices(blocks, "quantise")
    refuse_offloaded(blocks, "quantise")
    refuse_shared_out(blocks, "quantise")
    for block in blocks:
        refuse_packed(block.name, block.experts, "quantise")
        if not goes_through_interface(block.experts):
            raise ValueError(
                f"{block.name}: {type(block.experts).__name__} are called past transformers' experts interface, and "
                "run on float weights only"
            )
        check_tensors(block)
        if (reason := reason_unsupported(block)) is not None:
            raise ValueError(reason)
        for name in weight_names(block.experts):
            if not is_finite(getattr(block.experts, name)):
                raise ValueError(f"{block.name}: {name} holds numbers that are not finite")
    device = expert_tensors(blocks[0])["down_proj"].device
    kind = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(form.type, torch.uint8)
    ops.pack_weights(torch.zeros(1, 1, 64, device=device).to(kind), form.type)  # says where there are no kernels


def _quantise(experts: nn.Module, form: WeightFormat, search_scales: bool) -> None:
    packed: dict[str, dict[str, Tensor]] = {}
    for name in weight_names(experts):
        weight: Any = getattr(experts, name)
        packer = Packer(form, len(weight))
        for expert in weight:
            matrix = expert.T if is_transposed(experts) else expert
            packer.add(rounded(matrix, form, weight.dtype, search_scales))
        packed[name] = packer.done()
    hold_packed(experts, form, packed)
    if vars(experts).pop(FORMULA, None) is not None:  # found for weights that lay otherwise
        setattr(experts, FORMULA, find_formula(experts))
