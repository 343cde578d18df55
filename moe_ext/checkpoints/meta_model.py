"""A checkpoint's model without its weights: built on the meta device, with the way from every key to a parameter."""

import copy
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, convert_and_load_state_dict_in_model, dot_natural_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging
from transformers.utils.loading_report import LoadStateDictInfo

from moe_ext.checkpoints.faults import check_loaded, say_ignored
from moe_ext.checkpoints.float8 import DTYPES as FLOAT8
from moe_ext.checkpoints.gguf_file import GgufFile
from moe_ext.checkpoints.gguf_weights import FORMAT as GGUF
from moe_ext.checkpoints.gguf_weights import check_architecture, gguf_weights
from moe_ext.checkpoints.key_map import Source, settle_ties, sources_of, tied
from moe_ext.checkpoints.quantised import format_name, quantised_weights, read_quantisation
from moe_ext.checkpoints.quantised_weight import QuantisedWeight
from moe_ext.checkpoints.read_config import model_built_from, read_config
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor
from moe_ext.models.blocks import LOADED_LATER
from moe_ext.models.dtypes import DTYPES
from moe_ext.models.own_counts import built

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device and its checkpoint's keys.

    Attributes:
        model: in evaluation mode; its weights, all on the meta device, are marked as loaded later.
        dtype: the model's.
        stored: the checkpoint's tensors by key; in the place of a quantised weight's, one of the weight's own shape.
        sources: for every key of these that the model has a place for, what it is for.
        quantised: the weights that are stored in another form, by key.
        format: what that form is called; None if the folder says nothing of one.
        beside: keys of further tensors of a quantised checkpoint, of no expert, with the key that they belong to.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    stored: dict[str, StoredTensor]
    sources: dict[str, Source]
    quantised: dict[str, QuantisedWeight] = field(default_factory=dict)
    format: str | None = None
    beside: dict[str, str] = field(default_factory=dict)

    def saved(self) -> list[tuple[str, Source]]:
        """The keys of which a checkpoint that transformers saves has something, in the order of the model."""
        left_out = tied(self.model) | set(self.model._keys_to_ignore_on_save or ())
        ordered = sorted(self.sources.items(), key=lambda item: dot_natural_key(item[0]))
        return [(name, source) for name, source in ordered if source.target not in left_out]

    def saved_dtype(self, name: str, stored: StoredTensor) -> torch.dtype:
        """The type that a key's tensor is written in: as it is stored, if the folder's weights are quantised; else as
        ``from_pretrained`` would hold it."""
        return stored.dtype if self.format is not None else self.dtype_of(self.sources[name].target)

    def dtype_of(self, target: str) -> torch.dtype:
        """The type in which ``from_pretrained`` would hold a parameter or buffer."""
        return self._dtypes[target]

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        plan = {
            re.compile(rf"(^|\.){re.escape(pattern)}($|\.)"): dtype
            for pattern, dtype in self.model._get_dtype_plan(self.dtype).items()
        }
        return {
            name: next((dtype for pattern, dtype in plan.items() if pattern.search(name)), tensor.dtype)
            for name, tensor in self.model.state_dict().items()
        }


def skeleton_of(
    folder: str | Path,
    stored: dict[str, StoredTensor],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    source: GgufFile | None = None,
) -> Skeleton:
    """The model of a checkpoint folder, without reading a weight.

    Args:
        stored: its tensors.
        dtype: "auto" (as ``from_pretrained`` would choose it), "float32", "bfloat16" or "float16".
        device: where the weights will go.
        trust_remote_code: as for :func:`moe_ext.from_pretrained`.
        source: the GGUF file that the tensors are bytes of.

    Raises:
        CheckpointError: a tensor that the model needs and the checkpoint has not, or has in another shape.
        ValueError: unknown dtype, a checkpoint quantised in a format that is not known, an adapter, or a model that
            cannot be built.
        OSError: no config, or a broken one.
    """
    if Path(folder, ADAPTER).exists():
        raise ValueError(f"{folder} holds an adapter ({ADAPTER}): merge it into the weights first")
    config = read_config(str(folder), trust_remote_code=trust_remote_code)
    quantisation, declared = read_quantisation(folder, config), getattr(config, "quantization_config", None)
    if declared is not None:
        del config.quantization_config  # the model is built as if its weights were what they stand for
    weights: dict[str, QuantisedWeight] = {}
    form = None if quantisation is None else format_name(quantisation)
    if source is not None:
        check_architecture(folder, source, config)
        names_only = _empty(copy.deepcopy(config), torch.bfloat16, trust_remote_code)
        weights, form = gguf_weights(folder, source, names_only), GGUF
    elif quantisation is not None:
        weights = quantised_weights(folder, quantisation, stored)
        if dtype != "auto":
            raise ValueError(
                f"dtype is {dtype!r}; {folder} holds {format_name(quantisation)} weights with scales: expected auto"
            )
    pieces = {name for weight in weights.values() for name in weight.pieces}
    plain = {name: tensor for name, tensor in stored.items() if name not in pieces}
    skeleton = _built(
        config, plain | {name: weight.stand_in(stored) for name, weight in weights.items()}, dtype, trust_remote_code
    )
    _check_fits(folder, skeleton)
    skeleton.model.config.name_or_path = str(folder)
    for tensor in (*skeleton.model.parameters(), *skeleton.model.buffers()):
        setattr(tensor, LOADED_LATER, torch.device(device))
    if declared is not None:
        skeleton.model.config.quantization_config = declared
    unexpected = _unexpected(skeleton.model, skeleton.stored.keys() - skeleton.sources.keys())
    if form is None:
        say_ignored(folder, unexpected)
        return skeleton
    beside = _beside(folder, form, unexpected, skeleton.sources)
    say_ignored(folder, unexpected - beside.keys())
    return replace(
        skeleton,
        quantised={name: weight for name, weight in weights.items() if name in skeleton.sources},
        format=form,
        beside=beside,
    )


