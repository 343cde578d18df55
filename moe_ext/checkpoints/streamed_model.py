"""A model whose decoder layers stay in their checkpoint: one is in memory at a time, and the next is read ahead.

Layers are loaded by transformers' own code, so that their weights are what ``from_pretrained`` makes of the same files;
quantised weights become what they stand for.
Reading ahead goes into the system's page cache and takes no memory of this process.
"""

import hashlib
import threading
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedModel

from moe_ext.checkpoints.gguf_weights import gguf_in, gguf_pieces
from moe_ext.checkpoints.meta_model import skeleton_of
from moe_ext.checkpoints.stored_tensors import StoredTensor, stored_tensors
from moe_ext.checkpoints.weight_loader import WeightLoader
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
        self._stored = stored_tensors(folder) if file is None else gguf_pieces(file)
        skeleton = skeleton_of(
            folder, self._stored, dtype=dtype, device=device, trust_remote_code=trust_remote_code, source=file
        )
        self._skeleton = skeleton
        self.model: PreTrainedModel = skeleton.model
        self.folder = Path(folder)
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
        self._weights = WeightLoader(folder, skeleton, self._stored, device)
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
        self._weights.fill_buffers()
        self._weights.load(others)
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
        self._weights.load(self._keys[layer])
        self._resident = layer
        if self._read_ahead and 0 <= layer + step < self.num_layers:
            self._reader.start([each for name in self._keys[layer + step] for each in self._weights.stored(name)])

    def load_head(self) -> None:
        """Loads the language model head, too; one that is the embeddings' is theirs."""
        self._weights.load(self._head)
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
