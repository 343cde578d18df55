"""Applies a :class:`PruningPlan` to a GGUF file: experts are slices of its bytes, however they are quantised."""

import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moe_ext.checkpoints.gguf_file import GgufField, GgufFile, GgufTensor, read_gguf
from moe_ext.checkpoints.gguf_names import ARCHITECTURES
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.families import FAMILIES
from moe_ext.pruning.prune_folder import PrunedCheckpoint
from moe_ext.pruning.shard_writer import Part, Selection, write_part
from moe_ext.storage.files import file_destination, replace_file

_LAYER = re.compile(r"blk\.(\d+)\.(.+)", re.DOTALL)
_ROWS = ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps")
_STACKED = (*_ROWS, "ffn_down_exps")
_COUNT_EXPERTS = (*_STACKED, "ffn_gate_inp", "exp_probs_b")
_NOT_COUNTING = re.compile(r"ffn_\w*shexp|ffn_norm_exps|ffn_gate_inp_shexp")


@dataclass(frozen=True)
class _Kept:
    """A tensor as it is written."""

    tensor: GgufTensor
    shape: tuple[int, ...]
    part: Part


def prune_gguf(file: str | Path, plan: PruningPlan, out: str | Path, *, progress: bool = True) -> PrunedCheckpoint:
    """Writes a GGUF file without the experts and channels that a plan does not keep, whatever the model's size.

    The experts' tensors, the router and its biases are cut along the experts, in the quantised blocks that they are
    stored in; no number is computed. Of the metadata only ``expert_count`` changes and, where channels go, the width.
    Layers for multi-token prediction, which plans say nothing of, are left out with their count, and a warning says so.

    The file takes its name in one step when it is whole; interrupted in whatever way, the same call begins anew.

    Args:
        file: a GGUF file, or any one of a split set (``NAME-00001-of-0000N.gguf``).
        plan: made for this model, with transformers' names of its layers.
        out: a file that does not exist yet; also of a split set one file is written.
        progress: whether to show a progress bar.

    Raises:
        FileExistsError: ``out`` is there already.
        ImportError: the ``gguf`` package is not installed: ``pip install 'moe_ext[gguf]'``.
        CheckpointError: a file is truncated, or its tensors are not what its metadata says.
        ValueError: the plan does not fit; layers keep different numbers of experts, which llama.cpp does not read; or a
            tensor of a layer's experts is of an unknown kind.
        OSError: a file is missing, or the disk is too small: found before anything is written.
    """
    target = file_destination(out)
    if target.exists():
        raise FileExistsError(f"out: {target} already exists; expected a new file")
    source = read_gguf(file)
    layers = _layers(source, plan)
    fields, last = _without_further_layers(source)
    kept = [_kept(tensor, layers, plan) for tensor in source.tensors.values() if _layer_of(tensor.name)[0] < last]
    fields = _changed(source, fields, plan, kept, layers)
    size = sum(each.part.size for each in kept)
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise OSError(28, f"the result needs {size / 1e9:.2f} GB, {target.parent} has {free / 1e9:.2f} GB")
    with (
        replace_file(target) as temporary,
        tqdm(total=size, desc="prune", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        _write(temporary, source, fields, kept, bar)
    numbers = [sum(math.prod(shape) for shape in shapes) for shapes in (
        [tensor.shape for tensor in source.tensors.values()], [each.shape for each in kept]
    )]  # fmt: skip
    return PrunedCheckpoint(target, numbers[0], numbers[1], size)


def _layer_of(name: str) -> tuple[int, str]:
    """A tensor's layer, or -1, and its name in it."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match is not None and len(match[1]) < 6 else (-1, name)


def _layers(source: GgufFile, plan: PruningPlan) -> dict[int, int]:
    """Position in the plan by number of the layer.

    Raises:
        ValueError: the plan is not for this model, or not for llama.cpp.
    """
    where = source.files[0]
    family = _plain(source.architecture)
    expected = {_architecture(name): name for name in (*FAMILIES, plan.model_type)}
    if family in expected and _architecture(plan.model_type) != family:
        raise ValueError(f"{where}: is a {family!r} model; the plan is for model type {plan.model_type!r}")
    for field, number, what in (
        ("expert_count", plan.num_experts, "experts"),
        ("expert_used_count", plan.top_k, "experts a token"),
    ):
        if (held := source.value(source.own(field), int)) != number:
            raise ValueError(f"{where}: has {held} {what}; the plan is for a model with {number}")
    numbers = [re.search(r"\.(\d+)\.", f".{name}.") for name in plan.layers]
    found = {int(match[1]): position for position, match in enumerate(numbers) if match is not None}
    last = source.layers
    held = {_layer_of(name)[0] for name in source.tensors if _is_of_experts(name)}
    wanted = {number for number in held if number < last}
    if len(found) != len(plan.layers) or found.keys() != wanted:
        raise ValueError(
            f"{where}: has experts in layers {_shown(wanted)}; the plan is for {_shown(found.keys())} "
            f"({plan.layers[0]}, ...)"
        )
    if len(sizes := {len(kept) for kept in plan.keep}) != 1:
        raise ValueError(
            f"plan: its layers keep {min(sizes)} to {max(sizes)} experts; llama.cpp has one number for all layers: "
            "plan with --scope layer, or search with budget='layer'"
        )
    groups = source.fields.get(source.own("expert_group_count"))
    if groups is not None and isinstance(groups.value, int) and groups.value > 1:
        each = plan.num_experts // groups.value
        for name, kept in zip(plan.layers, plan.keep, strict=True):
            counts = {sum(expert // each == group for expert in kept) for group in range(groups.value)}
            if len(counts) != 1:
                raise ValueError(
                    f"plan: layer {name!r} keeps different numbers of experts in its {groups.value} groups"
                )
    return found


def _architecture(model_type: str) -> str:
    """What llama.cpp calls a family, less its signs: they are put in as the family's authors do."""
    return _plain(ARCHITECTURES.get(model_type, model_type.removesuffix("_text")))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]", "", name)


def _shown(numbers: Any) -> str:
    ordered = sorted(numbers)
    return f"{ordered[0]} to {ordered[-1]}, {len(ordered)} of them" if ordered else "none"


def _is_of_experts(name: str) -> bool:
    return _layer_of(name)[1].split(".")[0] in _STACKED


def _without_further_layers(source: GgufFile) -> tuple[dict[str, GgufField], int]:
    """The metadata without layers for multi-token prediction, and the number after that of the last layer left."""
    last, name = source.layers, source.own("nextn_predict_layers")
    count = source.value(source.own("block_count"), int)
    fields = dict(source.fields)
    if last == count:
        return fields, last
    warnings.warn(
        f"{source.files[0]}: {name} is {count - last}; layers for multi-token prediction are left out, and the "
        "metadata counts none",
        stacklevel=3,
    )
    for key, field in source.fields.items():
        if key in (name, source.own("block_count")):
            fields[key] = replace(field, value=0 if key == name else last)
        elif key.startswith(f"{source.architecture}.") and isinstance(field.value, list) and len(field.value) == count:
            fields[key] = replace(field, value=field.value[:last])
    return fields, last


def _kept(tensor: GgufTensor, layers: dict[int, int], plan: PruningPlan) -> _Kept:
    """What is left of a tensor.

    Raises:
        ValueError: it is of experts, and in a form that is not known.
        CheckpointError: it does not count the experts that the metadata does.
    """
    number, rest = _layer_of(tensor.name)
    base = rest.split(".")[0]
    source = StoredTensor(tensor.name, tensor.file, torch.uint8, (tensor.size,), tensor.offset)
    whole = Part(tensor.name, source, (tensor.size,), torch.uint8, ((0, tensor.size),))
    if number not in layers:
        return _Kept(tensor, tensor.shape, whole)
    if base not in _COUNT_EXPERTS:
        if re.search(r"exp|eid|ffn_(?:gate|up|down)\.\d", rest) and not _NOT_COUNTING.match(rest):
            raise ValueError(f"{tensor.file}: {tensor.name!r} is of a layer's experts, in a form that is not known")
        return _Kept(tensor, tensor.shape, whole)
    position = layers[number]
    keep = plan.keep[position]
    if tensor.shape[0] != plan.num_experts:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name!r} has shape {tensor.shape}; expected {plan.num_experts} experts first"
        )
    if len(tensor.shape) == 1 and tensor.block != 1:
        raise CheckpointError(f"{tensor.file}: {tensor.name!r} has its experts in blocks of {tensor.block}")
    each = tensor.size // plan.num_experts
    ranges = tuple((expert * each, (expert + 1) * each) for expert in keep)
    shape = (len(keep), *tensor.shape[1:])
    part = replace(whole, shape=(each * len(keep),), ranges=ranges)
    channels = None if plan.channels is None else plan.channels.indices(position)
    if channels is None or base not in _STACKED or not rest.endswith((".weight", ".bias")):
        return _Kept(tensor, shape, part)
    if base != "ffn_down_exps":
        return _thinner_rows(tensor, shape, part, channels, plan, 2 if base == "ffn_gate_up_exps" else 1)
    if rest.endswith(".bias"):
        return _Kept(tensor, shape, part)
    return _thinner_columns(tensor, shape, part, channels, plan, rest)


