"""The way from a checkpoint's keys to a model's parameters, by transformers' own tables of names.

``conversion_mapping`` says which parameter a key feeds, and how: the Hub's files of most families hold an expert's
projections one by one, the models all experts in one tensor.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from moe_ext.checkpoints.stored_tensors import StoredTensor, same_bytes


@dataclass(frozen=True)
class Source:
    """What a key of a checkpoint is for.

    Attributes:
        target: the parameter or buffer of the model that it feeds.
        expert: index of the expert, if the key is of one expert alone.
        expert_at: where its number stands in the key: first character and the one after the last.
        converted: whether transformers computes something on the way, beyond another name.
        transposed: whether all that it computes is each expert's transpose, where the shape is not the model's.
        part: where the tensor goes among those of its expert, which lie one above the other in the parameter's
            slice of that expert; None if transformers' conversion is another one.
        stands_in: whether the tensor is stored under the name of another parameter, which is tied to this one.
    """

    target: str
    expert: int | None = None
    expert_at: tuple[int, int] = (0, 0)
    converted: bool = False
    transposed: bool = False
    part: int | None = None
    stands_in: bool = False


def sources_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Source]:
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    places, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:  # as transformers' convert_and_load_state_dict_in_model finds them
        target, pattern = rename_source_key(name, renamings, converters, prefix, places)
        if target not in places and name in places:
            target, pattern = rename_source_key(name, [], [], prefix, places)
        if target not in places:
            continue
        if pattern is None:
            found[name] = Source(target)
        elif any(isinstance(operation, MergeModulelist) for operation in converter_of[pattern].operations):
            # The renamings are plain, so the end of the key is as the pattern has it.
            number = re.search(pattern.replace("*.", r"(\d+)\.") + "$", name)
            if number is None:
                raise ValueError(f"cannot tell which expert {name!r} is of")
            part = _part(converter_of[pattern], pattern)
            found[name] = Source(target, int(number[1]), number.span(1), converted=True, part=part)
        else:
            transposed = all(
                isinstance(operation, Transpose) and {operation.dim0, operation.dim1} == {1, 2}
                for operation in converter_of[pattern].operations
            )
            found[name] = Source(target, converted=True, transposed=transposed)
    return found


def _part(converter: WeightConverter, pattern: str) -> int | None:
    stack, *others = converter.operations
    above = len(others) == 1 and isinstance(others[0], Concatenate) and others[0].dim == 1
    if isinstance(stack, MergeModulelist) and stack.dim == 0 and (above or len(converter.source_patterns) == 1):
        return int(converter.source_patterns.index(pattern))
    return None


def tied(model: PreTrainedModel) -> set[str]:
    """Parameters that are another one's, and in no checkpoint that transformers saves."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def settle_ties(model: PreTrainedModel, sources: dict[str, Source], stored: Mapping[str, StoredTensor]) -> None:
    """Ties what transformers ties once it has loaded those tensors, in place: of a pair that is stored with different
    numbers none, whatever the config says; of a pair of which one is stored, that one feeds both."""
    fed = {source.target: name for name, source in sources.items() if not source.converted}
    for target, origin in list(model.all_tied_weights_keys.items()):
        if target not in fed:
            continue
        if origin not in fed:
            sources[fed[target]] = replace(sources[fed[target]], target=origin, stands_in=True)
            fed[origin] = fed[target]
        elif not same_bytes(stored[fed[target]], stored[fed[origin]]):
            del model.all_tied_weights_keys[target]
            owner, _, key = target.rpartition(".")
            weight = model.get_parameter(target)
            setattr(model.get_submodule(owner), key, nn.Parameter(torch.empty_like(weight), weight.requires_grad))


def names_of(model: nn.Module) -> dict[int, str]:
    """Parameters and buffers of a model by identity."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): name for name, tensor in named}
