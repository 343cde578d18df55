"""moe_ext's compiled operators, loaded without its Python."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VARIABLE = "MOE_EXT_VLLM_LIBRARY"
"""Environment variable: the file of the operators, ``_C*.so``; empty to run vLLM's own kernels."""


def load() -> str | None:
    """Registers ``torch.ops.moe_ext``; None, or why its kernels are not used.

    The file is the one that :data:`VARIABLE` names, otherwise that of an installed moe_ext. moe_ext itself is not
    imported: it wants a later transformers than vLLM does (``pip install --no-deps moe_ext`` is enough).

    Raises:
        OSError: the named file cannot be loaded.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        if not named:
            return f"{VARIABLE} is empty"
        path = Path(named)
    else:
        spec = find_spec("moe_ext")
        found = sorted(Path(folder) for folder in (spec.submodule_search_locations or ()) if spec) if spec else []
        files = [file for folder in found for file in sorted(folder.glob("_C*.so"))]
        if not files:
            return f"no moe_ext is installed beside vLLM, and {VARIABLE} names none"
        path = files[0]
    if not hasattr(torch.ops.moe_ext, "experts"):
        torch.ops.load_library(str(path))
        torch.library.register_fake("moe_ext::experts", _shape_of_experts)
    return None


def _shape_of_experts(x: Tensor, *others: Any, **options: Any) -> Tensor:
    """(T, H), whatever options the operator has got since."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
