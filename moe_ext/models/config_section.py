"""The ``moe_ext`` section of a model's config: skip thresholds, the gate scale, experts left beside means, and numbers
of experts that differ between layers.

It is in the part of the text decoder, which every class has that loads the checkpoint.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from moe_ext.storage.formats import shortened, shown

CONFIG_KEY = "moe_ext"
LEFT_KEY = "experts_left"
"""Entry of a config's ``moe_ext`` section: decoder layer (as a string) to its number of experts beside the means."""
COUNTS_KEY = "num_experts"
"""Entry of a config's ``moe_ext`` section: decoder layer (as a string) to its number of experts, of layers that differ
where the family has no other place for that. The family's own field then holds the largest."""


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
    return _numbers_by_layer(section, LEFT_KEY, layers)


def counts_in_section(section: object, layers: int) -> dict[int, int]:
    """What a config's ``moe_ext`` section says of different numbers of experts, by decoder layer; empty if nothing.

    Raises:
        ValueError: as :func:`experts_left`.
    """
    return _numbers_by_layer(section, COUNTS_KEY, layers)


def section_with_counts(counts: Mapping[int, int], section: dict[str, Any] | None) -> dict[str, Any] | None:
    """A config's ``moe_ext`` section with those numbers of experts by decoder layer, or with none if there are none;
    whatever else it holds kept. None if that is nothing."""
    rest = {name: value for name, value in (section or {}).items() if name != COUNTS_KEY}
    if counts:
        rest[COUNTS_KEY] = {str(layer): count for layer, count in counts.items()}
    return rest or None


def _numbers_by_layer(section: object, key: str, layers: int) -> dict[int, int]:
    stored = section.get(key) if isinstance(section, dict) else None
    if stored is None:
        return {}
    if not isinstance(stored, dict) or not all(
        re.fullmatch("[0-9]{1,6}", layer) and int(layer) < layers and type(count) is int and count > 0
        for layer, count in stored.items()
    ):
        raise ValueError(f"config.moe_ext.{key} is {shown(stored)}; expected layers with their numbers of experts")
    return {int(layer): count for layer, count in stored.items()}


GateScale = Literal["kept", "none"] | int
"""What becomes of a token's routing weights when some of its experts are skipped, or fewer are chosen than were in
training. "kept": those that are kept sum to what all K summed to. "none": they stay as they are. K2: they are softmax
values over the sum of the K2 largest (arXiv 2609.04575)."""

SCALE_KEY = "renormalise"


def scale_in_config(config: Any) -> GateScale:
    """The gate scale that a model's config holds; "kept" if it holds none.

    Raises:
        ValueError: it holds something else.
    """
    section = section_of(config)
    stored = section.get(SCALE_KEY, "kept") if isinstance(section, dict) else "kept"
    if not is_scale(stored):
        raise ValueError(
            f"config.{CONFIG_KEY}.{SCALE_KEY} is {shown(stored)}; expected 'kept', 'none' or a number of experts"
        )
    return stored


def is_scale(value: object) -> TypeGuard[GateScale]:
    """Whether it is a :data:`GateScale`."""
    return value in ("kept", "none") if isinstance(value, str) else type(value) is int and value > 0


def section_with_scale(scale: GateScale, section: dict[str, Any] | None) -> dict[str, Any] | None:
    """A config's ``moe_ext`` section with that gate scale in it, whatever else it holds kept; None if that is nothing.
    "kept" is what readers take where none is named."""
    rest = {name: value for name, value in (section or {}).items() if name != SCALE_KEY}
    if scale != "kept":
        rest[SCALE_KEY] = scale
    return rest or None


THRESHOLDS_KEY = "skip_thresholds"


def check_thresholds(thresholds: Tensor | Sequence[Sequence[float]], layers: int, top_k: int) -> Tensor:
    """Thresholds as a (L, K - 1) float32 tensor on the CPU.

    Raises:
        ValueError: wrong shape, or a value that is not a finite number in [0, 1].
    """
    try:
        checked = torch.as_tensor(thresholds, dtype=torch.float32, device="cpu").detach().clone()
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"skip thresholds are {shown(thresholds)}; expected a table of numbers") from None
    if tuple(checked.shape) != (layers, top_k - 1):
        raise ValueError(
            f"skip thresholds have shape {tuple(checked.shape)}; "
            f"expected {(layers, top_k - 1)} = (MoE layers, top_k - 1)"
        )
    if not bool(((checked >= 0) & (checked <= 1)).all()):
        raise ValueError("skip thresholds must be numbers from 0 to 1")
    return checked


def thresholds_in_config(config: Any, layers: Sequence[int], top_k: int) -> Tensor | None:
    """Thresholds stored in a model's config: ours under ``moe_ext``, by decoder layer or, in an older form, in a list
    of the MoE layers; or the ``betas`` of NAEE's published code.

    Args:
        layers: decoder layers of the model's L MoE layers.

    Returns:
        (L, K - 1) float32, or None if the config has none.

    Raises:
        ValueError: what is stored does not fit the model.
    """
    ours = section_of(config)
    if ours is not None:
        if not isinstance(ours, dict):
            raise ValueError(f"config.{CONFIG_KEY} is {shown(ours)}; expected a dict")
        if THRESHOLDS_KEY in ours:
            stored = ours[THRESHOLDS_KEY]
            if isinstance(stored, dict):
                stored = _by_layer(f"{CONFIG_KEY}.{THRESHOLDS_KEY}", stored, layers)
            if not isinstance(stored, list) or not all(isinstance(row, list) and _numbers(row) for row in stored):
                raise ValueError(
                    f"config.{CONFIG_KEY}.{THRESHOLDS_KEY} is {shown(stored)}; expected lists of numbers by layer"
                )
            return check_thresholds(stored, len(layers), top_k)
    betas = getattr(config.get_text_config(decoder=True), "betas", getattr(config, "betas", None))
    if betas is None:
        return None
    rows = _by_layer("betas", betas, range(len(layers)))
    if not _numbers(rows):
        raise ValueError(f"config.betas is {shown(betas)}; expected numbers")
    return check_thresholds([[value] for value in rows], len(layers), top_k)


def _by_layer(name: str, stored: object, layers: Sequence[int]) -> list[Any]:
    """The values of a dict whose keys are the layers, in their order; ValueError for anything else."""
    if not isinstance(stored, dict) or {str(key) for key in stored} != {str(layer) for layer in layers}:
        expected = ", ".join(map(str, layers))
        raise ValueError(f"config.{name} is {shown(stored)}; expected a dict with the keys {shortened(expected, 80)}")
    values = {str(key): value for key, value in stored.items()}
    return [values[str(layer)] for layer in layers]


def _numbers(values: Sequence[object]) -> bool:
    return all(type(value) in (int, float) for value in values)


def section_with(thresholds: Tensor, section: dict[str, Any] | None, layers: Sequence[int]) -> dict[str, Any]:
    """A config's ``moe_ext`` section with thresholds (L, K - 1) of those decoder layers in it, whatever else it holds
    kept."""
    by_layer = {str(layer): row for layer, row in zip(layers, thresholds.tolist(), strict=True)}
    return {**(section or {}), THRESHOLDS_KEY: by_layer}
