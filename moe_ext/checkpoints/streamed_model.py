"""A model whose decoder layers stay in their checkpoint: one is in memory at a time, and the next is read ahead.

Layers are loaded by transformers' own code, so that their weights are what ``from_pretrained`` makes of the same files;
quantised weights become what they stand for.
Reading ahead goes into the system's page cache and takes no memory of this process.
"""

import hashlib
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from moe_ext.checkpoints.finite import is_finite
from moe_ext.checkpoints.gguf_weights import gguf_in, gguf_pieces
from moe_ext.checkpoints.meta_model import skeleton_of, without_bar
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor, stored_tensors
from moe_ext.models.blocks import base_of, decoder_layers, moe_blocks

_READ = 8 << 20  # bytes read ahead at a time
_SAMPLE, _SAMPLES = 64, 4  # bytes, and places in every matrix, that tell weights apart


class LayersOnDisk:
    """The model of a checkpoint folder; a context manager that ends reading ahead.

    In memory are the embeddings and whatever else is outside the decoder layers, without the language model head, and
    one decoder layer.

    Args:
        folder: a checkpoint folder with safetensors weights; or with one GGUF file, or split set, beside its config.
        dtype: "auto" (as ``from_pretrained`` would choose it), "float32", "bfloat16" or "float16".
        device: where weights go.
        read_ahead: whether the next layer is read while one computes.
        trust_remote_code: as for :func:`moe_ext.from_pretrained`.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as :func:`moe_ext.checkpoints.meta_model.skeleton_of` and
            :func:`moe_ext.checkpoints.stored_tensors.stored_tensors`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        read_ahead: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        file = gguf_in(Path(folder))
        self._stored = stored_tensors(folder) if file is None else gguf_pieces(folder, file)
        skeleton = skeleton_of(
            folder, self._stored, dtype=dtype, device=device, trust_remote_code=trust_remote_code, source=file
        )
        self._skeleton = skeleton
        self.model: PreTrainedModel = skeleton.model
        self.folder, self._device = Path(folder), torch.device(device)
        self.blocks = moe_blocks(self.model)
        owner, layers, _ = decoder_layers(self.model, self.blocks)
        self.num_layers = len(layers)
        self._keys: list[list[str]] = [[] for _ in layers]
        others, self._head = [], []
        base = base_of(self.model)
        prefix = next((f"{name}." for name, part in self.model.named_modules() if part is base and name), "")
        for name, source in skeleton.sources.items():
            if source.target.startswith(owner + "."):
                self._keys[int(source.target.removeprefix(owner + ".").split(".")[0])].append(name)
            elif source.target.startswith(prefix):
                others.append(name)
            else:
                self._head.append(name)
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=skeleton.dtype,
            dtype_plan=self.model._get_dtype_plan(skeleton.dtype),
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        saved = self.model.state_dict().keys()
        self._absent = {
            index: [
                (module, tensors, key, tensor)
                for module_name, module in layer.named_modules()
                for tensors in (module._parameters, module._buffers)
                for key, tensor in tensors.items()
                if tensor is not None and ".".join(filter(None, (f"{owner}.{index}", module_name, key))) in saved
            ]
            for index, layer in enumerate(layers)
        }
        self._fill_buffers()
        self._load(others)
        self._resident: int | None = None
        self._read_ahead, self._reader = read_ahead, _Reader()

    def __enter__(self) -> "LayersOnDisk":
        return self

    def __exit__(self, *raised: object) -> None:
        self._reader.stop()
        self._free()

    def need(self, layer: int, step: int = 1) -> None:
        """Loads a decoder layer in the place of the one that is in memory.

        Args:
            step: from this layer to the one that will be needed next.
        """
        if layer == self._resident:
            return
        self._free()
        self._reader.stop()  # what is left of the layer is read now
        self._load(self._keys[layer])
        self._resident = layer
        if self._read_ahead and 0 <= layer + step < self.num_layers:
            self._reader.start([each for name in self._keys[layer + step] for each in self._tensors(name)])

    def load_head(self) -> None:
        """Loads the language model head, too; one that is the embeddings' is theirs."""
        self._load(self._head)
        self.model.tie_weights(recompute_mapping=False)

    def fingerprint(self) -> str:
        """Tells checkpoints apart by their folder and their files' names, sizes and times."""
        files = sorted({tensor.file for tensor in self._stored.values()} | {self.folder / "config.json"})
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return f"{self.folder.resolve()} {states}"

    def sampled_digest(self) -> str:
        """Of the stored tensors' names, types, shapes and some of their bytes: the same wherever the folder is, and
        however its tensors are shared out among files."""
        digest = hashlib.sha256()
        with ExitStack() as stack:
            files = {
                file: stack.enter_context(file.open("rb", buffering=0))
                for file in {tensor.file for tensor in self._stored.values()}
            }
            for name, tensor in sorted(self._stored.items()):
                digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
                parts = tensor.shape[0] if len(tensor.shape) > 2 else 1  # experts in one tensor
                for place in range(parts * _SAMPLES):
                    begin = tensor.size * place // (parts * _SAMPLES)
                    files[tensor.file].seek(tensor.offset + begin)
                    digest.update(files[tensor.file].read(min(_SAMPLE, tensor.size - begin)))
        return digest.hexdigest()

    def _free(self) -> None:
        if self._resident is not None:
            for _, tensors, key, absent in self._absent[self._resident]:
                tensors[key] = absent
            self._resident = None

    def _load(self, names: list[str]) -> None:
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
                place.copy_(_read(stored))
        if filled != [rows] * experts:
            raise ValueError(f"{self.folder}: experts of {target} have {filled} rows; expected {rows} each")
        module._parameters[key] = nn.Parameter(weight, requires_grad=False)

    def _dequantised(self, name: str) -> Tensor:
        """What a quantised weight stands for, in the type of its place."""
        tensors = {tensor.name: _read(tensor) for tensor in self._tensors(name)}
        dtype = self._skeleton.dtype_of(self._skeleton.sources[name].target)
        return self._skeleton.quantised[name].values(tensors, dtype)

    def _tensors(self, name: str) -> list[StoredTensor]:
        """What is stored of a key's weight."""
        weight = self._skeleton.quantised.get(name)
        return [self._stored[piece] for piece in ([name] if weight is None else weight.pieces)]

    def _fill_buffers(self) -> None:
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


def _read(stored: StoredTensor) -> Tensor:
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


class _Reader:
    """Reads tensors' bytes in a thread of its own and forgets them: the system keeps them in its page cache."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self, tensors: list[StoredTensor]) -> None:
        self._stopped.clear()
        self._thread = threading.Thread(target=self._read, args=(tensors,), name="moe_ext-read-ahead", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _read(self, tensors: list[StoredTensor]) -> None:
        buffer = memoryview(bytearray(_READ))
        for tensor in sorted(tensors, key=lambda tensor: (tensor.file, tensor.offset)):
            with tensor.file.open("rb", buffering=0) as file:
                file.seek(tensor.offset)
                left = tensor.size
                while left > 0 and not self._stopped.is_set():
                    count = file.readinto(buffer[: min(left, _READ)])
                    if not count:
                        return  # cut short since: loading says so
                    left -= count
