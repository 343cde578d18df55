"""Checkpoint folders of tests: their tensors, edited and replaced, and float8 ones as DeepSeek-V3 is published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moe_ext.checkpoints.stored_tensors import INDEX

BLOCK = 16  # rows and columns of a weight that share a scale; the last block is smaller where they do not divide


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewritten(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The folder's weights, edited, in one file."""
    tensors = tensors_in(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def dequantised(tensors: dict[str, torch.Tensor], block: int = BLOCK) -> dict[str, torch.Tensor]:
    """What float8 tensors stand for, in bfloat16."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scales = tensors[f"{name}_scale_inv"].repeat_interleave(block, -2).repeat_interleave(block, -1)
            tensor = (tensor.float() * scales[..., : tensor.shape[-2], : tensor.shape[-1]]).bfloat16()
        found[name] = tensor
    return found


def declare_float8(folder: Path, block: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))


def quantise(tensors: dict[str, torch.Tensor], block: int = BLOCK) -> None:
    """Projections become float8 with random scales, in place."""
    for name, tensor in list(tensors.items()):
        if "_proj" in name and tensor.dim() > 1:
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            blocks = [-(-size // block) for size in tensor.shape[-2:]]
            tensors[f"{name}_scale_inv"] = torch.rand(*tensor.shape[:-2], *blocks) + 0.5


def plain_copy(source: Path, folder: Path, block: int = BLOCK) -> None:
    """A float8 folder as one in bfloat16."""
    shutil.copytree(source, folder)
    values = dequantised(tensors_in(source), block)
    for file in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
