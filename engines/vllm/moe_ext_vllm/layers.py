"""Decoder layers that differ: each is built from its own values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.models import utils

from moe_ext_vllm.checkpoint import read

_SPEC = "_heterogeneity_spec"  # where transformers keeps what differs; a config without it is read as any other

_make_layers = utils.make_layers


def make_layers(num_hidden_layers: int, layer_fn: Any, prefix: str) -> Any:
    """vLLM's function; a layer under construction finds its own numbers of experts and widths in the global fields."""
    model_config = get_current_vllm_config().model_config
    if model_config is None or not read(model_config).unequal:
        return _make_layers(num_hidden_layers, layer_fn, prefix)
    config = model_config.hf_text_config
    if num_hidden_layers != config.num_hidden_layers:  # layers of something else, such as an encoder of images
        return _make_layers(num_hidden_layers, layer_fn, prefix)

    def built_from_its_own(prefix: str) -> Any:
        with _as_in_layer(config, utils.extract_layer_index(prefix)):
            return layer_fn(prefix=prefix)

    return _make_layers(num_hidden_layers, built_from_its_own, prefix)


@contextmanager
def _as_in_layer(config: Any, layer: int) -> Iterator[None]:
    """Within the ``with`` block a config is that of one layer; afterwards, one whose layers differ again, which raises
    an error where a differing field is asked for."""
    own = config.per_layer_config[layer]
    values = {name: getattr(own, name) for name in config.per_layer_attributes}
    before = dict(config.__dict__)
    del config.__dict__[_SPEC]
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name in values:
            stored = config.attribute_map.get(name, name)
            if stored in before:
                config.__dict__[stored] = before[stored]
            else:  # a default of its class
                config.__dict__.pop(stored, None)
        config.__dict__[_SPEC] = before[_SPEC]
