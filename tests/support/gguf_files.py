"""Small GGUF files of Mixtral's kind, written by llama.cpp's package."""

from pathlib import Path
from typing import Any

import gguf
import numpy
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf.quants import quantize

from moe_ext.decision.pruning_plan import PruningPlan

EXPERTS, TOP_K, LAYERS, VOCABULARY = 4, 2, 2, 96
KEEP = ((0, 2, 3), (1, 2, 3))
PLAN = PruningPlan("mixtral", EXPERTS, TOP_K, ("model.layers.0.mlp", "model.layers.1.mlp"), KEEP)

Tensors = dict[str, tuple[numpy.ndarray[Any, Any], Kind]]


def stored(shape: tuple[int, ...], kind: Kind, seed: int) -> numpy.ndarray[Any, Any]:
    """Random numbers in a type of ggml; of a type that the package does not quantise to, random blocks."""
    random = numpy.random.default_rng(seed)
    numbers = random.standard_normal(shape).astype(numpy.float32)
    try:
        return quantize(numbers, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return random.integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=numpy.uint8)


def mixtral_tensors(kind: Kind = Kind.F32, width: int = 64, layers: int = LAYERS) -> Tensors:
    """Those of a model whose experts are of a type; all is ``width`` wide."""
    found: Tensors = {"token_embd.weight": (stored((VOCABULARY, width), Kind.F32, 1), Kind.F32)}
    for layer in range(layers):
        each = {
            "attn_norm.weight": ((width,), Kind.F32),
            "attn_q.weight": ((width, width), Kind.Q8_0),
            "attn_k.weight": ((width, width), Kind.Q8_0),
            "attn_v.weight": ((width, width), Kind.Q8_0),
            "attn_output.weight": ((width, width), Kind.Q8_0),
            "ffn_norm.weight": ((width,), Kind.F32),
            "ffn_gate_inp.weight": ((EXPERTS, width), Kind.F32),
            "ffn_gate_inp.bias": ((EXPERTS,), Kind.F32),
            "exp_probs_b.bias": ((EXPERTS,), Kind.F32),
            "ffn_gate_exps.weight": ((EXPERTS, width, width), kind),
            "ffn_gate_exps.bias": ((EXPERTS, width), Kind.F32),
            "ffn_up_exps.weight": ((EXPERTS, width, width), kind),
            "ffn_down_exps.weight": ((EXPERTS, width, width), kind),
            "ffn_down_exps.bias": ((EXPERTS, width), Kind.F32),
        }
        for place, (name, (shape, held)) in enumerate(each.items()):
            found[f"blk.{layer}.{name}"] = (stored(shape, held, 100 * layer + place), held)
    found["output_norm.weight"] = (stored((width,), Kind.F32, 2), Kind.F32)
    return found


def mixtral_fields(width: int = 64, layers: int = LAYERS) -> dict[str, tuple[Any, gguf.GGUFValueType]]:
    values = gguf.GGUFValueType
    return {
        "general.name": ("tiny", values.STRING),
        "general.alignment": (64, values.UINT32),
        "llama.block_count": (layers, values.UINT32),
        "llama.context_length": (512, values.UINT32),
        "llama.embedding_length": (width, values.UINT32),
        "llama.feed_forward_length": (width, values.UINT32),
        "llama.expert_count": (EXPERTS, values.UINT32),
        "llama.expert_used_count": (TOP_K, values.UINT32),
        "llama.attention.layer_norm_rms_epsilon": (1e-5, values.FLOAT32),
        "llama.rope.scaling.finetuned": (True, values.BOOL),
        "llama.attention.head_count_kv": ([2] * layers, values.ARRAY),
        "tokenizer.ggml.tokens": ([f"<{number}>" for number in range(VOCABULARY)], values.ARRAY),
        "tokenizer.ggml.scores": ([-0.1 * number for number in range(VOCABULARY)], values.ARRAY),
    }


def write_gguf(
    path: Path,
    tensors: Tensors,
    fields: dict[str, tuple[Any, gguf.GGUFValueType]],
    *,
    architecture: str = "llama",
    split: int = 0,
) -> None:
    """Writes a file, or with ``split`` a set of files of so many tensors each."""
    writer = GGUFWriter(path, architecture, split_max_tensors=split)
    for name, (value, kind) in fields.items():
        if name == "general.alignment":
            writer.add_custom_alignment(value)
        else:
            writer.add_key_value(name, value, kind)
    for name, (tensor, held) in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_fields(path: Path) -> dict[str, tuple[list[int], Any]]:
    """Types and value of every field, in their order."""
    reader = GGUFReader(path)
    return {
        name: ([int(kind) for kind in field.types], field.contents())
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }


def read_tensors(path: Path) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Type, shape (the slowest dimension first) and bytes of every tensor, in their order."""
    return {
        tensor.name: (int(tensor.tensor_type), tuple(reversed(tensor.shape.tolist())), tensor.data.tobytes())
        for tensor in GGUFReader(path).tensors
    }
