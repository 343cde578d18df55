"""What does not fit between a checkpoint and its model, with names: transformers fills in random numbers."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from moe_ext.checkpoints.stored_tensors import CheckpointError

_NAMES = 3  # a message names no more tensors
_LENGTH = 100  # and no more of a name


def few(names: Collection[str]) -> str:
    """How many names, and the first of them in the order of their numbers."""
    shown = sorted(names, key=lambda name: [part.zfill(9) for part in re.split(r"(\d+)", name)])[:_NAMES]
    listed = ", ".join(name if len(name) <= _LENGTH else f"{name[:_LENGTH]}..." for name in shown)
    return f"{len(names)} tensors, {'such as ' if len(names) > _NAMES else ''}{listed}"


def check_loaded(
    checkpoint: object,
    missing: Collection[str],
    mismatched: Iterable[tuple[str, Any, Any]] = (),
    errors: Mapping[str, str] | None = None,
    *,
    allowed: bool = False,
) -> None:
    """CheckpointError if the checkpoint lacks tensors or has others than the model needs; a warning if that is allowed.

    Args:
        missing: names of the model's tensors that the checkpoint does not hold.
        mismatched: name, shape in the checkpoint and shape in the model.
        errors: name of a tensor that could not be made of the checkpoint's to the reason.
        allowed: whether they are filled with random numbers.
    """
    found = []
    shapes = {name: f"{name} has shape {tuple(held)}, expected {tuple(needed)}" for name, held, needed in mismatched}
    broken = {name: reason.strip().splitlines()[-1][:_LENGTH] for name, reason in (errors or {}).items()}
    if lacking := set(missing) - broken.keys():
        found.append(f"lacks {few(lacking)}")
    if shapes:
        found.append(f"has other shapes than the model: {few(list(shapes.values()))}")
    if broken:
        name = min(broken)
        found.append(f"holds parts that do not fit together: {few(broken.keys())} ({broken[name]})")
    if not found:
        return
    message = f"{checkpoint} {'; it '.join(found)}"
    if not allowed:
        raise CheckpointError(f"{message}. allow_missing=True (--allow-missing) fills them with random numbers")
    warnings.warn(f"{message}: filled with random numbers", stacklevel=3)


def say_ignored(checkpoint: object, names: Collection[str]) -> None:
    """A warning that names tensors of a checkpoint which the model has no place for."""
    if names:
        warnings.warn(f"{checkpoint}: the model has no place for {few(names)}: ignored", stacklevel=3)
