"""A GGUF file as the weights of a model that a folder describes: ``config.json``, a tokenizer, and the file.

llama.cpp's tensors get the names of the Hub's layout, an expert's projections one by one, so that they go the way of
every other folder; each becomes numbers when its layer is loaded, by llama.cpp's own ``gguf`` package.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ext.checkpoints.gguf_file import GgufFile, GgufTensor, read_gguf
from moe_ext.checkpoints.quantised_weight import Piece, QuantisedWeight
from moe_ext.checkpoints.stored_tensors import INDEX, SINGLE, CheckpointError, StoredTensor

FORMAT = "GGUF"
_ENDS = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_SEVERAL_SHARED = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_EXPERTS = {"ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
            "ffn_down_exps": "mlp.experts.{}.down_proj"}  # fmt: skip
_MIXTRAL_EXPERTS = {"ffn_gate_exps": "block_sparse_moe.experts.{}.w1", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
                    "ffn_down_exps": "block_sparse_moe.experts.{}.w2"}  # fmt: skip
# Where an architecture's names are not those above.
_OTHER_NAMES: dict[str, dict[str, str]] = {
    "llama": {"ffn_gate_inp": "block_sparse_moe.gate"},
    "glm4moe": {**_SEVERAL_SHARED, "post_attention_norm": "post_attention_layernorm"},
    "dots1": _SEVERAL_SHARED,
    "ernie4_5-moe": _SEVERAL_SHARED,
}
_CORRECTION = {
    "glm4moe": "mlp.gate.e_score_correction_bias",
    "dots1": "mlp.gate.e_score_correction_bias",
    "ernie4_5-moe": "mlp.moe_statics.e_score_correction_bias",
}
# llama.cpp's architecture by transformers' model type, for those whose tensors were compared.
_ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "glm4_moe": "glm4moe",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
}
_COMPUTED = re.compile(r"rope_freqs\.weight|.*\.rope_freqs\.weight")
"""What llama.cpp computes from the config and stores."""


def gguf_in(folder: Path) -> GgufFile | None:
    """The one GGUF file, or split set, of a folder without other weights; None if there is none.

    Raises:
        CheckpointError: there are several, or it is not whole.
    """
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        return None
    files = sorted(file for file in folder.glob("*.gguf") if not file.name.startswith("mmproj"))
    if not files:
        return None
    found = read_gguf(files[0])
    if set(found.files) != set(files):
        raise CheckpointError(f"{folder}: holds {len(files)} GGUF files; expected one, or one split set")
    return found


def gguf_pieces(folder: object, source: GgufFile) -> dict[str, StoredTensor]:
    """The bytes of each weight, by names of their own; errors as for :func:`gguf_weights`."""
    pieces = [piece for tensor in _of_model(source) for _, _, piece in _places(folder, tensor, source.architecture)]
    return {piece.name: piece for piece in pieces}


def gguf_weights(folder: object, source: GgufFile, config: Any) -> dict[str, QuantisedWeight]:
    """The weights by the Hub's names.

    Args:
        source: the file.
        config: the model's.

    Raises:
        ValueError: the file's architecture is not that of the config, or not one that is read; a tensor of it has no
            known place.
    """
    text = config.get_text_config(decoder=True)
    expected = _ARCHITECTURES.get(text.model_type)
    if expected is None or source.architecture != expected:
        raise ValueError(
            f"{folder}: statistics of a GGUF file are made for {', '.join(_ARCHITECTURES)}; the config is of "
            f"{text.model_type!r} and the file of {source.architecture!r}. Make them of the original model's folder"
        )
    weights = {}
    for tensor in _of_model(source):
        heads = _heads(tensor.name, text) if expected == "llama" else None
        read = partial(_dequantised, kind=tensor.kind, heads=heads)
        for name, shape, piece in _places(folder, tensor, expected):
            weights[name] = QuantisedWeight(name, shape, {piece.name: Piece("blocks", (None,))}, read)
    return weights


def _of_model(source: GgufFile) -> list[GgufTensor]:
    """The file's tensors, without those of layers for multi-token prediction, which transformers leaves out too."""
    if source.own("nextn_predict_layers") not in source.fields:
        return list(source.tensors.values())
    last, layer = source.layers, re.compile(r"blk\.(\d+)\.")
    return [
        tensor
        for name, tensor in source.tensors.items()
        if (number := layer.match(name)) is None or int(number[1]) < last
    ]


def _places(folder: object, tensor: GgufTensor, architecture: str) -> list[tuple[str, tuple[int, ...], StoredTensor]]:
    """Name, shape and bytes of the weights that a tensor holds: one, or one an expert."""
    if _COMPUTED.fullmatch(tensor.name):
        return []
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
    layer, base, kind = match.groups() if match is not None else (None, "", "")
    experts = _MIXTRAL_EXPERTS if architecture == "llama" else _EXPERTS
    if layer is not None and base in experts and kind == "weight" and len(tensor.shape) == 3:
        size = tensor.size // tensor.shape[0]
        names = [f"model.layers.{layer}.{experts[base].format(expert)}.{kind}" for expert in range(tensor.shape[0])]
        return [
            (name, tensor.shape[1:], _piece(tensor, tensor.offset + expert * size, size))
            for expert, name in enumerate(names)
        ]
    if layer is not None and base == "exp_probs_b" and architecture in _CORRECTION:
        shape = (1, *tensor.shape) if architecture == "ernie4_5-moe" else tensor.shape
        return [(f"model.layers.{layer}.{_CORRECTION[architecture]}", shape, _whole(tensor))]
    known = _ENDS if layer is None else _LAYER | _OTHER_NAMES.get(architecture, {})
    if base not in known:
        raise ValueError(f"{folder}: {tensor.name!r} of a {architecture!r} file has no known place in the model")
    name = f"{known[base]}.{kind}" if layer is None else f"model.layers.{layer}.{known[base]}.{kind}"
    # llama.cpp keeps the one row of the shared expert's gate as a vector.
    shape = (1, *tensor.shape) if base == "ffn_gate_inp_shexp" and len(tensor.shape) == 1 else tensor.shape
    return [(name, shape, _whole(tensor))]


def _whole(tensor: GgufTensor) -> StoredTensor:
    return _piece(tensor, tensor.offset, tensor.size)


def _piece(tensor: GgufTensor, offset: int, size: int) -> StoredTensor:
    return StoredTensor(f"{tensor.name} at {offset}", tensor.file, torch.uint8, (size,), offset)


def _heads(name: str, config: Any) -> int | None:
    """Heads whose rows llama.cpp's converter reorders in this tensor; None: none."""
    if re.fullmatch(r"blk\.\d+\.attn_q\.(weight|bias)", name):
        return int(config.num_attention_heads)
    if re.fullmatch(r"blk\.\d+\.attn_k\.(weight|bias)", name):
        return int(config.num_key_value_heads)
    return None


def _dequantised(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, *, kind: int, heads: int | None
) -> Tensor:
    import gguf

    quantised = gguf.GGMLQuantizationType(kind)
    stored = tensors["blocks"].numpy()
    rows = stored.reshape(*shape[:-1], -1)
    plain = {gguf.GGMLQuantizationType.F32: "<f4", gguf.GGMLQuantizationType.F16: "<f2"}
    values = torch.from_numpy(gguf.dequantize(rows.view(plain.get(quantised, "u1")), quantised)).view(shape)
    if heads is not None:
        # Each head's two halves, whose rows llama.cpp lets take turns.
        values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return values.to(dtype)
