"""Experts that transformers itself holds quantised in memory, for kernels of its own."""

from torch import nn

_CLASSES = {"FP8Experts": "float8 or packed four-bit weights", "Mxfp4GptOssExperts": "MXFP4 weights"}


def check_not_quantised(name: str, experts: nn.Module) -> None:
    """ValueError, beginning with ``name``, if an experts module is one of transformers' quantised ones: their kernels
    keep copies, scales and layouts beside the weights, which would not fit what is left of these."""
    for parent in type(experts).__mro__:
        if parent.__name__ in _CLASSES and parent.__module__.startswith("transformers.integrations."):
            raise ValueError(
                f"{name}: {parent.__name__} holds {_CLASSES[parent.__name__]} for transformers' own kernels, which "
                "moe_ext does not change or run in memory; give the checkpoint folder instead, or load it with "
                "quantization_config=...(dequantize=True)"
            )
