"""The course of a model's forward pass: which decoder layers it runs one after the other, what they are given, and
whether that is nothing but the hidden states that the layer before them returned.

The model's own code says so, in two dry runs whose decoder layers compute nothing: they return random hidden states,
others in each. What differs between the runs depends on what layers return.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.models.blocks import BY_STATISTICS, MoeBlock, decoder_layers, evaluation_mode
from moe_ext.runtime.base_forward import Forward, replaced_forwards, run_base


@dataclass(frozen=True)
class Course:
    """What a dry run shows.

    Attributes:
        calls: the decoder layers in the order in which a forward pass runs them; some may run more than once.
        token_bytes: of the hidden states of a token, before the first layer.
        waiting_bytes: of all that a layer is given for a token, before the last layer.
        token_shape: of the same (B, S, ...), without the first two dimensions.
        dtype: of the same.
        obstacle: why hidden states alone do not tell what a layer is given; None: they do, and every layer runs once.
        pairs: whether that is only because layers return a second thing, which the next one is given and no other.
    """

    calls: tuple[int, ...]
    token_bytes: int = 0
    waiting_bytes: int = 0
    token_shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    obstacle: str | None = None
    pairs: bool = False

    def last_calls(self, layers: Sequence[int]) -> list[int]:
        """Where in ``calls`` each of some layers runs for the last time.

        Raises:
            ValueError: one does not run.
        """
        for layer in layers:
            if layer not in self.calls:
                raise ValueError(f"decoder layer {layer} does not run in a forward pass of the model's base")
        return [len(self.calls) - 1 - self.calls[::-1].index(layer) for layer in layers]

    def refuse_obstacles(self, what: str, instead: str) -> None:
        """ValueError if a layer's input cannot be made of stored hidden states; says what to do instead."""
        if self.obstacle is not None:
            raise ValueError(
                f"{what} stores hidden states between decoder layers, and in this model {self.obstacle}: {instead}"
            )

    def refuse_loops(self, what: str) -> None:
        """ValueError if a decoder layer runs more than once."""
        for layer in self.calls:
            if (times := self.calls.count(layer)) > 1:
                raise ValueError(
                    f"{what}: decoder layer {layer} runs {times} times in a forward pass; expected once: "
                    f"{BY_STATISTICS}"
                )


class _Call(NamedTuple):
    """What a decoder layer was given."""

    layer: int
    state: Tensor
    others: Any


class _DryRun(NamedTuple):
    calls: list[_Call]
    returned: list[Tensor]
    last: Any  # of the model's last hidden states


def course_of(model: PreTrainedModel, blocks: Sequence[MoeBlock], batches: Sequence[Mapping[str, Tensor]]) -> Course:
    """The course of a model's forward passes over batches, by dry runs of the largest one of each kind.

    Args:
        batches: arguments of the model's forward. Without any the layers are taken to run once, in their order.

    Raises:
        ValueError: the model's own code fails without what its decoder layers compute.
    """
    _, layers, _ = decoder_layers(model, blocks)
    largest: dict[frozenset[str], Mapping[str, Tensor]] = {}
    for batch in batches:
        kind = frozenset(batch)
        if kind not in largest or largest[kind]["input_ids"].numel() < batch["input_ids"].numel():
            largest[kind] = batch
    courses = [_course(model, layers, batch) for batch in largest.values() if batch["input_ids"].numel()]
    if not courses:
        return Course(tuple(range(len(layers))))
    if len({course.calls for course in courses}) > 1:
        raise ValueError(f"a {type(model).__name__} runs other decoder layers for batches with other inputs")
    most = max(courses, key=lambda course: course.token_bytes)
    return next((course for course in courses if course.obstacle is not None), most)


