"""The ``moe_ext`` section of a model's config: skip thresholds, and experts left beside means.

It is in the part of the text decoder, which every class has that loads the checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CONFIG_KEY = "moe_ext"
LEFT_KEY = "experts_left"
"""Entry of a config's ``moe_ext`` section: decoder layer (as a string) to its number of experts beside the means."""


def section_of(config: Any) -> Any:
    """What a model's config has under ``moe_ext``, of whatever type; None if nothing. Earlier versions wrote it beside
    the text decoder's part."""
    return getattr(config.get_text_config(decoder=True), CONFIG_KEY, getattr(config, CONFIG_KEY, None))


def set_section(config: Any, section: dict[str, Any] | None) -> None:
    """Puts a ``moe_ext`` section into a model's config; None: takes it out."""
    text = config.get_text_config(decoder=True)
    if section is not None:
        setattr(text, CONFIG_KEY, section)
    elif hasattr(text, CONFIG_KEY):
        delattr(text, CONFIG_KEY)


def section_with_novices(left: dict[str, int], section: dict[str, Any] | None) -> dict[str, Any]:
    """A config's ``moe_ext`` section that says how many experts every decoder layer has beside means."""
    return {**(section or {}), LEFT_KEY: left}


def experts_left(section: object, layers: int) -> dict[int, int]:
    """What a config's ``moe_ext`` section says of experts beside means, by decoder layer; empty if nothing.

    Raises:
        ValueError: it says something that is no number of experts of a layer.
    """
    stored = section.get(LEFT_KEY) if isinstance(section, dict) else None
    if stored is None:
        return {}
    if not isinstance(stored, dict) or not all(
        layer.isdigit() and int(layer) < layers and type(count) is int and count > 0 for layer, count in stored.items()
    ):
        raise ValueError(f"config.moe_ext.{LEFT_KEY} is {stored!r}; expected layers with their numbers of experts")
    return {int(layer): count for layer, count in stored.items()}


THRESHOLDS_KEY = "skip_thresholds"


def check_thresholds(thresholds: Tensor | Sequence[Sequence[float]], layers: int, top_k: int) -> Tensor:
    """Thresholds as a (L, K - 1) float32 tensor on the CPU.

    Raises:
        ValueError: wrong shape, or a value that is not a finite number in [0, 1].
    """
    checked = torch.as_tensor(thresholds, dtype=torch.float32, device="cpu").detach().clone()
    if tuple(checked.shape) != (layers, top_k - 1):
        raise ValueError(
            f"skip thresholds have shape {tuple(checked.shape)}; "
            f"expected {(layers, top_k - 1)} = (MoE layers, top_k - 1)"
        )
    if not bool(((checked >= 0) & (checked <= 1)).all()):
        raise ValueError("skip thresholds must be numbers from 0 to 1")
    return checked


def thresholds_in_config(config: Any, layers: int, top_k: int) -> Tensor | None:
    """Thresholds stored in a model's config: ours under ``moe_ext``, or the ``betas`` of NAEE's published code.

    Returns:
        (L, K - 1) float32, or None if the config has none.

    Raises:
        ValueError: what is stored does not fit the model.
    """
    ours = section_of(config)
    if ours is not None:
        if not isinstance(ours, dict):
            raise ValueError(f"config.{CONFIG_KEY} is {ours!r}; expected a dict")
        if THRESHOLDS_KEY in ours:
            return check_thresholds(ours[THRESHOLDS_KEY], layers, top_k)
    betas = getattr(config.get_text_config(decoder=True), "betas", getattr(config, "betas", None))
    if betas is None:
        return None
    if not isinstance(betas, dict) or {str(key) for key in betas} != {str(layer) for layer in range(layers)}:
        raise ValueError(f"config.betas is {betas!r}; expected a dict with the keys '0' to '{layers - 1}'")
    by_layer = {int(key): float(value) for key, value in betas.items()}
    return check_thresholds([[by_layer[layer]] for layer in range(layers)], layers, top_k)


def section_with(thresholds: Tensor, section: dict[str, Any] | None) -> dict[str, Any]:
    """A config's ``moe_ext`` section with thresholds (L, K - 1) in it, whatever else it holds kept."""
    return {**(section or {}), THRESHOLDS_KEY: thresholds.tolist()}
