"""Puts the parts in their places: vLLM's doors for plugins, and two functions of vLLM's where it has none."""

import os

from vllm import envs
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader import base_loader
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.models import utils as model_utils

from moe_ext_vllm import SWITCH, __version__, counts, library
from moe_ext_vllm.experts import ON_CUDA, MoeExtMethod
from moe_ext_vllm.layers import make_layers
from moe_ext_vllm.model import initialize_model
from moe_ext_vllm.runner import SkippingRoutedExperts, SkippingRunner

_SETTINGS = (library.VARIABLE, ON_CUDA, counts.VARIABLE)
_installed = False


def install() -> None:
    """Once a process; a second call does nothing.

    Raises:
        RuntimeError: another plugin has taken a place.
        OSError: the library that is named cannot be loaded.
    """
    global _installed
    if _installed:
        return
    _installed = True
    library.load()  # a file that is named and cannot be loaded is an error now, not amid a model
    for theirs, ours in (
        (MoERunner, SkippingRunner),
        (RoutedExperts, SkippingRoutedExperts),
        (UnquantizedFusedMoEMethod, MoeExtMethod),
    ):
        try:
            theirs.register_oot(ours, name=theirs.__name__)
        except AssertionError:
            raise RuntimeError(
                f"another plugin has put its own class in the place of vLLM's {theirs.__name__}: moe_ext_vllm cannot "
                "work beside it. VLLM_PLUGINS chooses plugins; MOE_EXT_VLLM=0 leaves this one out."
            ) from None
    # No doors here. Modules take these two by name when they are imported, and models are imported after plugins.
    model_utils.make_layers = make_layers
    loader_utils.initialize_model = initialize_model
    base_loader.initialize_model = initialize_model
    # Compiled graphs are kept by the values of these: none that was made without the plugin is used with it.
    envs.environment_variables[SWITCH] = lambda: " ".join(
        [__version__, *(f"{name}={os.environ.get(name)}" for name in _SETTINGS)]
    )
