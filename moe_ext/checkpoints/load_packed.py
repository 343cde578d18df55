"""Loads a folder with quantised experts for running: packed as they are stored, never as float weights.

Experts are read a projection at a time into the layer's packed tensors. Quantised weights outside the experts become
what they stand for, a decoder layer at a time. So memory peaks at the quantised experts, everything else, and a layer.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from moe_ext.checkpoints.meta_model import Skeleton, skeleton_of
from moe_ext.checkpoints.quantised import read_quantisation
from moe_ext.checkpoints.saved_packed import save_as_packed
from moe_ext.checkpoints.stored_matrices import read_matrix
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor
from moe_ext.checkpoints.weight_loader import WeightLoader, read_stored
from moe_ext.models.blocks import LOADED_LATER, MoeBlock, decoder_layers, moe_blocks
from moe_ext.models.boundary import goes_through_interface
from moe_ext.models.packed_experts import (
    IMPLEMENTATION,
    Packer,
    QuantisedMatrix,
    WeightFormat,
    hold_packed,
    weight_names,
)

METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "gptq", "awq")
"""What quantization_config calls the formats of which experts may be loaded so."""

# Of transformers' from_pretrained, options that mean here what they mean there.
_OPTIONS = ("dtype", "torch_dtype", "attn_implementation", "trust_remote_code", "use_safetensors", "local_files_only",
            "low_cpu_mem_usage")  # fmt: skip


def holds_quantised_experts(folder: Path, config: PreTrainedConfig) -> bool:
    """Whether a folder says that its weights are quantised in a format of which experts may be loaded packed."""
    quantisation = read_quantisation(folder, config)
    return quantisation is not None and quantisation.get("quant_method") in METHODS


def load_packed(folder: Path, stored: dict[str, StoredTensor], options: Mapping[str, Any]) -> PreTrainedModel | None:
    """The model of a folder, its quantised experts packed; None if it quantises none of its experts.

    Args:
        stored: the folder's tensors.
        options: those of ``from_pretrained``.

    Raises:
        ValueError: an option that has no meaning here, or experts in a form that the operators do not take.
        CheckpointError: as :func:`moe_ext.checkpoints.meta_model.skeleton_of`.
    """
    trusted = bool(options.get("trust_remote_code"))
    skeleton = skeleton_of(folder, stored, trust_remote_code=trusted)
    model = skeleton.model
    blocks = moe_blocks(model)
    names = {module: name for name, module in model.named_modules()}
    experts = {f"{names[block.experts]}.{name}": block for block in blocks for name in weight_names(block.experts)}
    quantised = {
        name for name in skeleton.quantised if skeleton.sources[name].target in experts
    }  # keys of experts' weights
    if not quantised or not all(goes_through_interface(block.experts) for block in blocks):
        return None
    if unknown := sorted(name for name, value in options.items() if name not in _OPTIONS and value is not None):
        raise ValueError(
            f"{folder} holds quantised experts, which are loaded packed; from_pretrained then has no option "
            f"{unknown[0]!r}, only {', '.join(_OPTIONS)}"
        )
    dtype = options.get("dtype", options.get("torch_dtype"))
    wanted = {"auto": None, None: None}.get(dtype, dtype) if isinstance(dtype, str | None) else dtype
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted)
    conversions: Any = model._weight_conversions  # of all the folder's names, the experts' too
    loading = _Loading(folder, skeleton, stored, quantised)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # what is held in memory is said where it is saved
    loading.run(blocks, names)
    model._weight_conversions = conversions
    if wanted is not None:
        model.to(wanted)
    if (attention := options.get("attn_implementation")) is not None:
        model.set_attn_implementation(attention)
    if model.can_generate():
        with suppress(OSError):  # there is none: that of the config
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.set_experts_implementation(IMPLEMENTATION)
    save_as_packed(model)
    return model


class _Loading:
    def __init__(self, folder: Path, skeleton: Skeleton, stored: dict[str, StoredTensor], quantised: set[str]) -> None:
        self.folder, self.skeleton, self.stored, self.quantised = folder, skeleton, stored, quantised
        self.quantisation = read_quantisation(folder, skeleton.model.config) or {}
        self.loader = WeightLoader(folder, skeleton, stored, "cpu")

    def run(self, blocks: list[MoeBlock], names: Mapping[nn.Module, str]) -> None:
        model = self.skeleton.model
        self.loader.fill_buffers()
        owner, layers, inside = decoder_layers(model, blocks)
        by_layer: list[list[str]] = [[] for _ in layers]
        others: list[str] = []
        for name, source in self.skeleton.sources.items():
            if name in self.quantised:
                continue
            path, _, rest = source.target.partition(f"{owner}.")
            (by_layer[int(rest.split(".")[0])] if not path and rest else others).append(name)
        self.loader.load(others)
        for layer, keys in enumerate(by_layer):
            self.loader.load(keys)
            for block, place in zip(blocks, inside, strict=True):
                if place == layer:
                    self._pack(block.experts, names[block.experts])
        model.tie_weights(recompute_mapping=False)
        for tensor in (*model.parameters(), *model.buffers()):
            if hasattr(tensor, LOADED_LATER):
                delattr(tensor, LOADED_LATER)

    def _pack(self, experts: nn.Module, path: str) -> None:
        keys: dict[str, list[str]] = {name: [] for name in weight_names(experts)}
        for key in self.quantised:
            target = self.skeleton.sources[key].target
            if target.rpartition(".")[0] == path:
                keys[target.rpartition(".")[2]].append(key)
        if not any(keys.values()):
            return  # float weights, which are loaded
        forms: dict[WeightFormat, str] = {}
        packed = {}
        for name, own in keys.items():
            if not own:
                raise ValueError(f"{self.folder}: {path}.{name} is not quantised, and the layer's other weight is")
            packer: Packer | None = None
            for where, form, matrix in self._matrices(f"{path}.{name}", own):
                forms.setdefault(form, where)
                if len(forms) > 1:
                    (one, first), (other, second) = list(forms.items())[:2]
                    raise ValueError(
                        f"{self.folder}: {first} is {_said(one)} and {second} is {_said(other)}; experts of a layer "
                        "run in one format"
                    )
                packer = Packer(form, int(experts.num_experts)) if packer is None else packer  # type: ignore[arg-type]
                packer.add(matrix)
            assert packer is not None
            packed[name] = packer.done()
        hold_packed(experts, next(iter(forms)), packed)

    def _matrices(self, target: str, keys: list[str]) -> Any:
        """Name, format and numbers of every expert's weight in their order."""
        sources = self.skeleton.sources
        if len(keys) == 1 and sources[keys[0]].expert is None:
            key = keys[0]
            if self.quantisation.get("quant_method") != "mxfp4":
                raise ValueError(
                    f"{self.folder}: {key} holds all experts in one tensor; only gpt-oss' MXFP4 is loaded packed so"
                )
            form, whole = self._read(key)
            for expert in range(len(whole.values)):
                yield key, form, QuantisedMatrix(whole.values[expert], whole.scales[expert])
            return
        by_expert: dict[int, list[tuple[int, str]]] = {}
        for key in keys:
            source = sources[key]
            if source.expert is None or source.part is None:
                raise ValueError(f"{self.folder}: {key} is stored in another form than transformers holds it")
            by_expert.setdefault(source.expert, []).append((source.part, key))
        for expert in sorted(by_expert):
            parts = [(key, *self._read(key)) for _, key in sorted(by_expert[expert])]
            key, form, matrix = parts[0]
            for other, other_form, below in parts[1:]:
                if other_form != form:
                    raise ValueError(
                        f"{self.folder}: {key} is {_said(form)} and {other} is {_said(other_form)}; experts of a layer "
                        "run in one format"
                    )
                if form.blocks and matrix.values.shape[0] % form.group_size:
                    raise ValueError(
                        f"{self.folder}: {key} has {matrix.values.shape[0]} rows; blocks of scales of gate and up "
                        f"would lie across each other in {target}"
                    )
                matrix = _above(matrix, below)
            yield key, form, matrix

    def _read(self, key: str) -> tuple[WeightFormat, QuantisedMatrix]:
        weight = self.skeleton.quantised[key]
        tensors = {name: read_stored(self.stored[name]) for name in weight.pieces}
        try:
            form, matrix = read_matrix(self.quantisation, weight, tensors)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        if matrix.scales.is_floating_point() and not bool(matrix.scales.isfinite().all()):
            raise CheckpointError(f"{self.folder}: not all scales of {key} are finite")
        return form, matrix


def _said(form: WeightFormat) -> str:
    return f"{form.type} with group_size {form.group_size}" + ("" if form.symmetric else " and zero points")


def _above(one: QuantisedMatrix, below: QuantisedMatrix) -> QuantisedMatrix:
    zeros = None if one.zeros is None or below.zeros is None else torch.cat([one.zeros, below.zeros])
    values: Tensor = torch.cat([one.values.view(torch.uint8), below.values.view(torch.uint8)]).view(one.values.dtype)
    return replace(one, values=values, scales=torch.cat([one.scales, below.scales]), zeros=zeros)
