"""A source's ``config.json`` with only those fields changed that a job changed, in the source's own spelling.

A config that transformers writes anew is another one: version 5 spells ``rope_theta``, ``torch_dtype`` and
``num_experts`` otherwise than the Hub's files, and version 4 reads its spelling wrongly without a word.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from moe_ext.storage.files import replace_file
from moe_ext.storage.formats import parse_json

CONFIG = "config.json"
# What a loaded config holds beside its file's content, and what is settled apart from it.
_NOT_COMPARED = {"_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version"}


def read_content(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's ``config.json``, as it is.

    Raises:
        OSError: there is none.
        ValueError: it is no JSON object.
    """
    path = Path(folder) / CONFIG
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def changed_content(
    content: dict[str, Any],
    before: PreTrainedConfig,
    after: PreTrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    architecture: str | None = None,
) -> dict[str, Any]:
    """The content of a ``config.json`` after a job.

    Args:
        content: of the source's; it stays as it is.
        before: what it loads to.
        after: that config as the job left it.
        dtype: type of the weights that are written; None: the source's.
        architecture: class of the model that is written; None: the source's.
    """
    result: dict[str, Any] = json.loads(json.dumps(content))
    _change(result, before, json.loads(json.dumps(before.to_dict())), json.loads(json.dumps(after.to_dict())))
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if result.get("dtype", result.get("torch_dtype")) is None:
            result["dtype"] = name
        _change_dtype(result, name)
    if architecture is not None and architecture not in (content.get("architectures") or []):
        result["architectures"] = [architecture]
    return result


def _change(content: dict[str, Any], config: PreTrainedConfig, before: dict[str, Any], after: dict[str, Any]) -> None:
    for field in sorted(before.keys() | after.keys()):
        if field in _NOT_COMPARED or (field in before and field in after and before[field] == after[field]):
            continue
        spellings = [name for name, meant in config.attribute_map.items() if meant == field and name in content]
        if field in content or not spellings:
            spellings.append(field)
        part = getattr(config, field, None)
        for name in spellings:
            if field not in after:
                content.pop(name, None)
            elif isinstance(part, PreTrainedConfig):
                if not isinstance(content.get(name), dict):
                    content[name] = {}
                _change(content[name], part, before[field], after[field])
            else:
                content[name] = after[field]


def _change_dtype(content: dict[str, Any], dtype: str) -> None:
    """The type of the weights, wherever the config says it."""
    for key, value in content.items():
        if key in ("dtype", "torch_dtype") and value is not None:
            content[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            _change_dtype(value, dtype)


def write_content(folder: str | Path, content: dict[str, Any]) -> None:
    """Replaces a folder's ``config.json``."""
    with replace_file(Path(folder) / CONFIG) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
