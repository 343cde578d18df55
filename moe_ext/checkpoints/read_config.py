"""A checkpoint's config and the class that builds its model: looked up in one way by every job.

Nothing that a config names is trusted: no code of the checkpoint runs, and none that its config names on the Hub is
fetched, unless the user says so.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""What the names of fields end with that choose code by its name; ``owner/repository`` is a kernel of the Hub."""


def read_config(checkpoint: str | Path, *, trust_remote_code: bool = False, **where: Any) -> PreTrainedConfig:
    """The config of a checkpoint folder, or of a name on the Hub.

    Args:
        trust_remote_code: whether code of the checkpoint, and kernels that its config names, may run.
        **where: arguments of ``from_pretrained`` that say where the checkpoint is.

    Raises:
        ValueError: code that is not trusted, weights of another name than the usual, an unknown model type, or a field
            that is not what it should be.
        OSError: no config, or a broken one.
    """
    try:
        content, _ = PreTrainedConfig.get_config_dict(checkpoint, **where)
    except (AttributeError, TypeError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{checkpoint}: config.json is no JSON object")
    _check_fields(checkpoint, content)
    if content.get("transformers_weights") is not None:
        raise ValueError(
            f"{checkpoint}: the config names weights of its own (transformers_weights); expected model.safetensors"
        )
    if not trust_remote_code and (kernel := next(_kernels(content), None)):
        raise ValueError(
            f"{checkpoint}: the config names the kernel {kernel[:100]!r}, whose code would be fetched and run; "
            "trust_remote_code=True (--trust-remote-code) allows it"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code, **where)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{checkpoint} brings code of its own, which is not run; trust_remote_code=True (--trust-remote-code) "
            "allows it"
        ) from None
    return config


def _check_fields(checkpoint: str | Path, content: dict[str, Any]) -> None:
    """ValueError for fields that transformers takes as they are and this package looks things up by."""
    for field in ("dtype", "torch_dtype"):
        if (name := content.get(field)) is not None and not (
            isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            raise ValueError(f"{checkpoint}: the config's {field} is {str(name)[:100]!r}; expected a type of torch")
    names = content.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{checkpoint}: the config's architectures are {str(names)[:100]!r}; expected a list of names")


def _kernels(content: Any) -> Iterator[str]:
    """Names of kernels on the Hub in a config, at any depth."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if str(key).endswith(_IMPLEMENTATIONS):
            names = value.values() if isinstance(value, dict) else [value]
            yield from (name for name in names if isinstance(name, str) and "/" in name)
        else:
            yield from _kernels(value)


def model_class(config: PreTrainedConfig) -> Any:
    """What loads or builds the model: the class that saved the checkpoint if it is transformers', else an auto class.

    The same class for every job, so that a layer has one name: of a multimodal model AutoModelForCausalLM would build
    the text decoder alone, with other names.
    """
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if (
        isinstance(named, type)
        and issubclass(named, PreTrainedModel)
        and type(config).__module__.startswith("transformers.")
        and type(config) is getattr(named, "config_class", None)
    ):
        return named
    return AutoModelForCausalLM


def model_built_from(config: PreTrainedConfig, *, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """A model of that class without a checkpoint's weights."""
    cls = model_class(config)
    if cls is AutoModelForCausalLM:
        model: PreTrainedModel = cls.from_config(config, trust_remote_code=trust_remote_code, **options)
    else:
        model = cls._from_config(config, **options)
    return model
