"""Checkpoints on disk: loads a model with its tokenizer, and saves both as a folder that is either whole or absent."""

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from moe_ext.checkpoints.faults import check_loaded, say_ignored
from moe_ext.checkpoints.finite import check_finite
from moe_ext.checkpoints.load_packed import holds_quantised_experts, load_packed
from moe_ext.checkpoints.meta_model import check_fits
from moe_ext.checkpoints.other_files import copy_other_files
from moe_ext.checkpoints.read_config import model_class, read_config
from moe_ext.checkpoints.stored_tensors import stored_tensors
from moe_ext.checkpoints.written_config import CONFIG, changed_content, read_content, write_content
from moe_ext.models.config_section import (
    CONFIG_KEY,
    GateScale,
    experts_left,
    section_of,
    section_with,
    section_with_scale,
    set_section,
)
from moe_ext.models.dtypes import DTYPES
from moe_ext.models.own_counts import built
from moe_ext.storage.files import locked_folder, replace_folder

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # "model" or "owner/model"
_DTYPES = {"auto": "auto", **DTYPES}

# Arguments of from_pretrained that say where a checkpoint is, for its config as for its weights.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
_SHARED_OUT = ("distributed_config", "tp_plan", "tp_size")  # that several processes share the model
_ELSEWHERE = ("gguf_file", "variant", "state_dict")  # and these, that weights are in other files than the usual


def from_pretrained(
    checkpoint: str | Path, *, auto_class: Any = None, allow_missing: bool = False, **options: Any
) -> Any:
    """Loads any checkpoint that transformers loads, and also those that pruning makes and it does not load.

    Tensors that the checkpoint lacks, or that have another shape than the model's, are an error; transformers fills
    them with random numbers. No code of the checkpoint runs without ``trust_remote_code=True``, and weights are read
    from safetensors files only.

    Layers that differ in their number of experts say so in transformers' ``per_layer_config``. Most families' modeling
    code of transformers 5.23 reads the one global field instead, and stock ``from_pretrained`` stops with
    AmbiguousGlobalPerLayerAttributeError. Here each decoder layer is built from its own config; afterwards all share
    the model's, as ever. Experts replaced by their means (:func:`moe_ext.prune` with ``novices``) say so in
    ``config.moe_ext``, and are built into the layers. For such a checkpoint the family's layer and config classes are
    changed while it loads: load one model at a time.

    Quantised experts of a folder are loaded packed, as they are stored, and run on moe_ext's operators as those of
    :func:`moe_ext.quantize` do: float8 with a scale a tensor, a row or a block of 128 by 128 (``fp8``,
    compressed-tensors), int8 with a scale a row and int4 in groups (compressed-tensors, GPTQ, AutoAWQ), gpt-oss' MXFP4.
    Other quantised weights of such a folder become what they stand for. Activations are not quantised, whatever the
    config says. Of the options there are then ``dtype``, ``attn_implementation`` and ``trust_remote_code``; with an
    ``auto_class`` or a ``quantization_config`` transformers' own code loads the folder.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub.
        auto_class: which of transformers' classes to load, with a ``from_pretrained`` of its own; the class that saved
            the checkpoint if absent, AutoModelForCausalLM if that is none of transformers'.
        allow_missing: whether such tensors may be filled with random numbers; a warning then names them.
        **options: passed on to it.

    Returns:
        What that ``from_pretrained`` returns: the model.

    Raises:
        CheckpointError: the weight files are not whole, not what their index says, or not what the model needs.
        ValueError: such a checkpoint of a family whose decoder layers cannot be told, a wrong ``config.moe_ext``, or
            code that is not trusted.
        OSError: no such checkpoint, or a broken one.
    """
    options = {"trust_remote_code": False, "use_safetensors": True, **options}
    config, where = options.get("config"), {name: options[name] for name in _WHERE if name in options}
    if not isinstance(config, PreTrainedConfig):  # it may be a name or a folder
        config = read_config(config or checkpoint, **where)
    if experts_left(section_of(config), config.get_text_config(decoder=True).num_hidden_layers):
        for name in _SHARED_OUT:
            if options.get(name) is not None:
                raise ValueError(
                    f"{name}: {checkpoint} has means in the place of removed experts, which every process would add"
                )
    folder = Path(checkpoint, options.get("subfolder") or "")
    elsewhere = any(options.get(name) is not None for name in _ELSEWHERE)
    if folder.is_dir() and options["use_safetensors"] and not elsewhere:
        stored = stored_tensors(folder)  # its files are whole, and none is outside the folder
        if auto_class is None and "quantization_config" not in options and holds_quantised_experts(folder, config):
            asked = {name: value for name, value in options.items() if name not in ("config", "output_loading_info")}
            if (packed := load_packed(folder, stored, asked)) is not None:
                return packed
        if auto_class is None and not allow_missing:
            check_fits(folder, stored, config, trust_remote_code=options["trust_remote_code"])
    asked, reshaped = options.pop("output_loading_info", False), options.pop("ignore_mismatched_sizes", False)
    # Transformers' own error does not say which they are.
    options.update(output_loading_info=True, ignore_mismatched_sizes=True)
    loading = auto_class or model_class(config)
    loaded = built(config, lambda: loading.from_pretrained(checkpoint, **options))
    model, info = loaded
    mismatched = () if reshaped else info["mismatched_keys"]
    check_loaded(checkpoint, info["missing_keys"], mismatched, allowed=allow_missing)
    say_ignored(checkpoint, info["unexpected_keys"])
    return loaded if asked else model


