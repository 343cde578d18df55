"""Decoding through ``torch.compile``: one graph for the step that makes a token, on a cache of fixed length.

Beside the experts, a step of a batch of one is torch's small operations, some thirty a decoder layer, and products of
dense weights, keys and values with one row. Compiled, the former are a few loops, and the latter run at the speed of
memory (:mod:`moe_ext.runtime.one_row`). transformers compiles decoding by itself on GPUs only, and tells nobody when it
does not: here the step is compiled before it is needed, and what stands against it is an error.
"""

import math
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from moe_ext.models.blocks import evaluation_mode, input_device
from moe_ext.models.wrapped import unwrapped


def compile_decoding(model: PreTrainedModel, length: int, batch_size: int = 1) -> dict[str, Any]:
    """Compiles the step with which a model decodes, and returns the arguments with which ``generate`` takes it.

    The step belongs to a cache of ``length`` tokens, which attention reads whole: as long as it has to be, and the same
    for prompts that are to share it. Another length or batch size is compiled when it comes. What was compiled before
    lies in torch's cache on the disk and takes a fraction of the time. Compiled sums are in another order: results
    may differ from uncompiled ones in the last bits.

    Args:
        model: a patched model in memory; of its families those that transformers decodes with a static cache.
        length: tokens of prompt and continuation together, at least 4.
        batch_size: sequences.

    Returns:
        Keyword arguments for ``model.generate``, beside those that say how many tokens there are to be.

    Raises:
        TypeError: not a transformers model that generates.
        ValueError: ``length`` or ``batch_size`` is too small, transformers has no static cache for the model, or one
            that changes with every token.
        RuntimeError: torch cannot compile the step: there is no C++ compiler, or the model's code is not one graph.
    """
    inside = unwrapped(model)
    if not hasattr(inside, "generate"):
        raise TypeError(f"model is a {type(inside).__name__}; expected a transformers model that generates")
    for name, value, least in (("length", length, 4), ("batch_size", batch_size, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}; expected a whole number of {least} or more")
    config = _compile_config()
    options = {"cache_implementation": "static", "max_cache_len": length, "compile_config": config}
    prompt = torch.ones(batch_size, 1, dtype=torch.int64, device=input_device(inside))
    plain = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    inputs = {"inputs": prompt, "attention_mask": torch.ones_like(prompt), **plain}
    name = type(inside).__name__
    try:
        with evaluation_mode(inside):
            # The first token comes from the prompt, uncompiled; the second from the step.
            inside.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **options)
            if getattr(inside, "_last_compile_config", None) != config:
                raise ValueError(
                    f"{name}: transformers does not compile its decoding: it has no static cache for it, or the model "
                    "is offloaded"
                )
            with torch.compiler.set_stance("fail_on_recompile"):
                inside.generate(**inputs, max_new_tokens=3, min_new_tokens=3, **options)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise RuntimeError(f"{name}: decoding cannot be compiled: {_reason(error)}") from error
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        raise ValueError(
            f"{name}: every token would be compiled anew: its static cache is not the same for all (sliding windows)"
        ) from error
    return options


def tokens_that_repay(model: PreTrainedModel) -> int:
    """New tokens of a batch of one from about which on compiling costs less time than it saves, by rule of thumb.

    Compiling takes 15 seconds and 2 a decoder layer. A token saves half a millisecond a decoder layer, and the
    difference between 5 and 15 GB/s for the weights that are not experts'. Nothing is timed: what is computed must not
    depend on it.
    """
    inside = unwrapped(model)
    config: Any = inside.config.get_text_config(decoder=True)
    layers = int(config.num_hidden_layers)
    dense = sum(tensor.nbytes for name, tensor in inside.named_parameters() if ".experts." not in name)
    embeddings = inside.get_input_embeddings()
    if embeddings is not None and not getattr(config, "tie_word_embeddings", False):
        dense -= embeddings.weight.nbytes  # of which a token reads a row
    saved = 0.5e-3 * layers + dense * (1 / 5e9 - 1 / 15e9)
    return math.ceil((15 + 2 * layers) / saved)


def _compile_config() -> CompileConfig:
    # Without graph breaks: a break at every layer would cost more than compiling saves.
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, options=_options())
    config._compile_all_devices = True  # CPUs too
    return config


def _options() -> dict[str, Any]:
    from moe_ext.runtime.one_row import OneRow  # inductor takes a second to import

    return {"post_grad_custom_pre_pass": OneRow()}


def _reason(error: BaseException) -> str:
    """The first lines of what torch says, without what it advises its own developers."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    inner = getattr(error, "inner_exception", error)
    if isinstance(inner, InvalidCxxCompiler):
        return (
            "on the CPU torch.compile needs a C++ compiler at run time, and there is none (Debian: apt install g++; "
            "or CXX=... names one)"
        )
    if isinstance(inner, CppCompileError):
        return f"the C++ compiler failed: {inner.output.strip()[:500]}"
    return f"{type(inner).__name__}: {str(inner).strip().split(chr(10) + chr(10))[0]}"