def _beside(folder: str | Path, form: str, names: Set[str], sources: dict[str, Source]) -> dict[str, str]:
    """Of tensors that the model has no place for, those that lie beside a weight that it has, with that one's key:
    scales of a cache of keys and values, and the like.

    Raises:
        ValueError: one lies beside the weights of an expert.
    """
    owners: dict[str, str] = {}
    for key in sources:
        path = key
        while path := path.rpartition(".")[0]:
            owners.setdefault(path, key)
    found = {}
    for name in sorted(names):
        owner = name.rpartition(".")[0]
        if owner not in owners or not re.search(r"\.\d+\.", name):
            continue
        if ".experts." in name:
            raise ValueError(f"{folder}: {name!r} is none of the tensors that {form} is known to hold of an expert")
        found[name] = owners[owner]
    return found


def check_fits(
    folder: str | Path, stored: dict[str, StoredTensor], config: PreTrainedConfig, *, trust_remote_code: bool
) -> None:
    """CheckpointError, with names, if a folder's tensors are not those of its config's model, before one is read; says
    nothing of a model that is quantised."""
    if getattr(config, "quantization_config", None) is None:
        _check_fits(folder, _built(copy.deepcopy(config), stored, "auto", trust_remote_code))


def _built(
    config: PreTrainedConfig,
    stored: dict[str, StoredTensor],
    dtype: str,
    trust_remote_code: bool,
) -> Skeleton:
    wanted = _dtype(config, stored, dtype)
    model = _empty(config, wanted, trust_remote_code)
    skeleton = Skeleton(model, wanted, stored, sources_of(model, stored))
    settle_ties(model, skeleton.sources, stored)
    return skeleton


def _empty(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        make = partial(model_built_from, config, dtype=dtype, trust_remote_code=trust_remote_code)
        model: PreTrainedModel = built(config, make).eval()
    return model


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


def _check_fits(folder: str | Path, skeleton: Skeleton) -> None:
    """CheckpointError unless transformers can make every tensor of the model from the checkpoint's: its own code does,
    without a number in them."""
    model, left_out = skeleton.model, tied(skeleton.model)
    places = model.state_dict()
    for name, source in skeleton.sources.items():  # it stacks experts in their order, whatever their numbers
        if source.expert is not None and source.expert >= (experts := places[source.target].shape[0]):
            raise CheckpointError(f"{folder}: {name!r} is of expert {source.expert} of {experts}")
    state = {
        source.target if source.stands_in else name: torch.empty(
            skeleton.stored[name].shape, dtype=skeleton.stored[name].dtype, device="meta"
        )
        for name, source in skeleton.sources.items()
        if source.target not in left_out
    }
    conversions = get_model_conversion_mapping(model)  # of this call's own
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            conversion.force_cpu = False  # there is no number to bring there
    config = LoadStateDictConfig(
        device_map={"": "meta"},
        dtype=skeleton.dtype,
        dtype_plan=model._get_dtype_plan(skeleton.dtype),
        weight_mapping=conversions,
    )
    with without_bar():
        info, _ = convert_and_load_state_dict_in_model(model, state, config)
    info.missing_keys -= left_out
    model.tie_weights(recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    check_loaded(folder, info.missing_keys, info.mismatched_keys, info.conversion_errors)


def _unexpected(model: PreTrainedModel, names: Set[str]) -> set[str]:
    """Names of tensors that the model has no place for, less those that its class says it leaves out."""
    info = LoadStateDictInfo(set(), set(names), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    return set(info.unexpected_keys)


@contextmanager
def without_bar() -> Iterator[None]:
    """Without transformers' bar, which would appear anew for every layer."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