def read_tokenizer(checkpoint: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint; no code of the checkpoint runs unless it is trusted."""
    return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def load_checkpoint(
    checkpoint: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_missing: bool = False,
    allow_not_finite: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: where the model goes.
        trust_remote_code, allow_missing: as for :func:`from_pretrained`.
        allow_not_finite: whether weights may be infinite or no numbers, which a warning then names.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        CheckpointError: weights that are not finite, or as :func:`from_pretrained`.
        ValueError: unknown dtype, or as :func:`from_pretrained`.
        OSError: no such checkpoint, or a broken one.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected {', '.join(_DTYPES)}")
    if not Path(checkpoint).is_dir() and not HUB_NAME.fullmatch(str(checkpoint)):
        raise FileNotFoundError(f"there is no checkpoint folder {checkpoint}")
    model = from_pretrained(
        checkpoint, dtype=_DTYPES[dtype], trust_remote_code=trust_remote_code, allow_missing=allow_missing
    )
    check_finite(checkpoint, model, allowed=allow_not_finite)
    return model.to(device).eval(), read_tokenizer(checkpoint, trust_remote_code=trust_remote_code)


def save_checkpoint(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> None:
    """Writes a checkpoint that :func:`load_checkpoint` reads. The folder appears when it is complete.

    Of a model that was loaded from a folder or the Hub, the config is the source's, with what is different in the model
    changed, and everything beside the weights is copied from there, the tokenizer included.

    Args:
        folder: must not exist yet, or be empty.

    Raises:
        FileExistsError: the folder holds something.
        OSError: it cannot be written.
    """
    source = _source_of(model)
    with replace_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if source is None:
            tokenizer.save_pretrained(temporary)
            return
        known, before = source
        content = changed_content(
            read_content(known),
            before,
            model.config,
            dtype=None if before.dtype in (None, model.dtype) else model.dtype,
            architecture=type(model).__name__,
        )
        content.pop("quantization_config", None)
        if (declared := getattr(model.config, "quantization_config", None)) is not None:
            content["quantization_config"] = declared if isinstance(declared, dict) else declared.to_dict()
        write_content(temporary, content)
        copy_other_files(known, temporary)


def _source_of(model: PreTrainedModel) -> tuple[Path, PreTrainedConfig] | None:
    """The folder that a model was loaded from, which may be in the Hub's cache, and its config; if it is there and the
    model is of that class."""
    name = model.config.name_or_path
    if not name:
        return None
    folder = _folder_of(name)
    if not (folder / CONFIG).is_file():
        return None
    trusted = not type(model.config).__module__.startswith("transformers.")
    config = read_config(folder, trust_remote_code=trusted)
    return (folder, config) if type(config) is type(model.config) else None


def _folder_of(checkpoint: str) -> Path:
    """Where a checkpoint's files are: its folder, or that of a name on the Hub in the cache, if it is there."""
    folder = Path(checkpoint)
    if not folder.exists() and HUB_NAME.fullmatch(checkpoint):
        cached = try_to_load_from_cache(checkpoint, CONFIG, cache_dir=constants.HF_HUB_CACHE)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder


def stored_bytes(checkpoint: str) -> int:
    """Bytes of a checkpoint's tensors as they are stored, in whatever format.

    Raises:
        CheckpointError, OSError: its safetensors files are not on this machine, or not whole.
    """
    return sum(tensor.size for tensor in stored_tensors(_folder_of(checkpoint)).values())


def check_config_file(checkpoint: str | Path) -> None:
    """OSError unless a checkpoint is a folder with a ``config.json`` of its own, which can be replaced."""
    path = Path(checkpoint) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint folder, to write into; {checkpoint} has no {CONFIG}")
    if path.is_symlink():
        raise OSError(f"{path} is a link to {os.path.realpath(path)}, which is not changed: write a copy instead")


def write_thresholds(
    checkpoint: str | Path,
    thresholds: Tensor,
    layers: Sequence[int],
    *,
    renormalise: GateScale = "kept",
    trust_remote_code: bool = False,
) -> None:
    """Stores skip thresholds (L, K - 1) of those decoder layers, and what becomes of the kept weights (``renormalise``,
    as for :func:`moe_ext.patch`), in a checkpoint folder's ``config.json``, replacing that one file: in the part of the
    text decoder, where every class that loads the folder finds it.

    Raises:
        ValueError: ``config.json`` holds no JSON object, or a section that is none.
        OSError: there is no ``config.json``, it cannot be written, or it is a link, whose target is not touched.
    """
    check_config_file(checkpoint)
    with locked_folder(checkpoint):  # what another process writes between the two reads would be no change, and lost
        content = read_content(checkpoint)
        before = read_config(checkpoint, trust_remote_code=trust_remote_code)
        after = copy.deepcopy(before)
        section = section_of(after)
        if section is not None and not isinstance(section, dict):
            raise ValueError(f"{Path(checkpoint) / CONFIG}: expected a JSON object under {CONFIG_KEY!r}")
        set_section(after, section_with_scale(renormalise, section_with(thresholds, section, layers)))
        write_content(checkpoint, changed_content(content, before, after))


def size_on_disk(checkpoint: str | Path) -> int:
    """Bytes of a checkpoint folder's weight files."""
    return sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
