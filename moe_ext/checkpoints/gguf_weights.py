"""A GGUF file as the weights of a model that a folder describes: ``config.json``, a tokenizer, and the file.

llama.cpp's tensors become those of the model, the experts' of a layer all in one; each becomes numbers when its layer
is loaded, by llama.cpp's own ``gguf`` package.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.checkpoints.gguf_file import GgufFile, GgufTensor, read_gguf
from moe_ext.checkpoints.gguf_names import ARCHITECTURES, places
from moe_ext.checkpoints.quantised_weight import Dequantise, Piece, QuantisedWeight
from moe_ext.checkpoints.stored_tensors import INDEX, SINGLE, CheckpointError, StoredTensor
from moe_ext.models.boundary import is_transposed, placed_experts

FORMAT = "GGUF"
_OF_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.(weight|bias)")
_COMPUTED = re.compile(r"(?:.*\.)?rope_(?:freqs|factors_long|factors_short)\.weight")
"""What llama.cpp computes from the config and stores."""
_ABSORBED = re.compile(r"(blk\.\d+\.attn_)[kv]_b\.weight")
"""Two tensors that newer files of latent attention hold in the place of one, attn_kv_b."""
_TURNED = ("llama", "granitemoe")
"""Architectures in whose queries and keys llama.cpp's converter reorders rows."""


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


def gguf_pieces(source: GgufFile) -> dict[str, StoredTensor]:
    """The bytes of each tensor that the model needs, of a layer's experts one by one, by names of their own."""
    return {piece.name: piece for tensor in _of_model(source) for piece in _pieces(tensor)}


def check_architecture(folder: object, source: GgufFile, config: Any) -> None:
    """ValueError unless the file's architecture is that of the config, and one that is read."""
    text = config.get_text_config(decoder=True)
    if ARCHITECTURES.get(text.model_type) != source.architecture:
        raise ValueError(
            f"{folder}: statistics of a GGUF file are made for {', '.join(ARCHITECTURES)}; the config is of "
            f"{text.model_type!r} and the file of {source.architecture!r}. Make them of the original model's folder"
        )


def gguf_weights(folder: object, source: GgufFile, model: PreTrainedModel) -> dict[str, QuantisedWeight]:
    """The weights by their keys in a checkpoint.

    Args:
        source: the file, of an architecture that is read.
        model: the config's, which may be on the meta device.

    Raises:
        ValueError: a tensor has no known place in the model.
        CheckpointError: tensors that belong together do not fit.
    """
    stacked: dict[tuple[int, str], dict[str, GgufTensor]] = {}
    others: dict[str, list[GgufTensor]] = {}
    for tensor in _of_model(source):
        if (match := _OF_EXPERTS.fullmatch(tensor.name)) is not None:
            stacked.setdefault((int(match[1]), match[3]), {})[match[2]] = tensor
        else:
            others.setdefault(_ABSORBED.sub(r"\1kv_b.weight", tensor.name), []).append(tensor)
    weights = _of_experts(folder, stacked, model)
    placed = places(folder, model, others, source.architecture, source.layers)
    config = model.config.get_text_config(decoder=True)
    for name, tensors in others.items():
        key, shape = placed[name]
        if [tensor.name for tensor in tensors] == [name]:
            heads = _heads(name, config) if source.architecture in _TURNED else None
            weights.append(_alone(key, shape, tensors[0], heads))
        else:
            weights.append(_absorbed(key, tensors))
    return {weight.name: weight for weight in weights}


def _of_model(source: GgufFile) -> list[GgufTensor]:
    """The file's tensors that the model needs: without those of layers for multi-token prediction, which transformers
    leaves out too, those that are computed from the config, and those that hold once more what another one does."""
    further = source.own("nextn_predict_layers") in source.fields
    last, layer = source.layers, re.compile(r"blk\.(\d+)\.")
    return [
        tensor
        for name, tensor in source.tensors.items()
        if (not further or (number := layer.match(name)) is None or int(number[1]) < last)
        and _COMPUTED.fullmatch(name) is None
        and not ((both := _ABSORBED.fullmatch(name)) is not None and f"{both[1]}kv_b.weight" in source.tensors)
    ]


def _pieces(tensor: GgufTensor) -> list[StoredTensor]:
    """A tensor's bytes, of an experts' tensor those of every expert."""
    count = tensor.shape[0] if _OF_EXPERTS.fullmatch(tensor.name) is not None and len(tensor.shape) > 1 else 1
    size = tensor.size // count
    offsets = [tensor.offset + place * size for place in range(count)]
    return [StoredTensor(f"{tensor.name} at {at}", tensor.file, torch.uint8, (size,), at) for at in offsets]


def _weight(key: str, shape: tuple[int, ...], roles: Mapping[str, GgufTensor], read: Dequantise) -> QuantisedWeight:
    """Of pieces with the roles "ROLE 0", "ROLE 1", ... of each tensor."""
    pieces = {
        piece.name: Piece(f"{role} {place}", (None,))
        for role, tensor in roles.items()
        for place, piece in enumerate(_pieces(tensor))
    }
    return QuantisedWeight(key, shape, pieces, read)


# ---- the experts of a layer, as its module holds them


