"""``save_pretrained`` of a model with quantised experts, through transformers' own door for quantised models: what is
written are the layouts and names that ``moe-ext quantize`` writes, or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.base import HfQuantizer

from moe_ext.checkpoints.key_map import Source, sources_of
from moe_ext.checkpoints.packed_form import (
    check_storable,
    compressed_config,
    mxfp4_blocks,
    mxfp4_config,
    stored_tensors_of,
)
from moe_ext.models.own_counts import built
from moe_ext.models.packed_experts import (
    QuantisedMatrix,
    WeightFormat,
    float_shape,
    packed_format,
    tensor_names,
    unpacked_matrix,
    weight_names,
)

GPT_OSS = "gpt_oss"
"""The model type whose MXFP4 has names of its own."""


def save_as_packed(model: PreTrainedModel) -> None:
    """Lets ``save_pretrained`` of a model with quantised experts write them as others load them."""
    model.hf_quantizer = PackedExperts(model)


class PackedExperts(HfQuantizer):
    """What transformers asks about a model with quantised experts."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(SimpleNamespace(quant_method="moe_ext"))
        self.model = model

    def is_serializable(self) -> bool:
        """True; ValueError, which says what to do instead, where no layout that others load holds the experts."""
        _check(self.model)
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        """The operators on packed weights are one graph with the rest of the model."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes; says in the model's config how it is quantised."""
        state, config = packed_state(self.model)
        self.model.config.quantization_config = config
        return state, {}


def _packed_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, WeightFormat]]:
    for name, module in model.named_modules():
        if (form := packed_format(module)) is not None:
            yield name, module, form


def _form(model: PreTrainedModel) -> WeightFormat:
    """The one format of a model's quantised experts."""
    forms = {form for _, _, form in _packed_modules(model)}
    if len(forms) != 1:
        raise ValueError(f"{len(forms)} formats of quantised experts in one model are not saved")
    return forms.pop()


def own_mxfp4(model: PreTrainedModel, form: WeightFormat) -> bool:
    """Whether experts are stored in gpt-oss' own names."""
    return form.type == "mxfp4" and model.config.get_text_config(decoder=True).model_type == GPT_OSS


def no_layout(name: str, model: PreTrainedModel, form: WeightFormat) -> ValueError:
    """The error for experts that lie in one tensor, which names it."""
    kind = model.config.get_text_config(decoder=True).model_type
    return ValueError(
        f"{name}: {kind} checkpoints hold all experts of a layer in one tensor, for which compressed-tensors has no "
        f"layout that others load. In memory such experts run as {form.type}: call moe_ext.quantize on the float model"
        + (", or store them as mxfp4, gpt-oss' own form" if kind == GPT_OSS else "")
    )


def _linears(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> dict[str, Source]:
    """Of keys with their shapes, those of one expert's projection, with what each is for."""
    found = {}
    for key, source in sources_of(model, shapes).items():
        if source.expert is not None and source.part is not None and key.endswith(".weight") and len(shapes[key]) == 2:
            found[key] = source
    return found


def _with_floats(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without numbers, its experts' weights float again: transformers' conversions look at them."""
    with torch.device("meta"):
        like: PreTrainedModel = built(model.config, partial(type(model)._from_config, model.config))
    if hasattr(model, "_weight_conversions"):
        like._weight_conversions = model._weight_conversions
    return like


def _check(model: PreTrainedModel) -> dict[str, Source]:
    """The keys of the experts' projections; ValueError if they cannot be stored as others load them."""
    form = _form(model)
    if own_mxfp4(model, form):
        return {}
    like = _with_floats(model)
    weights = {
        f"{path}.{name}": torch.empty(float_shape(experts, name), device="meta")
        for path, experts, _ in _packed_modules(model)
        for name in weight_names(experts)
    }
    reverted = revert_weight_conversion(like, weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in reverted.items()}
    found = _linears(like, shapes)
    kind = model.config.get_text_config(decoder=True).model_type
    if found.keys() != shapes.keys():
        name = next(name for name in shapes if name not in found)
        raise no_layout(name, model, form)
    for name, (rows, columns) in shapes.items():
        check_storable(name, form, rows, columns)
    names = {key.removesuffix("weight") + "weight_scale": torch.empty(0, device="meta") for key in found}
    if revert_weight_conversion(like, dict(names)).keys() != names.keys():
        raise ValueError(
            f"{kind}: names of quantised experts would be changed twice where transformers saves them; quantise the "
            "folder of the float model instead, moe-ext quantize"
        )
    return found


def packed_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's tensors, quantised experts as they are stored, by the keys that ``save_pretrained`` gives to
    transformers' conversion of names; and what the config says of them."""
    form, found = _form(model), _check(model)
    state = model.state_dict()
    modules = {path: experts for path, experts, _ in _packed_modules(model)}
    for path, experts in modules.items():
        for name in tensor_names(experts):
            if not name.endswith("_bias"):
                del state[f"{path}.{name}"]
    rest = {name: tensor.to("meta") for name, tensor in state.items()}
    ignored = unquantised({name: tuple(each.shape) for name, each in revert_weight_conversion(model, rest).items()})
    if not found:
        for path, experts in modules.items():
            for name in weight_names(experts):
                matrices = [unpacked_matrix(experts, name, expert) for expert in range(len(getattr(experts, name)))]
                whole = QuantisedMatrix(
                    torch.stack([matrix.values for matrix in matrices]), torch.stack([each.scales for each in matrices])
                )
                state[f"{path}.{name}_blocks"], state[f"{path}.{name}_scales"] = mxfp4_blocks(whole)
        return state, mxfp4_config(ignored)
    by_expert: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for key, source in found.items():
        assert source.expert is not None
        assert source.part is not None
        by_expert.setdefault((source.target, source.expert), []).append((source.part, key))
    for (target, expert), keys in by_expert.items():
        path, _, name = target.rpartition(".")
        matrix = unpacked_matrix(modules[path], name, expert)
        rows, columns = matrix.values.shape[0] // len(keys), float_columns(modules[path], name)
        for place, (_, key) in enumerate(sorted(keys)):
            own = matrix.row_slice(form, place * rows, (place + 1) * rows)
            module = key.removesuffix("weight")
            stored = stored_tensors_of(own, form, columns, scale_dtype(own, model.dtype))
            state.update({module + part: tensor for part, tensor in stored.items()})
    return state, compressed_config(form, ignored)


def float_columns(experts: nn.Module, name: str) -> int:
    shape = float_shape(experts, name)
    return shape[1] if getattr(experts, "is_transposed", False) else shape[2]


def scale_dtype(matrix: QuantisedMatrix, model: torch.dtype) -> torch.dtype:
    """The type in which scales are stored: their own; of float32 ones the model's, as compressed-tensors does it, if
    that holds them."""
    scales = matrix.scales
    return model if scales.dtype == torch.float32 and torch.equal(scales.to(model).float(), scales) else scales.dtype


def unquantised(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Modules with a weight matrix, of keys that are not quantised."""
    return [name.removesuffix(".weight") for name, shape in shapes.items() if _is_matrix(name, shape)]


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and re.search(r"embed", name.split(".")[-2]) is None
