"""The gradients of a language model's loss for the outputs of its MoE layers, one decoder layer after the other.

Forward once, with the hidden states before every decoder layer kept; then the head's gradient; then every decoder layer
from the last one on runs again, by transformers' differentiable path, and its own backward pass takes the gradient on.
In memory at a time: what one layer's forward pass of one batch leaves for its backward pass, and the hidden states, or
the part of them that is not in a file. A model on disk has every layer loaded twice.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.models.blocks import MoeBlock, decoder_layers, refuse_several_in_a_layer
from moe_ext.runtime.base_forward import alone, run_base
from moe_ext.runtime.course import Course, course_of, split_state, unwritten
from moe_ext.runtime.head_gradients import Labels, check_head, head_gradient
from moe_ext.runtime.hidden_states import MEMORY
from moe_ext.runtime.layer_walk import LayerInputs
from moe_ext.storage.spilled_tensors import SpillingList

SeenBackwards = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with the index of a batch, the experts' input (T, H), the router's logits (T, E) and the gradient (T, H) for
the experts' output."""


class KeptStates:
    """Hidden states before every decoder layer but the first; all of them stay, and what layers return beside them."""

    def __init__(self, batches: int, memory: int, folder: str | os.PathLike[str] | None) -> None:
        self._list, self._batches, self._layer = SpillingList(memory, folder), batches, 0
        self._seconds = SpillingList(memory // 4, folder)

    def read(self, batch: int) -> Tensor:
        return self.before(self._layer, batch)

    def before(self, layer: int, batch: int) -> Tensor:
        """Those before a layer; after the last one, before the layer that would follow."""
        return self._list[(layer - 1) * self._batches + batch]

    def write(self, batch: int, states: Tensor) -> None:
        assert len(self._list) == self._layer * self._batches + batch
        self._list.append(states)

    def write_second(self, batch: int, second: Tensor | None) -> None:
        """What the layer returns beside the hidden states of a batch; before :meth:`write`."""
        assert len(self._seconds) == self._layer * self._batches + batch
        self._seconds.append(torch.empty(0) if second is None else second)

    def second_before(self, layer: int, batch: int) -> Tensor | None:
        """What the layer before that one returned beside the hidden states."""
        second = self._seconds[(layer - 1) * self._batches + batch]
        return None if second.is_floating_point() else second

    def turn(self) -> None:
        self._layer += 1

    def close(self) -> None:
        self._list.close()
        self._seconds.close()

    def remove(self) -> None:
        self.close()


class OutputGradients:
    """Walks through a model's decoder layers in order, and then back; a context manager that gives memory back.

    Args:
        model: in evaluation mode, with a language model head.
        blocks: its MoE layers.
        batches: arguments of the model's forward, with ``input_ids``.
        counted: of every batch, the tokens (B * S,) that are no padding, or None: all. Padding has no label.
        numbers: of every batch, its number among those of all processes: its labels depend on it.
        memory: bytes of hidden states that are kept in memory; more go to a temporary file.
        folder: for that file.
        need: called with the index of a decoder layer before it runs and the step to the next one, for models whose
            weights are not all in memory.
        ran: called after every batch in every layer, with the name of what was done.

        course: of the model's forward passes over the batches; found out if absent.

    Raises:
        ValueError: the model predicts no tokens, or hidden states, and integers that layers return beside them, are
            not all that its decoder layers are given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[MoeBlock],
        batches: Sequence[Mapping[str, Tensor]],
        counted: Sequence[Tensor | None],
        labels: Labels,
        *,
        numbers: Sequence[int] | None = None,
        memory: int = MEMORY,
        folder: str | os.PathLike[str] | None = None,
        need: Callable[[int, int], None] | None = None,
        ran: Callable[[str], None] = lambda what: None,
        course: Course | None = None,
    ) -> None:
        check_head(model)
        self._course = course or course_of(model, blocks, batches)
        if not self._course.pairs:
            self._course.refuse_obstacles("loss: 'fisher'", "search by loss='reconstruction'")
        self._model, self._blocks, self._batches, self._counted = model, blocks, batches, counted
        self._labels, self._numbers = labels, range(len(batches)) if numbers is None else numbers
        _, self._layers, self._layer_of_block = decoder_layers(model, blocks)
        refuse_several_in_a_layer(blocks, self._layer_of_block, "loss: 'fisher'")
        self._states = KeptStates(len(batches), memory, folder)
        self._gradients = SpillingList(memory // min(4, len(self._layers)), folder)
        self._need, self._ran = need, ran
        self._position: int | None = None  # the gradients are those for the hidden states before this layer

    def __enter__(self) -> "OutputGradients":
        return self

    def __exit__(self, *raised: object) -> None:
        self._states.close()
        self._gradients.close()

    def passes(self) -> int:
        """How often ``ran`` is called if all MoE layers are observed."""
        return len(self._batches) * (2 * len(self._layers) - self._layer_of_block[0] + 1)

    def observe(self, block: int, seen: SeenBackwards) -> None:
        """Calls ``seen`` for every batch with what enters an MoE layer and the gradient for what leaves its experts.

        Args:
            block: index of the layer; before that of an earlier call.
        """
        if self._position is None:
            self._forward()
            self._head()
            self._position = len(self._layers)
        target = self._layer_of_block[block]
        assert target < self._position
        while self._position > target + 1:
            self._back(self._position - 1, None, None)
        self._back(target, self._blocks[block], seen)

    def _forward(self) -> None:
        need = None if self._need is None else partial(_towards, self._need, 1)
        inputs = LayerInputs(
            self._model, self._blocks, self._batches, course=self._course, states=self._states, need=need
        )
        with torch.no_grad():
            for _ in self._layers:
                inputs.advance(lambda batch: self._ran("forward"))

    def _head(self) -> None:
        """The gradients for what leaves the last decoder layer."""
        last = len(self._layers) - 1
        with alone(self._layers, last, None, pairs=self._course.pairs) as replace:
            leaf: Tensor

            def enter(_: Any) -> Callable[..., Any]:
                return lambda *args, **kwargs: (leaf, None) if self._course.pairs else leaf

            replace(self._layers[last], enter)
            for batch, inputs in enumerate(self._batches):
                with torch.enable_grad():
                    leaf = self._states.before(last + 1, batch).to(self._device(last)).detach().requires_grad_()
                    output = run_base(self._model, inputs)
                    normed = output.last_hidden_state
                gradient = head_gradient(
                    self._model, output, inputs, self._counted[batch], self._labels, self._numbers[batch]
                )
                self._gradients.append(torch.autograd.grad(normed, leaf, gradient)[0])
                self._ran("head")

    def _back(self, layer: int, block: MoeBlock | None, seen: SeenBackwards | None) -> None:
        """One decoder layer's backward pass for every batch."""
        need = None if self._need is None else partial(_towards, self._need, -1)
        entered: list[Tensor] = []  # the layer's input, its output; the experts' input and output; the router's logits
        left: list[Tensor] = []
        of_experts: list[tuple[Tensor, Tensor]] = []
        of_router: list[Tensor] = []
        batch = 0

        def through(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, (others, named) = split_state(args, kwargs)
                stored = hidden if layer == 0 else self._states.before(layer, batch).to(hidden.device)
                with torch.enable_grad(), unwritten(self._layers[layer], (others, named)):
                    entered.append(stored.detach().clone().requires_grad_())
                    returned = original(entered[0], *others, **named)
                    left.append(returned[0] if self._course.pairs else returned)
                return (left[0].detach(), None) if self._course.pairs else left[0].detach()

            return forward

        def as_stored(_: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
                second = self._states.second_before(layer, batch)
                stored = self._states.before(layer, batch).to(self._device(layer))
                return stored, None if second is None else second.to(self._device(layer))

            return forward

        def around_experts(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                output: Tensor = original(x, *args, **kwargs)
                of_experts.append((x.detach(), output))
                return output

            return forward

        with alone(self._layers, layer, need, pairs=self._course.pairs) as replace, torch.no_grad():
            if self._course.pairs and layer > 0:
                replace(self._layers[layer - 1], as_stored)
            replace(self._layers[layer], through)
            handle = None
            if block is not None:
                replace(block.experts, around_experts)
                handle = block.router.register_forward_hook(lambda module, args, out: of_router.append(out[0].detach()))
            try:
                for batch, inputs in enumerate(self._batches):
                    run_base(self._model, inputs)
                    wanted = [entered[0], *(output for _, output in of_experts)]
                    known = self._gradients[batch].to(left[0].device, copy=True)  # the list's memory is written below
                    below, *of_outputs = torch.autograd.grad(left[0], wanted, known)
                    if block is not None and seen is not None:
                        if (len(of_experts), len(of_router)) != (1, 1):
                            raise RuntimeError(
                                f"{block.name}: experts and router ran {len(of_experts)} and {len(of_router)} times in "
                                "a batch; expected once"
                            )
                        x, gradient = of_experts[0][0], of_outputs[0]
                        width = x.shape[-1]
                        seen(batch, x.reshape(-1, width), of_router[0], gradient.reshape(-1, width))
                    self._gradients[batch] = below
                    for values in (entered, left, of_experts, of_router):
                        values.clear()
                    self._ran("backward")
            finally:
                if handle is not None:
                    handle.remove()
        self._position = layer

    def _device(self, layer: int) -> torch.device:
        return next(self._layers[layer].parameters()).device


def _towards(need: Callable[[int, int], None], step: int, layer: int) -> None:
    need(layer, step)