def _of_experts(
    folder: object, stacked: Mapping[tuple[int, str], dict[str, GgufTensor]], model: PreTrainedModel
) -> list[QuantisedWeight]:
    modules = {}
    for name, _, key, module in placed_experts(model):
        if (number := re.search(r"\.(\d+)\.", f"{name}.")) is not None:
            modules[int(number[1])] = (f"{name}.{key}", module)
    weights: list[QuantisedWeight] = []
    for (layer, kind), tensors in stacked.items():
        if layer not in modules:
            raise ValueError(f"{folder}: holds experts of layer {layer}, in which the config's model has none")
        path, module = modules[layer]
        for parameter, names in (("gate_up_proj", ("gate", "up", "gate_up")), ("down_proj", ("down",))):
            if parts := {name: tensors[name] for name in names if name in tensors}:
                weights.append(_stacked(f"{path}.{parameter}{'_bias' if kind == 'bias' else ''}", parts, module))
    return weights


def _stacked(key: str, tensors: Mapping[str, GgufTensor], module: nn.Module) -> QuantisedWeight:
    first = next(iter(tensors.values()))
    shapes = {each.shape for each in tensors.values()}
    if len(first.shape) < 2 or len(shapes) != 1:
        held = " and ".join(map(str, sorted(shapes)))
        raise CheckpointError(f"{first.file}: {first.name!r} has shape {held}; expected one, experts first")
    shape = (first.shape[0], len(tensors) * first.shape[1], *first.shape[2:])
    transposed = len(shape) == 3 and is_transposed(module)
    turns = "down" not in tensors and not getattr(module, "is_concatenated", True)
    read = partial(_read_experts, tensors=tensors, turns=turns, transposed=transposed)
    return _weight(key, (shape[0], shape[2], shape[1]) if transposed else shape, tensors, read)


def _read_experts(
    blocks: Mapping[str, Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    tensors: Mapping[str, GgufTensor],
    turns: bool,
    transposed: bool,
) -> Tensor:
    """Expert by expert, so that one alone is in memory in float32.

    Args:
        turns: whether rows of gate and up take turns; else they lie one above the other.
    """
    experts = torch.empty(shape, dtype=dtype)
    for place, expert in enumerate(experts):
        parts = [_numbers(blocks[f"{role} {place}"], each.shape[1:], each.kind) for role, each in tensors.items()]
        rows = torch.cat(parts)
        if turns:  # a fused tensor has them one above the other, too
            rows = rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
        expert.copy_(rows.T if transposed else rows)
    return experts


# ---- other weights


def _alone(key: str, shape: tuple[int, ...], tensor: GgufTensor, heads: int | None) -> QuantisedWeight:
    """A weight that one tensor holds; llama.cpp leaves out dimensions of one place."""
    if [size for size in shape if size != 1] != [size for size in tensor.shape if size != 1]:
        shape = tensor.shape  # which is found to be another one where all weights are compared
    return _weight(key, shape, {"blocks": tensor}, partial(_read_one, tensor=tensor, heads=heads))


def _heads(name: str, config: Any) -> int | None:
    """Heads whose rows llama.cpp's converter reorders in this tensor; None: none."""
    if re.fullmatch(r"blk\.\d+\.attn_q\.(weight|bias)", name):
        return int(config.num_attention_heads)
    if re.fullmatch(r"blk\.\d+\.attn_k\.(weight|bias)", name):
        return int(config.num_key_value_heads)
    return None


def _read_one(
    blocks: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, *, tensor: GgufTensor, heads: int | None
) -> Tensor:
    values = _numbers(blocks["blocks 0"], tensor.shape, tensor.kind)
    if heads is not None:
        # Each head's two halves, whose rows llama.cpp lets take turns.
        values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return values.reshape(shape).to(dtype)


def _absorbed(key: str, tensors: list[GgufTensor]) -> QuantisedWeight:
    """The weight (heads (N + V), R) that brings latent keys and values back to their heads, of two tensors: keys
    (heads, R, N), transposed for products from the other side, and values (heads, V, R)."""
    found = {tensor.name.split(".")[2][len("attn_") :]: tensor for tensor in tensors}
    keys, values = found.get("k_b"), found.get("v_b")
    if keys is None or values is None:
        raise CheckpointError(
            f"{tensors[0].file}: holds {tensors[0].name!r} without its neighbour attn_k_b or attn_v_b"
        )
    fits = len(keys.shape) == len(values.shape) == 3 and keys.shape[:2] == (values.shape[0], values.shape[2])
    if not fits:
        raise CheckpointError(
            f"{keys.file}: {keys.name!r} has shape {keys.shape}, which does not fit {values.shape} of {values.name!r}: "
            "convert the model again with a newer llama.cpp"
        )
    shape = (keys.shape[0] * (keys.shape[2] + values.shape[1]), keys.shape[1])
    return _weight(key, shape, {"keys": keys, "values": values}, partial(_read_absorbed, keys=keys, values=values))


def _read_absorbed(
    blocks: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, *, keys: GgufTensor, values: GgufTensor
) -> Tensor:
    k_b, v_b = (
        _numbers(blocks[f"{role} 0"], tensor.shape, tensor.kind)
        for role, tensor in (("keys", keys), ("values", values))
    )
    return torch.cat([k_b.transpose(1, 2), v_b], 1).reshape(shape).to(dtype)


def _numbers(blocks: Tensor, shape: tuple[int, ...], kind: int) -> Tensor:
    """What bytes stand for, in float32."""
    import gguf

    quantised = gguf.GGMLQuantizationType(kind)
    rows = blocks.numpy().reshape(*shape[:-1], -1)
    plain = {gguf.GGMLQuantizationType.F32: "<f4", gguf.GGMLQuantizationType.F16: "<f2"}
    return torch.from_numpy(gguf.dequantize(rows.view(plain.get(quantised, "u1")), quantised)).view(shape)
