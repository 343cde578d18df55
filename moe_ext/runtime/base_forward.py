"""Forward passes of a model without its head, with something put around the forward of some of its modules."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.models.blocks import base_of, input_device

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

Forward = Callable[..., Any]
Replace = Callable[[nn.Module, Callable[[Forward], Forward]], None]


def run_base(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Any:
    """What the model without its head returns for a batch."""
    on_device = {name: tensor.to(input_device(model)) for name, tensor in inputs.items()}
    output = base_of(model)(**on_device, use_cache=False)
    give_back_holes()
    return output


def give_back_holes() -> None:
    """Gives freed memory back to the system, where the C library can. glibc before 2.38 seldom finds a place for an
    aligned block, such as a tensor, among those that were freed: over many batches the holes would add up."""
    if _malloc_trim is not None:
        _malloc_trim(0)


@contextmanager
def replaced_forwards() -> Iterator[Replace]:
    """Yields a function that puts something around a module's forward; all of them come off again on the way out."""
    before: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    def replace(module: nn.Module, around: Callable[[Forward], Forward]) -> None:
        before.append((module, vars(module).get("forward")))
        module.forward = around(module.forward)

    try:
        yield replace
    finally:
        for module, own in reversed(before):
            if own is None:
                del module.forward
            else:
                module.forward = own


@contextmanager
def alone(
    layers: Sequence[nn.Module], index: int, need: Callable[[int], None] | None, *, pairs: bool = False
) -> Iterator[Replace]:
    """Every decoder layer but one passes its input on. Yields a function that puts something around a module's forward;
    all is as it was on the way out. Right for models of which :class:`moe_ext.runtime.course.Course` says so.

    Args:
        need: called with the index before anything is replaced.
        pairs: whether layers return a second thing, which those that pass their input on have not.
    """
    if need is not None:
        need(index)
    with replaced_forwards() as replace:
        for other, layer in enumerate(layers):
            if other != index:
                replace(layer, lambda _: _pass_on_with_nothing if pairs else _pass_on)
        yield replace


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _pass_on_with_nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return hidden_states, None
