"""Puts a checkpoint's weights into a model on the meta device, by transformers' own code, so that they are what
``from_pretrained`` makes of the same files; quantised ones become what they stand for.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from moe_ext.checkpoints.finite import is_finite
from moe_ext.checkpoints.meta_model import Skeleton, without_bar
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor


class WeightLoader:
    """Loads tensors of a folder into the skeleton's model.

    Args:
        stored: what the folder holds, by key.
        device: where weights go.
    """

    def __init__(self, folder: str | Path, skeleton: Skeleton, stored: Mapping[str, StoredTensor], device: str) -> None:
        self.folder, self.model = Path(folder), skeleton.model
        self._skeleton, self._stored, self._device = skeleton, stored, torch.device(device)
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=skeleton.dtype,
            dtype_plan=self.model._get_dtype_plan(skeleton.dtype),
            weight_mapping=get_model_conversion_mapping(self.model),
        )

    def load(self, names: list[str]) -> None:
        """Experts that are stored one by one are read into their place; the rest goes through transformers' code."""
        stacked: dict[str, list[str]] = {}
        others = []
        for name in names:
            source = self._skeleton.sources[name]
            if source.part is None:
                others.append(name)
            else:
                stacked.setdefault(source.target, []).append(name)
        for target, parts in stacked.items():
            self._load_stacked(target, parts)
        with ExitStack() as stack, without_bar():
            files = {
                file: stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                for file in {self._stored[name].file for name in others if name not in self._skeleton.quantised}
            }
            state = {
                source.target if source.stands_in else name: files[self._stored[name].file].get_slice(name)
                if name not in self._skeleton.quantised
                else self._dequantised(name)
                for name, source in ((name, self._skeleton.sources[name]) for name in others)
            }
            info, _ = convert_and_load_state_dict_in_model(self.model, state, self._config)
        if problems := {**info.conversion_errors, **dict.fromkeys(map(str, info.mismatched_keys), "has another shape")}:
            name, problem = next(iter(problems.items()))
            raise ValueError(f"{self.folder}: {name}: {problem}")
        for target in sorted({self._skeleton.sources[name].target for name in names}):
            owner, _, key = target.rpartition(".")
            if not is_finite(getattr(self.model.get_submodule(owner), key)):
                raise CheckpointError(f"{self.folder}: not all numbers are finite in {target}")

    def _load_stacked(self, target: str, names: list[str]) -> None:
        """Reads a parameter (E, R, C) from tensors (R', C) that fill an expert's rows one above the other, with one of
        them in memory beside it at most."""
        module = self.model.get_submodule(target.rpartition(".")[0])
        key, sources = target.rpartition(".")[2], self._skeleton.sources
        absent = _of(module._parameters, key)
        experts, rows, columns = absent.shape
        weight = torch.empty_like(absent, dtype=self._skeleton.dtype_of(target), device=self._device)
        filled = [0] * experts
        for name in sorted(names, key=lambda name: (sources[name].expert, sources[name].part)):
            stored, expert = self._skeleton.stored[name], sources[name].expert
            if expert is None or expert >= experts or stored.shape[1:] != (columns,):
                raise ValueError(f"{self.folder}: {name} {stored.shape} has no place in {target} {tuple(absent.shape)}")
            first, filled[expert] = filled[expert], filled[expert] + stored.shape[0]
            place = weight[expert, first : filled[expert]]
            if name in self._skeleton.quantised:
                place.copy_(self._dequantised(name))
            elif place.device.type == "cpu" and place.dtype == stored.dtype and place.is_contiguous():
                _read_into(stored, place)
            else:
                place.copy_(read_stored(stored))
        if filled != [rows] * experts:
            raise ValueError(f"{self.folder}: experts of {target} have {filled} rows; expected {rows} each")
        module._parameters[key] = nn.Parameter(weight, requires_grad=False)

    def _dequantised(self, name: str) -> Tensor:
        """What a quantised weight stands for, in the type of its place."""
        tensors = {tensor.name: read_stored(tensor) for tensor in self.stored(name)}
        dtype = self._skeleton.dtype_of(self._skeleton.sources[name].target)
        return self._skeleton.quantised[name].values(tensors, dtype)

    def stored(self, name: str) -> list[StoredTensor]:
        """What is stored of a key's weight."""
        weight = self._skeleton.quantised.get(name)
        return [self._stored[piece] for piece in ([name] if weight is None else weight.pieces)]

    def fill_buffers(self) -> None:
        """Buffers that no checkpoint holds, by the model's own code, as transformers' from_pretrained does it."""
        for tensor in self.model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        owners = {
            name: (self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name, _ in self.model.named_non_persistent_buffers()
        }
        for module, key in owners.values():
            module._buffers[key] = torch.empty_like(_of(module._buffers, key), device="cpu")
        self.model.initialize_weights()
        for module, key in owners.values():
            module._buffers[key] = _of(module._buffers, key).to(self._device)


def _of(tensors: Mapping[str, Tensor | None], key: str) -> Tensor:
    tensor = tensors[key]
    assert tensor is not None
    return tensor


def read_stored(stored: StoredTensor) -> Tensor:
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    _read_into(stored, tensor)
    return tensor


def _read_into(stored: StoredTensor, tensor: Tensor) -> None:
    """Fills a contiguous tensor on the CPU."""
    place = tensor.reshape(-1).view(torch.uint8).numpy().data
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.offset)
        while len(place):
            count = file.readinto(place)
            if not count:
                raise CheckpointError(f"{stored.file}: was cut short since it was opened")
            place = place[count:]