def _thinner_rows(
    tensor: GgufTensor, shape: tuple[int, ...], part: Part, channels: torch.Tensor, plan: PruningPlan, above: int
) -> _Kept:
    assert plan.channels is not None
    width = plan.channels.intermediate_size
    if shape[1] != above * width:
        raise CheckpointError(f"{tensor.file}: {tensor.name!r} has {shape[1]} rows an expert; expected {above * width}")
    row = math.prod(shape[2:]) // tensor.block * tensor.block_bytes if len(shape) > 2 else tensor.block_bytes
    if len(shape) == 2 and tensor.block != 1:
        raise CheckpointError(f"{tensor.file}: {tensor.name!r} has its channels in blocks of {tensor.block}")
    places = torch.cat([channels + first * width for first in range(above)], 1)
    selections = tuple(
        Selection(begin, end, row, chosen, 0) for (begin, end), chosen in zip(part.ranges, places, strict=True)
    )
    size = row * places.shape[1] * len(places)
    return _Kept(tensor, (shape[0], places.shape[1], *shape[2:]), replace(part, shape=(size,), selections=selections))


def _thinner_columns(
    tensor: GgufTensor, shape: tuple[int, ...], part: Part, channels: torch.Tensor, plan: PruningPlan, rest: str
) -> _Kept:
    assert plan.channels is not None
    width, block = plan.channels.intermediate_size, tensor.block
    if len(shape) != 3 or shape[2] != width:
        raise CheckpointError(f"{tensor.file}: {tensor.name!r} has shape {tensor.shape}; expected {width} columns")
    first = channels[:, ::block]
    places = (first[..., None] + torch.arange(block)).flatten(1)
    if channels.shape[1] % block or not torch.equal(places, channels) or bool((first % block).any()):
        raise ValueError(
            f"plan: {tensor.name}: keeps parts of blocks of {block} channels, which are stored together; plan whole "
            f"ones: moe-ext plan ... --blocks {block}, thin_plan(..., blocks={block})"
        )
    row = width // block * tensor.block_bytes
    bytes_of = (first[..., None] // block * tensor.block_bytes + torch.arange(tensor.block_bytes)).flatten(1)
    selections = tuple(
        Selection(begin, end, row, chosen, 1) for (begin, end), chosen in zip(part.ranges, bytes_of, strict=True)
    )
    size = bytes_of.shape[1] * shape[1] * shape[0]
    return _Kept(tensor, (*shape[:2], channels.shape[1]), replace(part, shape=(size,), selections=selections))


def _changed(
    source: GgufFile,
    fields: dict[str, GgufField],
    plan: PruningPlan,
    kept: list[_Kept],
    layers: dict[int, int],
) -> dict[str, GgufField]:
    """The metadata of the result."""
    fields, own = dict(fields), source.own
    for name, field in fields.items():
        if field.value is None or field.value == []:
            raise ValueError(f"{source.files[0]}: {name} is an empty array, which llama.cpp's package does not write")
    number = len(plan.keep[0])
    fields[own("expert_count")] = replace(fields[own("expert_count")], value=number)
    each = fields.get(own("experts_per_group"))
    if each is not None and isinstance(each.value, int) and each.value:
        fields[own("experts_per_group")] = replace(each, value=each.value * number // plan.num_experts)
    if plan.channels is None:
        return fields
    before, after = plan.channels.intermediate_size, plan.channels.width(0)
    if len({plan.channels.width(layer) for layer in range(len(plan.keep))}) != 1:
        raise ValueError("plan: its layers keep different numbers of channels; llama.cpp has one number for all layers")
    width = own("expert_feed_forward_length")
    if width not in fields:
        width = own("feed_forward_length")
        dense = [name for name in source.tensors if re.fullmatch(r"blk\.\d+\.ffn_(?:gate|up|down)\.weight", name)]
        if dense or width not in fields or fields[width].value != before:
            raise ValueError(
                f"{source.files[0]}: no field of its own holds the experts' width; remove whole experts of it instead"
            )
    elif fields[width].value != before:
        raise CheckpointError(
            f"{source.files[0]}: {width} is {fields[width].value!r}; the plan is for {before} channels"
        )
    fields[width] = replace(fields[width], value=after)
    shared = any("_shexp." in name and "ffn_gate_inp" not in name for name in source.tensors)
    if shared and own("expert_shared_feed_forward_length") not in fields:
        name = own("expert_shared_count")
        count = fields.get(name)
        if count is None or not isinstance(count.value, int) or count.value * before % after:
            raise ValueError(
                f"{source.files[0]}: shared experts are as wide as so many routed ones of {before} channels, which is "
                f"no number of {after}; keep another number of channels"
            )
        fields[name] = replace(count, value=count.value * before // after)
    return fields


def _write(temporary: Path, source: GgufFile, fields: dict[str, GgufField], kept: list[_Kept], bar: Any) -> None:
    import gguf
    import numpy

    order = gguf.GGUFEndian.BIG if source.big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(temporary, source.architecture, endianess=order)
    for name, field in fields.items():
        if name == "general.alignment":
            writer.add_custom_alignment(field.value)
        elif name != "general.architecture":  # the writer's own
            element = None if field.element is None else gguf.GGUFValueType(field.element)
            writer.add_key_value(name, field.value, gguf.GGUFValueType(field.kind), element)
    for each in kept:
        kind = gguf.GGMLQuantizationType(each.tensor.kind)
        writer.add_tensor_info(each.tensor.name, each.shape, numpy.dtype(numpy.float32), each.part.size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    out = writer.fout[0]
    for part in _parts(kept):
        out.write(bytes(-out.tell() % writer.data_alignment))
        write_part(out, part)
        bar.update(part.size)
    out.write(bytes(-out.tell() % writer.data_alignment))
    writer.close()


def _parts(kept: list[_Kept]) -> Iterator[Part]:
    for each in kept:
        if os.stat(each.tensor.file).st_size < each.tensor.offset + each.tensor.size:
            raise CheckpointError(f"{each.tensor.file}: was cut short since it was opened")
        yield each.part
