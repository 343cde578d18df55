"""A checkpoint's model without its weights: built on the meta device, with the way from every key to a parameter."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_ext.checkpoints.float8 import DTYPES as FLOAT8
from moe_ext.checkpoints.float8 import SCALES
from moe_ext.checkpoints.key_map import Source, sources_of, tied
from moe_ext.checkpoints.stored_tensors import StoredTensor
from moe_ext.models.blocks import LOADED_LATER
from moe_ext.models.dtypes import DTYPES
from moe_ext.models.uneven_layers import built


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device and its checkpoint's keys.

    Attributes:
        model: in evaluation mode; its weights, all on the meta device, are marked as loaded later.
        dtype: the model's.
        sources: for every key of the checkpoint that the model has a place for, what it is for.
        block: rows and columns of a weight that share a scale, if weights are float8 with scales beside them.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    sources: dict[str, Source]
    block: tuple[int, int] | None = None

    def dtype_of(self, target: str) -> torch.dtype:
        """The type in which ``from_pretrained`` would hold a parameter or buffer."""
        plan: dict[str, torch.dtype] = self.model._get_dtype_plan(self.dtype)
        for pattern, dtype in plan.items():
            if re.search(rf"(^|\.){re.escape(pattern)}($|\.)", target):
                return dtype
        return self.model.state_dict()[target].dtype


def skeleton_of(
    folder: str | Path, stored: dict[str, StoredTensor], *, dtype: str = "auto", device: str = "cpu"
) -> Skeleton:
    """The model of a checkpoint folder, without reading a weight.

    Args:
        stored: its tensors.
        dtype: "auto" (as ``from_pretrained`` would choose it), "float32", "bfloat16" or "float16".
        device: where the weights will go.

    Raises:
        ValueError: unknown dtype, a checkpoint quantised other than to float8 with a scale a block, a tensor that the
            model needs and the checkpoint has not, or a model that cannot be built.
        OSError: no config, or a broken one.
    """
    config = AutoConfig.from_pretrained(str(folder))
    quantisation = getattr(config, "quantization_config", None)
    block = None
    if quantisation is not None:
        block = _block(folder, quantisation, dtype)
        del config.quantization_config  # the model is built as if its weights were what they stand for
    wanted = _dtype(config, stored, dtype)
    with torch.device("meta"):
        model = built(config, lambda: _class_of(config)(config, dtype=wanted)).eval()
    model.config.name_or_path = str(folder)
    for tensor in (*model.parameters(), *model.buffers()):
        setattr(tensor, LOADED_LATER, torch.device(device))
    skeleton = Skeleton(model, wanted, sources_of(model, stored), block)
    _check_complete(folder, skeleton, stored)
    if quantisation is not None:
        model.config.quantization_config = quantisation
        skeleton.sources.update(_with_scales(folder, skeleton.sources, stored))
    return skeleton


def _block(folder: str | Path, quantisation: Any, dtype: str) -> tuple[int, int]:
    """Rows and columns that share a scale; ValueError for other ways of quantising."""
    known = quantisation if isinstance(quantisation, dict) else {}
    method, block = known.get("quant_method"), known.get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    whole = len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
    if method != "fp8" or not whole or known.get("activation_scheme", "dynamic") != "dynamic":
        raise ValueError(
            f"{folder} is quantised ({quantisation}): other than float8 with a scale for every block of rows and "
            "columns it is read only through transformers, in memory"
        )
    if dtype != "auto":
        raise ValueError(f"dtype is {dtype!r}; {folder} holds float8 weights with scales: expected auto")
    return sizes[0], sizes[1]


def _with_scales(folder: str | Path, sources: dict[str, Source], stored: dict[str, StoredTensor]) -> dict[str, Source]:
    """Sources of float8 tensors and, for the same places, of their scales."""
    found = {}
    for name, source in sources.items():
        if stored[name].dtype not in FLOAT8:
            continue
        scales = name + SCALES
        if scales not in stored:
            raise ValueError(f"{folder}: {name} is float8, and there is no {scales}")
        found[name], found[scales] = replace(source, scales=scales), replace(source, converted=True)
    return found


def _class_of(config: Any) -> Any:
    """What builds the model: of the class that saved the checkpoint if it is one of transformers'."""
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    return AutoModelForCausalLM.from_config if named is None else named._from_config


def _dtype(config: Any, stored: dict[str, StoredTensor], dtype: str) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    named = getattr(config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named)
    if named is None:
        floats = (tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point)
        named = next((held for held in floats if held not in FLOAT8), torch.float32)
    return named


def _check_complete(folder: str | Path, skeleton: Skeleton, stored: dict[str, StoredTensor]) -> None:
    fed: dict[str, int] = {}
    for name, source in skeleton.sources.items():
        fed[source.target] = fed.get(source.target, 0) + stored[name].size // stored[name].dtype.itemsize
    for target, place in skeleton.model.state_dict().items():
        if target in tied(skeleton.model):
            continue
        if fed.get(target, 0) != place.numel():
            raise ValueError(
                f"{folder} has {fed.get(target, 0)} numbers for {target}; the model needs {place.numel()} "
                f"= {tuple(place.shape)}"
            )
