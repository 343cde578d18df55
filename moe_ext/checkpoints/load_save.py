"""Checkpoints on disk: loads a model with its tokenizer, and saves both as a folder that is either whole or absent."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from moe_ext.models.config_section import CONFIG_KEY, section_with
from moe_ext.models.dtypes import DTYPES
from moe_ext.models.uneven_layers import built
from moe_ext.storage.files import replace_file, replace_folder
from moe_ext.storage.formats import parse_json

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # "model" or "owner/model"
_DTYPES = {"auto": "auto", **DTYPES}

# Arguments of from_pretrained that say where a checkpoint is, for its config as for its weights.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


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
    return built(config, lambda: auto_class.from_pretrained(checkpoint, **options))


def load_checkpoint(checkpoint: str | Path, *, dtype: str = "auto", device: str = "cpu") -> tuple[PreTrainedModel, Any]:
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
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected {', '.join(_DTYPES)}")
    if not Path(checkpoint).is_dir() and not HUB_NAME.fullmatch(str(checkpoint)):
        raise FileNotFoundError(f"there is no checkpoint folder {checkpoint}")
    model = from_pretrained(checkpoint, dtype=_DTYPES[dtype])
    return model.to(device).eval(), AutoTokenizer.from_pretrained(checkpoint)


def save_checkpoint(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> None:
    """Writes a checkpoint that :func:`load_checkpoint` reads. The folder appears when it is complete.

    Args:
        folder: must not exist yet, or be empty.

    Raises:
        FileExistsError: the folder holds something.
        OSError: it cannot be written.
    """
    with replace_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def write_thresholds(checkpoint: str | Path, thresholds: Tensor, layers: Sequence[int]) -> None:
    """Stores skip thresholds (L, K - 1) of those decoder layers in a checkpoint folder's ``config.json``, replacing
    that one file.

    Raises:
        ValueError: ``config.json`` holds no JSON object, or a section that is none.
        OSError: there is no ``config.json``, or it cannot be written.
    """
    path = Path(checkpoint) / "config.json"
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get(CONFIG_KEY, {}), dict):
        raise ValueError(f"{path}: expected a JSON object, and one under {CONFIG_KEY!r} if there is that")
    config[CONFIG_KEY] = section_with(thresholds, config.get(CONFIG_KEY), layers)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def size_on_disk(checkpoint: str | Path) -> int:
    """Bytes of a checkpoint folder's weight files."""
    return sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
