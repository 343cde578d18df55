"""Checkpoint folders whose experts are quantised, by the formats' own libraries where these can be had.

AutoAWQ, GPTQ and ModelOpt need a GPU or are not maintained: their layouts are written here from their sources, number
by number, and tests/checkpoints/test_writers.py compares where they are installed. AutoAWQ 0.2.9,
awq/modules/linear/gemm.py (``WQLinear_GEMM.from_linear``); AutoGPTQ 0.7.1,
auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py (``pack``), which stores zeros less one; ModelOpt's
``NVFP4QTensor.quantize`` with ``weight_scale_2`` = largest magnitude / (6 * 448), the inverse of compressed-tensors'
global scale, and the same numbers in the same order.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_ext.checkpoints.stored_tensors import INDEX
from tests.support.checkpoints import rewritten, tensors_in

EXPERT = re.compile(r"(.*experts\.\d+\.\w+\.)weight$")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """A way to store a module's weight.

    Attributes:
        declared: what the config says.
        store: what lies in the folder in the place of a weight (R, C), by the last parts of the keys.
        read: what these stand for, float32 or as the format's library gives it.
        block: channels that stay together; 0 if none can be taken out.
    """

    declared: dict[str, Any]
    store: Callable[[Tensor], Tensors]
    read: Callable[[Tensors], Tensor]
    block: int
    beside: dict[str, Tensor] = field(default_factory=dict)


def write(form: Form, folder: Path) -> None:
    """Quantises the experts of a folder in the Hub's layout, in place."""

    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            if match := EXPERT.match(name):
                stored = form.store(tensors.pop(name))
                tensors.update({match[1] + key: value.contiguous() for key, value in stored.items()})
        tensors.update(form.beside)

    rewritten(folder, edit)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = form.declared
    (folder / "config.json").write_text(json.dumps(config))


def modules(tensors: Tensors) -> dict[str, Tensors]:
    """The tensors of every expert's module by its name, which ends with a dot."""
    found: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        if match := re.match(r"(.*experts\.\d+\.\w+\.)(.*)$", name):
            found.setdefault(match[1], {})[match[2]] = tensor
    return found


