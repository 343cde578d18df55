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
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from moe_ext.checkpoints.stored_tensors import StoredTensor, same_bytes

_SHARING_OUT = ErnieFuseAndSplitTextVisionExperts  # of experts' tensors, a half to each of two parameters
_OF_EXPERTS = (MergeModulelist, _SHARING_OUT)


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
        others: further parameters that the same conversion makes, of the same tensor or of tensors of one numbering.
        in_pieces: whether these and the target are equal pieces of it, one above the other.
        before: parameters whose experts are numbered before those of the target, in keys that count the experts of
            several modules.
        swapped: whether rows of the matrix are columns of the parameter.
    """

    target: str
    expert: int | None = None
    expert_at: tuple[int, int] = (0, 0)
    converted: bool = False
    transposed: bool = False
    part: int | None = None
    stands_in: bool = False
    others: tuple[str, ...] = ()
    in_pieces: bool = False
    before: tuple[str, ...] = ()
    swapped: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target, *self.others)


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
            continue
        converter = converter_of[pattern]
        others = tuple(target.replace(converter.target_patterns[0], each) for each in converter.target_patterns[1:])
        if any(isinstance(operation, _OF_EXPERTS) for operation in converter.operations):
            # The renamings are plain, so the end of the key is as the pattern has it.
            number = re.search(pattern.replace("*.", r"(\d+)\.") + "$", name)
            if number is None:
                raise ValueError(f"cannot tell which expert {name!r} is of")
            source = Source(target, int(number[1]), number.span(1), converted=True, part=_part(converter, pattern))
            found[name] = _shared_out(source, (target, *others), places) if others else source
        else:
            found[name] = Source(
                target,
                converted=True,
                transposed=_transposes(converter, {1, 2}),
                others=others,
                in_pieces=_cuts_rows(converter),
                swapped=_transposes(converter, {0, 1}),
            )
    return found


def _shared_out(source: Source, targets: tuple[str, ...], places: Mapping[str, Tensor]) -> Source:
    """The source of an expert, of which several parameters have equal shares: in the order of their numbers."""
    assert source.expert is not None
    share = -(-sum(places[target].shape[0] for target in targets) // len(targets))
    at = min(source.expert // share, len(targets) - 1)
    others = (*targets[:at], *targets[at + 1 :])
    return replace(source, target=targets[at], expert=source.expert - at * share, others=others, before=targets[:at])


def _transposes(converter: WeightConverter, dims: set[int]) -> bool:
    """Whether all that is done is to exchange two dimensions."""
    return all(
        isinstance(operation, Transpose) and {operation.dim0, operation.dim1} == dims
        for operation in converter.operations
    )


def _cuts_rows(converter: WeightConverter) -> bool:
    """Whether all that is done is to cut a tensor into equal pieces, one above the other."""
    return len(converter.target_patterns) > 1 and all(
        isinstance(operation, Chunk) and operation.dim == 0 for operation in converter.operations
    )


def _part(converter: WeightConverter, pattern: str) -> int | None:
    stack, *others = converter.operations
    if isinstance(stack, _SHARING_OUT) and not others:
        return int(converter.source_patterns.index(pattern)) if (stack.stack_dim, stack.concat_dim) == (0, 1) else None
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