def _course(model: PreTrainedModel, layers: Sequence[nn.Module], batch: Mapping[str, Tensor]) -> Course:
    with torch.no_grad(), evaluation_mode(model):
        first, pair = _first_dry_run(model, layers, batch)
        calls = tuple(call.layer for call in first.calls)
        state = first.calls[0].state
        tokens = batch["input_ids"].numel()
        obstacle, pairs = None, False
        if pair:
            pairs = _is_paired(model, layers, batch)
            obstacle = f"a {type(layers[calls[0]]).__name__} returns more than hidden states"
        elif not _chained(first):
            obstacle = "a decoder layer is given something other than what the one before it returned"
        elif calls != tuple(range(len(calls))):
            obstacle = f"decoder layers run in the order {shortened(calls)}"
        elif state.shape[:2] != batch["input_ids"].shape:
            obstacle = f"hidden states have shape {tuple(state.shape)} for tokens {tuple(batch['input_ids'].shape)}"
        else:
            obstacle = _difference(first, _dry_run(model, layers, batch, 1, last=len(calls)), layers)
    given = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors((first.calls[-1].state, first.calls[-1].others))
    }
    sizes = -(-state.nbytes // tokens), -(-sum(given.values()) // tokens)
    return Course(calls, *sizes, tuple(state.shape[2:]), state.dtype, obstacle, pairs)


def _is_paired(model: PreTrainedModel, layers: Sequence[nn.Module], batch: Mapping[str, Tensor]) -> bool:
    """Whether layers, which run once each and in order, are given the pair that the one before returned, and nothing
    else that depends on layers."""
    second = [torch.full((1,), call) for call in range(len(layers))]
    try:
        first = _dry_run(model, layers, batch, 0, second=second)
        other = _dry_run(model, layers, batch, 1, second=second, last=len(layers))
    except Exception:  # code that does more with it than pass it on
        return False
    if [call.layer for call in first.calls] != list(range(len(layers))) or not _chained(first):
        return False
    for call in first.calls:
        given = [number for number, mark in enumerate(second) if any(each is mark for each in _tensors(call.others))]
        if given not in ([], [call.layer - 1]):
            return False
    return first.calls[0].state.shape[:2] == batch["input_ids"].shape and _difference(first, other, layers) is None


def shortened(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return f"{shown}, ..." if len(numbers) > 12 else shown


def _first_dry_run(
    model: PreTrainedModel, layers: Sequence[nn.Module], batch: Mapping[str, Tensor]
) -> tuple[_DryRun, bool]:
    """A dry run, and whether the model's code expects pairs of its layers."""
    failed = "hidden states have another shape in every layer"
    for pairs in (False, True):
        try:
            run = _dry_run(model, layers, batch, 0, pairs=pairs)
        except Exception as error:  # whatever the model's code does with one where it expects the other
            failed = f"{type(error).__name__}: {error}"
            continue
        if len({call.state.shape for call in run.calls}) == 1:  # a tensor that is taken for a pair gives its first row
            return run, pairs
    raise ValueError(
        f"cannot tell in which order a {type(model).__name__} runs its decoder layers: its own code fails without what "
        f"they compute ({failed})"
    )


def _dry_run(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    batch: Mapping[str, Tensor],
    seed: int,
    *,
    pairs: bool = False,
    second: Sequence[Tensor] | None = None,
    last: int | None = None,
) -> _DryRun:
    """A forward pass whose decoder layers return random hidden states.

    Args:
        pairs: whether they return None beside.
        second: what every call returns beside.
        last: number of the call that returns what it returns for seed 0.
    """
    calls: list[_Call] = []
    returned: list[Tensor] = []

    def dry(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            state, others = split_state(args, kwargs)
            calls.append(_Call(index, state, others))
            generator = torch.Generator().manual_seed(2 * len(calls) + (0 if len(calls) == last else seed))
            random = torch.randn(state.shape, generator=generator).to(state)
            returned.append(random)
            if second is not None:
                return random, second[len(calls) - 1]
            return (random, None) if pairs else random

        return forward

    with replaced_forwards() as replace:
        for index, layer in enumerate(layers):
            replace(layer, partial(_instead, dry(index)))
        output = run_base(model, batch)
    return _DryRun(calls, returned, getattr(output, "last_hidden_state", None))


def _instead(forward: Forward, original: Forward) -> Forward:
    return forward


def split_state(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The hidden states that a decoder layer is given, and the other arguments, by place and by name."""
    if args:
        return args[0], (args[1:], dict(kwargs))
    others = dict(kwargs)
    return others.pop("hidden_states"), ((), others)


def _chained(run: _DryRun) -> bool:
    """Whether every layer is given what the one before it returned."""
    return all(torch.equal(call.state, before) for before, call in zip(run.returned, run.calls[1:], strict=False))


def _difference(first: _DryRun, second: _DryRun, layers: Sequence[nn.Module]) -> str | None:
    """What depends on more than the hidden states that the layer before returned."""
    shared: dict[int, int] = {}
    for one, other in zip(first.calls, second.calls, strict=True):
        kind = type(layers[one.layer]).__name__
        if (strange := _strange(one.others, other.others)) is not None:
            return f"decoder layer {one.layer} is given a {type(strange).__name__}, which layers may write to"
        if not _same(one.others, other.others):
            return f"what decoder layer {one.layer}, a {kind}, is given depends on earlier layers than the one before"
        for thing in _containers(one.others):
            if isinstance(thing, dict) and thing:
                continue  # something to read; :func:`unwritten` sees that nobody writes to it
            if shared.setdefault(id(thing), one.layer) != one.layer:
                return f"decoder layers {shared[id(thing)]} and {one.layer} share a {type(thing).__name__}"
    if not _same(first.calls[0].state, second.calls[0].state):
        return "the hidden states before the first layer are other ones every time"
    if not _same(first.last, second.last):
        return "the last hidden states depend on earlier layers than the last"
    return None


def _same(one: Any, other: Any) -> bool:
    """Whether two values are bit for bit the same; False where that cannot be told."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and isinstance(one, int | float | str) and one == other)


def _strange(one: Any, other: Any) -> Any:
    """The first object that is another one in the second run and neither a tensor nor a plain value or container."""
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = list(one.values()), list(other.values())
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return next((found for pair in zip(one, other, strict=False) if (found := _strange(*pair)) is not None), None)
    return None if one is other or isinstance(one, Tensor | int | float | str | None) else one


@contextmanager
def unwritten(layer: nn.Module, others: Any) -> Iterator[None]:
    """RuntimeError if a decoder layer writes to a dict that it is given, which later layers may read.

    Args:
        others: what it is given beside hidden states.
    """
    before = [(each, dict(each)) for each in _containers(others) if isinstance(each, dict)]
    yield
    for each, content in before:
        if each.keys() != content.keys() or any(each[key] is not value for key, value in content.items()):
            raise RuntimeError(
                f"a {type(layer).__name__} writes to a dict, which stored hidden states do not bring back"
            )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict | tuple | list):
        inside = value.values() if isinstance(value, dict) else value
        return [found for each in inside for found in _tensors(each)]
    return [value] if isinstance(value, Tensor) else []


def _containers(value: Any) -> list[Any]:
    """The containers within a layer's arguments that a layer could write to."""
    if isinstance(value, tuple):
        return [found for each in value for found in _containers(each)]
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return [value, *(found for each in inside for found in _containers(each))]
    return []
