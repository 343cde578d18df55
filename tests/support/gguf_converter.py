"""GGUF files as llama.cpp's converter makes them of a folder: names by llama.cpp's own table, and of its conversion/
what it does with the numbers, which it moves and never changes."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import PreTrainedModel

from tests.support import every_family, families
from tests.support.checkpoints import rewritten, tensors_in
from tests.support.gguf_files import Tensors, write_gguf

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..*)")

SHARED: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16}
EXPERTS = {"intermediate_size": 64}
BOTH = {"intermediate_size": 64, "moe_intermediate_size": 64}  # their first layer is dense
LATENT = {**BOTH, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "head_dim": 4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "short_mscale": 1.1,
    "long_mscale": 1.2,
    "original_max_position_embeddings": 4096,
}


def _add_factors(held: Tensors) -> None:
    """What llama.cpp's converter computes from the config."""
    for length in ("long", "short"):
        held[f"rope_factors_{length}.weight"] = (numpy.ones(8, numpy.float32), Kind.F32)


FAMILIES: dict[str, tuple[gguf.MODEL_ARCH, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (gguf.MODEL_ARCH.LLAMA, EXPERTS, {}),
    "qwen2_moe": (
        gguf.MODEL_ARCH.QWEN2MOE,
        {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 32, "mlp_only_layers": []},
        {},
    ),
    "qwen3_moe": (gguf.MODEL_ARCH.QWEN3MOE, {"moe_intermediate_size": 64}, {}),
    "olmoe": (gguf.MODEL_ARCH.OLMOE, EXPERTS, {}),
    "glm4_moe": (gguf.MODEL_ARCH.GLM4_MOE, {**BOTH, "use_qk_norm": True, "num_nextn_predict_layers": 1},
                 {"further": 1}),
    "dots1": (gguf.MODEL_ARCH.DOTS1, BOTH, {}),
    "ernie4_5_moe": (gguf.MODEL_ARCH.ERNIE4_5_MOE, BOTH, {}),
    "gpt_oss": (gguf.MODEL_ARCH.GPT_OSS, EXPERTS, {}),
    "deepseek_v2": (gguf.MODEL_ARCH.DEEPSEEK2, {**LATENT, "q_lora_rank": None}, {"whole": True}),
    "deepseek_v3": (gguf.MODEL_ARCH.DEEPSEEK2, LATENT, {}),
    "glm4_moe_lite": (gguf.MODEL_ARCH.DEEPSEEK2, {**LATENT, "mlp_layer_types": ["dense", "sparse"]}, {"further": 1}),
    "minimax_m2": (gguf.MODEL_ARCH.MINIMAXM2, {**EXPERTS, "rotary_dim": 8}, {}),
    "granitemoe": (gguf.MODEL_ARCH.GRANITE_MOE, EXPERTS, {}),
    "phimoe": (
        gguf.MODEL_ARCH.PHIMOE,
        {**EXPERTS, "attention_bias": True, "lm_head_bias": True, "rope_parameters": LONG},
        {"change": _add_factors},
    ),
    "afmoe": (gguf.MODEL_ARCH.AFMOE, {**BOTH, "num_dense_layers": 1}, {}),
    "exaone_moe": (gguf.MODEL_ARCH.EXAONE_MOE, {**BOTH, "mlp_layer_types": ["dense", "sparse"]}, {}),
    "lfm2_moe": (gguf.MODEL_ARCH.LFM2MOE, {**BOTH, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
                 {}),
}  # fmt: skip
"""Of each family llama.cpp's architecture, fields of the config, and how the converter is called."""


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    make = families.build if family in families.ALL else every_family.build
    return make(family, **{**SHARED, **FAMILIES[family][1], **changes})


def convert(
    model: PreTrainedModel,
    architecture: gguf.MODEL_ARCH,
    kind_of: Callable[[str], Kind],
    folder: Path,
    *,
    further: int = 0,
    split: int = 0,
    whole: bool = False,
    change: Callable[[Tensors], object] = lambda held: None,
) -> tuple[Path, Path]:
    """Writes a model as a folder and as a folder with a GGUF file, and returns their paths. The first then holds what
    the types of the second have left of the weights.

    Args:
        kind_of: the type of a tensor of two dimensions and more, by its name.
        further: layers for multi-token prediction in the file, of which transformers has nothing.
        split: tensors of a file; 0: all in one.
        whole: as older converters, which left latent attention's kv_b in one piece.
        change: changes the file's tensors in place.
    """
    plain, source = folder / "plain", folder / "source"
    model.config.dtype = "float32"
    model.save_pretrained(plain)
    config = model.config
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    held: Tensors = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, parts in _stacked(tensors).items():
            tensor = torch.stack(parts) if len(parts) > 1 else parts[0]
            # Where each number of the file comes from.
            indices = _moved(name, torch.arange(tensor.numel()).view(tensor.shape), config, whole)
            rounded = tensor.flatten()
            for moved, places in indices.items():
                stem, _, end = moved.rpartition(".")
                base = table.get_name(stem) or table.get_name(stem.removeprefix("model."))
                assert base is not None, moved
                as_it_is = places.dim() < 2 or end == "bias" or "ffn_gate_inp" in base or "conv" in base
                held_as = Kind.F32 if as_it_is else kind_of(base)
                blocks = quantize(tensor.flatten()[places].contiguous().numpy(), held_as)
                held[f"{base}.{end}"] = (blocks, held_as)
                rounded[places] = torch.from_numpy(dequantize(blocks, held_as)).view(places.shape)
            for part, numbers in zip(parts, rounded.view(tensor.shape) if len(parts) > 1 else [rounded], strict=True):
                part.copy_(numbers.view(part.shape))

    rewritten(plain, edit)
    source.mkdir()
    shutil.copy(plain / "config.json", source)
    layers = config.num_hidden_layers
    for layer in range(layers, layers + further):
        for name, shape in (("nextn.eh_proj", (64, 128)), ("ffn_gate_exps", (8, 64, 64))):
            held[f"blk.{layer}.{name}.weight"] = (torch.zeros(shape).numpy(), Kind.F32)
    counts = {"block_count": layers + further, "expert_count": 8, "expert_used_count": 2}
    counts |= {"nextn_predict_layers": further} if further else {}
    change(held)
    name = gguf.MODEL_ARCH_NAMES[architecture]
    fields = {f"{name}.{field}": (number, gguf.GGUFValueType.UINT32) for field, number in counts.items()}
    write_gguf(source / "model.gguf", held, fields, architecture=name, split=split)
    return plain, source


def differing(model: PreTrainedModel, plain: Path, folder: Path) -> int:
    """How many of a folder's tensors differ from those of the model."""
    model.save_pretrained(folder)
    before = tensors_in(folder)
    return sum(not torch.equal(tensor, before[name]) for name, tensor in tensors_in(plain).items())


def _stacked(tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Tensors that the converter takes as one: those of a layer's experts, in order."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        stem, number = (f"{match[1]}{match[3]}", int(match[2])) if match is not None else (name, 0)
        found.setdefault(stem, {})[number] = tensor
    return {name: [parts[number] for number in sorted(parts)] for name, parts in found.items()}


def _moved(name: str, tensor: Tensor, config: Any, whole: bool) -> dict[str, Tensor]:
    """What the converter makes of a tensor, by the names that its table knows."""
    name = re.sub(r"(?<=e_score_correction)_bias$|(?<=expert_bias)$", ".bias", name)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    found = {name: tensor}
    if config.model_type in ("mixtral", "granitemoe") and heads is not None:  # the halves of a head take turns
        found = {name: tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)}
    elif name.endswith("kv_b_proj.weight") and not whole:
        keys = config.qk_nope_head_dim
        both = tensor.unflatten(0, (-1, keys + config.v_head_dim))
        found = {
            name.replace("kv_b_proj", "k_b_proj"): both[:, :keys].transpose(1, 2),
            name.replace("kv_b_proj", "v_b_proj"): both[:, keys:],
        }
    elif name.endswith("block_sparse_moe.input_linear.weight"):
        stem, half = name.removesuffix("input_linear.weight"), config.intermediate_size
        found = {f"{stem}experts.w1.weight": tensor[:, :half], f"{stem}experts.w3.weight": tensor[:, half:]}
    elif name.endswith("sinks"):
        found = {f"{name}.weight": tensor}
    elif config.model_type == "gpt_oss" and ".experts." in name:
        stem, end = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
        rows = tensor.transpose(1, 2) if end == "weight" else tensor
        found = {f"{stem}.{end}": rows}
        if stem.endswith("gate_up_proj"):  # rows of the two take turns
            found = {
                f"{stem.replace('gate_up_proj', part)}.{end}": rows[:, first::2]
                for first, part in enumerate(("gate_proj", "up_proj"))
            }
    return {key: moved.squeeze() for key, moved in found.items()}
