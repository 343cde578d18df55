"""Checkpoints on disk: loads a model with its tokenizer, and saves both as a folder that is either whole or absent."""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_ext.files import replace_file, replace_folder
from moe_ext.novices import experts_left, make_room
from moe_ext.routing import CONFIG_KEY, section_with

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # "model" or "owner/model"
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Arguments of from_pretrained that say where a checkpoint is, for its config as for its weights.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
_ALLOWED = "allow_global_per_layer_attribute_access"  # property of transformers' configs


def from_pretrained(checkpoint: str | Path, *, auto_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Loads any checkpoint that transformers loads, and also those that pruning makes and it does not load.

    Layers that differ in their number of experts say so in transformers' ``per_layer_config``. Most families' modeling
    code of transformers 5.23 reads the one global field instead, and stock ``from_pretrained`` stops with
    AmbiguousGlobalPerLayerAttributeError. Here each decoder layer is built from its own config; afterwards all share
    the model's, as ever. Experts replaced by their means (:func:`moe_ext.prune` with ``novices``) say so in
    ``config.moe_ext``, and are built into the layers. For such a checkpoint the family's layer and config classes are
    changed while it loads: load one model at a time.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub.
        auto_class: which of transformers' classes to load, with a ``from_pretrained`` of its own.
        **options: passed on to it.

    Returns:
        What that ``from_pretrained`` returns: the model.

    Raises:
        ValueError: such a checkpoint of a family whose decoder layers cannot be told, or a wrong ``config.moe_ext``.
        OSError: no such checkpoint, or a broken one.
    """
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):  # it may be a name or a folder
        where = {name: value for name, value in options.items() if name in _WHERE}
        config = AutoConfig.from_pretrained(config or checkpoint, **where)
    text = config.get_text_config(decoder=True)
    left = experts_left(getattr(config, CONFIG_KEY, None), text.num_hidden_layers)
    if not text.is_heterogeneous and not left:
        return auto_class.from_pretrained(checkpoint, **options)
    with _layers_built_one_by_one(text, left):
        return auto_class.from_pretrained(checkpoint, **options)


@contextmanager
def _layers_built_one_by_one(config: Any, left: dict[int, int]) -> Iterator[None]:
    """Decoder layers of the config's family that are built inside the ``with`` block read ``per_layer_config``, and
    have ``left[layer]`` experts beside means; the rest of the model may read the global fields."""
    base = MODEL_MAPPING.get(type(config), None)
    classes = [] if base is None else _decoder_layers(sys.modules[base.__module__])
    if not classes:
        raise ValueError(
            f"the decoder layers of model type {config.model_type!r} cannot be told from its modeling code"
        )
    originals = [cls.__init__ for cls in classes]
    for cls, original in zip(classes, originals, strict=True):
        cls.__init__ = _built_from_its_own_config(original, left)
    setattr(type(config), _ALLOWED, True)  # language model heads keep a copy of the global count
    try:
        yield
    finally:
        delattr(type(config), _ALLOWED)  # the property of the base class again
        for cls, original in zip(classes, originals, strict=True):
            cls.__init__ = original


def _decoder_layers(modeling: Any) -> list[Any]:
    return [
        cls
        for cls in vars(modeling).values()
        if inspect.isclass(cls)
        and issubclass(cls, GradientCheckpointingLayer)
        and {"config", "layer_idx"} <= set(inspect.signature(cls.__init__).parameters)
    ]


def _built_from_its_own_config(original: Any, left: dict[int, int]) -> Any:
    @wraps(original)
    def build(self: nn.Module, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        own = config.per_layer_config[layer_idx]
        original(self, own, layer_idx, *args, **kwargs)
        if layer_idx in left:
            make_room(self, left[layer_idx], config.hidden_size)
        # One config for all from here on: implementations of attention and experts are chosen there.
        for module in self.modules():
            if getattr(module, "config", None) is own:
                module.config = config

    return build


def load(checkpoint: str | Path, *, dtype: str = "auto", device: str = "cpu") -> tuple[PreTrainedModel, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: where the model goes.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ValueError: unknown dtype.
        OSError: no such checkpoint, or a broken one.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}")
    if not Path(checkpoint).is_dir() and not HUB_NAME.fullmatch(str(checkpoint)):
        raise FileNotFoundError(f"there is no checkpoint folder {checkpoint}")
    model = from_pretrained(checkpoint, dtype=DTYPES[dtype])
    return model.to(device).eval(), AutoTokenizer.from_pretrained(checkpoint)


def save(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> None:
    """Writes a checkpoint that :func:`load` reads. The folder appears when it is complete.

    Args:
        folder: must not exist yet, or be empty.

    Raises:
        FileExistsError: the folder holds something.
        OSError: it cannot be written.
    """
    with replace_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def write_thresholds(checkpoint: str | Path, thresholds: Tensor) -> None:
    """Stores skip thresholds (L, K - 1) in a checkpoint folder's ``config.json``, replacing that one file.

    Raises:
        OSError: there is no ``config.json``, or it cannot be written.
    """
    path = Path(checkpoint) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[CONFIG_KEY] = section_with(thresholds, config.get(CONFIG_KEY))
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def size_on_disk(checkpoint: str | Path) -> int:
    """Bytes of a checkpoint folder's weight files."""
    return sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
