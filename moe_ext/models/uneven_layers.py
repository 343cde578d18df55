"""Builds models whose decoder layers differ, which stock transformers does not: each from its own config."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

from torch import nn
from transformers import MODEL_MAPPING
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_ext.models.config_section import experts_left, section_of
from moe_ext.models.novices import make_room

_ALLOWED = "allow_global_per_layer_attribute_access"  # property of transformers' configs


def built_by_class(config: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` builds from a config, also where layers differ or have means in the place of experts, by the
    family's classes (:func:`moe_ext.models.own_counts.built` knows our section's numbers, too).

    For such a config the family's layer and config classes are changed while ``make`` runs: build one model at a time.

    Raises:
        ValueError: such a config of a family whose decoder layers cannot be told, or a wrong ``config.moe_ext``.
    """
    text = config.get_text_config(decoder=True)
    left = experts_left(section_of(config), text.num_hidden_layers)
    if not text.is_heterogeneous and not left:
        return make()
    with _layers_built_one_by_one(text, left):
        return make()


@contextmanager
def _layers_built_one_by_one(config: Any, left: dict[int, int]) -> Iterator[None]:
    """Decoder layers of the config's family that are built inside the ``with`` block read ``per_layer_config``, and
    have ``left[layer]`` experts beside means; the rest of the model may read the global fields."""
    classes = _decoder_layers(config)
    if not classes:
        raise ValueError(
            f"the decoder layers of model type {config.model_type!r} cannot be told from its modeling code, or do not "
            "know which layer they are: their numbers of experts cannot differ"
        )
    originals = [cls.__init__ for cls in classes]
    for cls, original in zip(classes, originals, strict=True):
        cls.__init__ = _built_from_its_own_config(original, left, type(config))
    within = _ALLOWED in vars(type(config))  # another one is being built
    setattr(type(config), _ALLOWED, True)  # language model heads keep a copy of the global count
    try:
        yield
    finally:
        if not within:
            delattr(type(config), _ALLOWED)  # the property of the base class again
        for cls, original in zip(classes, originals, strict=True):
            cls.__init__ = original


def _decoder_layers(config: Any) -> list[Any]:
    """The classes of a family's decoder layers that are built with a config and their index."""
    base = MODEL_MAPPING.get(type(config), None)
    # Configs of a part of a model are in no such table; their modeling code is beside them.
    name = type(config).__module__.replace(".configuration_", ".modeling_") if base is None else base.__module__
    if name not in sys.modules and name.startswith("transformers.models."):
        import_module(name)
    return [
        cls
        for key, cls in (vars(sys.modules[name]) if name in sys.modules else {}).items()
        if inspect.isclass(cls)
        and issubclass(cls, nn.Module)
        and (issubclass(cls, GradientCheckpointingLayer) or key.endswith("Layer"))
        and {"config", "layer_idx"} <= set(inspect.signature(cls.__init__).parameters)
    ]


def _built_from_its_own_config(original: Any, left: dict[int, int], kind: type) -> Any:
    @wraps(original)
    def build(self: nn.Module, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        own = config.per_layer_config[layer_idx]
        original(self, own, layer_idx, *args, **kwargs)
        if layer_idx in left and isinstance(config, kind):  # layers of images and sound have numbers of their own
            make_room(self, left[layer_idx])
        # One config for all from here on: implementations of attention and experts are chosen there.
        for module in self.modules():
            if getattr(module, "config", None) is own:
                module.config = config

    return build