def plain_tensors(form: Form, tensors: Tensors) -> Tensors:
    """A folder's tensors with the experts' weights as numbers again, in bfloat16."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name and name not in form.beside}
    for module, stored in modules(tensors).items():
        found[f"{module}weight"] = form.read(stored).bfloat16().contiguous()
    return found


def plain_copy(form: Form, source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)
    values = plain_tensors(form, tensors_in(source))
    for file in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def _compressed(form: str, **weights: Any) -> Form:
    """By compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    floats = args.num_bits == 4 and args.type == "float"

    def store(weight: Tensor) -> Tensors:
        groups = weight.shape[1] // (args.group_size or weight.shape[1])
        if args.block_structure is not None:
            rows, columns = args.block_structure
            parts = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
        else:
            parts = weight.unflatten(1, (groups, -1))
        given: dict[str, Any] = {}
        if form == "nvfp4-pack-quantized":
            given["global_scale"] = generate_gparam(weight.min(), weight.max())
        scales, zeros = calculate_qparams(parts.amin(-1), parts.amax(-1), args, **given)
        state = {"weight": weight, "weight_scale": scales}
        if not args.symmetric:
            state["weight_zero_point"] = zeros
        if given:
            state["weight_global_scale"] = given["global_scale"].reshape(1)
        stored = compressor.compress(state, scheme)
        return {key: value.detach() for key, value in stored.items()}

    def read(stored: Tensors) -> Tensor:
        values: Tensor = compressor.decompress(dict(stored), scheme)["weight"]
        return values

    declared = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}},
        "ignore": ["lm_head"],
    }
    size = args.group_size or 0
    block = max(size if size > 0 else 1, 2 if floats else 32 // args.num_bits if form == "pack-quantized" else 1)
    if args.block_structure is not None:
        block = max(args.block_structure)
    return Form(declared, store, read, block)


def _modelopt() -> Form:
    inner = _compressed("nvfp4-pack-quantized", **NVFP4)

    def store(weight: Tensor) -> Tensors:
        stored = inner.store(weight)
        return {
            "weight": stored["weight_packed"],
            "weight_scale": stored["weight_scale"],
            "weight_scale_2": 1 / stored["weight_global_scale"].reshape(()),
            "input_scale": torch.tensor(0.5),
        }

    def read(stored: Tensors) -> Tensor:
        return inner.read(
            {
                "weight_packed": stored["weight"],
                "weight_scale": stored["weight_scale"],
                "weight_global_scale": 1 / stored["weight_scale_2"].reshape(1),
            }
        )

    declared = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return Form(declared, store, read, 16, {"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.25)})


def _rounded(weight: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (R, C), zeros (R, G) and scales (R, G) of a weight (R, C)."""
    parts = weight.float().unflatten(1, (-1, group))
    low, high = parts.amin(-1), parts.amax(-1)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)
    numbers = ((parts / scales[..., None]).round() + zeros[..., None]).clamp(0, 2**bits - 1)
    return numbers.flatten(1).int(), zeros.int(), scales


def _words(numbers: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Numbers (N, M) packed along the first dimension: a word's place i, from the lowest bits on, holds order[i]."""
    words = torch.zeros(numbers.shape[0] // len(order), numbers.shape[1], dtype=torch.int64)
    for row in range(words.shape[0]):
        for place, number in enumerate(order):
            words[row] |= numbers[row * len(order) + number].long() << (bits * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _numbers(words: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """What :func:`_words` packed."""
    numbers = torch.zeros(words.shape[0] * len(order), words.shape[1])
    for row in range(words.shape[0]):
        for place, number in enumerate(order):
            numbers[row * len(order) + number] = (words[row].long() >> (bits * place)) & (2**bits - 1)
    return numbers


def _gptq(bits: int, group: int) -> Form:
    order = tuple(range(32 // bits))

    def store(weight: Tensor) -> Tensors:
        numbers, zeros, scales = _rounded(weight, group, bits)
        return {
            "qweight": _words(numbers.T, bits, order),
            "qzeros": _words(zeros - 1, bits, order).T,
            "scales": scales.T.half(),
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
        }

    def read(stored: Tensors) -> Tensor:
        numbers, zeros = _numbers(stored["qweight"], bits, order), _numbers(stored["qzeros"].T, bits, order).T + 1
        groups = stored["g_idx"].long()
        return ((numbers - zeros[groups]) * stored["scales"].float()[groups]).T

    return Form({"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False}, store, read, group)


def _awq(group: int) -> Form:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def store(weight: Tensor) -> Tensors:
        numbers, zeros, scales = _rounded(weight, group, 4)
        return {"qweight": _words(numbers, 4, order).T, "qzeros": _words(zeros, 4, order).T, "scales": scales.T.half()}

    def read(stored: Tensors) -> Tensor:
        numbers, zeros = (_numbers(stored[key].T, 4, order) for key in ("qweight", "qzeros"))
        parts = numbers.unflatten(1, (-1, group)) - zeros[..., None]
        return (parts * stored["scales"].float().T[..., None]).flatten(1)

    declared = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Form(declared, store, read, group)


def _bitsandbytes(kind: str, nested: bool) -> Form:
    """By bitsandbytes."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

    def store(weight: Tensor) -> Tensors:
        packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
        return {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}

    def read(stored: Tensors) -> Tensor:
        held = {key.removeprefix("weight."): value for key, value in stored.items() if key != "weight"}
        values: Tensor = dequantize_4bit(stored["weight"], QuantState.from_dict(held, device=torch.device("cpu")))
        return values

    return Form({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}, store, read, 0)


def _float8(static: bool) -> Form:
    """A scale a tensor, and of its inputs, as AutoFP8 wrote them (vLLM's ``fp8``)."""

    def store(weight: Tensor) -> Tensors:
        scale = weight.float().abs().max() / 448
        stored = {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        return {**stored, "input_scale": torch.tensor(0.125)} if static else stored

    def read(stored: Tensors) -> Tensor:
        return stored["weight"].float() * stored["weight_scale"]

    return Form({"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}, store, read, 1)


NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
FORMS: dict[str, Callable[[], Form]] = {
    "compressed-tensors, 4 bits": partial(
        _compressed, "pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=True
    ),
    "compressed-tensors, 4 bits and zeros": partial(
        _compressed, "pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False
    ),
    "compressed-tensors, 8 bits packed": partial(_compressed, "pack-quantized", num_bits=8, strategy="channel"),
    "compressed-tensors, int8": partial(_compressed, "int-quantized", num_bits=8, strategy="channel"),
    "compressed-tensors, float8": partial(_compressed, "float-quantized", num_bits=8, type="float", strategy="channel"),
    "compressed-tensors, float8 in blocks": partial(
        _compressed, "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]
    ),
    "compressed-tensors, NVFP4": partial(_compressed, "nvfp4-pack-quantized", **NVFP4),
    "compressed-tensors, MXFP4": partial(_compressed, "mxfp4-pack-quantized", **MXFP4),
    "ModelOpt, NVFP4": _modelopt,
    "GPTQ, 4 bits": partial(_gptq, 4, 32),
    "GPTQ, 8 bits": partial(_gptq, 8, 16),
    "AWQ": partial(_awq, 32),
    "bitsandbytes, nf4": partial(_bitsandbytes, "nf4", nested=True),
    "bitsandbytes, fp4": partial(_bitsandbytes, "fp4", nested=False),
    "float8, a scale a tensor": partial(_float8, static=False),
    "float8, static": partial(_float8, static=True),
}
