"""Refits a model's down projections to a plan, a layer after the other, each on what the pruned layers before it give.

Where channels go, every kept expert's down projection comes nearest to the outputs that it gave with all of them. Where
experts go, the kept ones' come nearest to what makes the hidden states after the layer those of the unpruned model,
which walks through the layers beside the pruned one. The model is as it was in the end; what is found is given out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_ext.calibration.channels import check_channels, check_gram_memory
from moe_ext.calibration.routed_inputs import MEMORY, RoutedInputs
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import MoeBlock, decoder_layers, expert_tensors, refuse_several_in_a_layer
from moe_ext.models.expert_width import width_of
from moe_ext.models.replace import replace_tensor
from moe_ext.pruning.keep_experts import keep_experts
from moe_ext.pruning.refit import CHANNEL_DAMPING, FITTED_BY, OutputFit, refitted_down, ridge_for
from moe_ext.pruning.thin import thin_layer
from moe_ext.pruning.watched_experts import Watch, scale_of_experts, watching
from moe_ext.runtime.batches import check_batch
from moe_ext.runtime.course import course_of
from moe_ext.runtime.formulas import experts_layer
from moe_ext.runtime.layer_walk import LayerInputs
from moe_ext.runtime.patching import altered_gates, patched
from moe_ext.storage.spilled_tensors import SpillingList


def refitted_layers(
    model: PreTrainedModel,
    blocks: list[MoeBlock],
    plan: PruningPlan,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    need: Callable[[int], None] | None = None,
    known: Callable[[int], Tensor | None] = lambda layer: None,
    progress: bool = True,
) -> Generator[tuple[int, Tensor]]:
    """Every MoE layer's down projections (E', H, I') for a plan, in order.

    Args:
        model: unpruned, fits the plan (:func:`moe_ext.pruning.prune.check_plan`); as it was in the end.
        batches: as for :func:`moe_ext.calibrate`.
        need: as for :class:`LayerInputs`.
        known: those of a MoE layer that an earlier run found, which are then not fitted again.

    Raises:
        ValueError: no text, a model that skips experts, experts that the operators do not run, a layer whose output is
            not a sum of its experts' and others, or activations that are not finite (layer and expert are named).
        MemoryError: no room for an expert's Gram matrix.
    """
    _, _, of_block = decoder_layers(model, blocks)
    refuse_several_in_a_layer(blocks, of_block, "refit")
    refit = _Refit(model, blocks, plan, batches)
    last = of_block[-1]
    removes = any(len(keep) < block.num_experts for keep, block in zip(plan.keep, blocks, strict=True))
    given = [each.inputs for each in refit.checked]
    course = course_of(model, blocks, given)
    course.refuse_loops("refit")
    with (
        torch.no_grad(),
        patched(model, blocks),
        LayerInputs(model, blocks, given, course=course, need=need) as pruned,
        LayerInputs(model, blocks, given, course=course, need=need) as whole,
        tqdm(total=last + 1, desc="refit", unit="layer", disable=not progress) as bar,
    ):
        for layer in course.calls[: course.last_calls([last])[0] + 1]:
            if need is not None:
                need(layer)
            if removes:
                whole.advance()
            if layer not in of_block:
                pruned.advance()
                bar.update()
                continue
            index = of_block.index(layer)
            with _as_it_was(blocks[index].module):
                keep_experts(blocks[index], plan.keep[index])
                down = known(index)
                if down is None:
                    down = refit.fit(index, pruned, whole if removes else None)
                refit.put(index, down)
                if layer < last:
                    pruned.advance()
            bar.update()
            yield index, down
    refit.warn()


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Gives a module and those in it their tensors and numbers back on the way out."""
    saved = [
        (
            each,
            {name: value for name, value in vars(each).items() if type(value) is int},
            dict(each._parameters),
            dict(each._buffers),
        )
        for each in module.modules()
    ]
    try:
        yield
    finally:
        for each, numbers, parameters, buffers in saved:
            vars(each).update(numbers)
            each._parameters.update(parameters)
            each._buffers.update(buffers)


@dataclass
class _Short:
    """An expert with too few calibration tokens."""

    name: str
    tokens: int
    channels: int


@dataclass
class _Refit:
    """Fits one layer at a time.

    Raises:
        ValueError: as for :func:`refitted_layers`.
    """

    model: PreTrainedModel
    blocks: list[MoeBlock]
    plan: PruningPlan
    batches: Sequence[Mapping[str, Tensor]]
    short: list[_Short] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (altered := altered_gates(self.model)) is not None:
            raise ValueError(
                f"refit: the model {altered}, which the fit would make up for; patch(model, skip=None) before"
            )
        self.checked = [check_batch(index, batch, self.model) for index, batch in enumerate(self.batches)]
        counted = [each.inputs["input_ids"].numel() if each.counted is None else each.counted for each in self.checked]
        if not any(bool(torch.as_tensor(tokens).any()) for tokens in counted):
            raise ValueError("refit: no token to fit to; 'batches' is empty, or every token is padding")
        check_channels("energy", self.blocks)
        check_gram_memory(width_of(self.blocks[0]))

    def fit(self, layer: int, pruned: LayerInputs, whole: LayerInputs | None) -> Tensor:
        """Down projections of a layer that has the experts that it keeps, with all their channels.

        Args:
            pruned: before the layer.
            whole: past it.
        """
        block = self.blocks[layer]
        with RoutedInputs() as inputs:
            wanted = self._watched(block, inputs, pruned, whole)
            try:
                down = self._of_channels(layer, inputs)
                if whole is not None:
                    self.put(layer, down)
                    down = self._of_experts(layer, OutputFit(inputs, wanted, experts_layer(block.experts)))
            finally:
                wanted.close()
        return down

    def put(self, layer: int, down: Tensor) -> None:
        """Leaves a layer's experts their channels, with these down projections."""
        block = self.blocks[layer]
        if self.plan.channels is not None and width_of(block) == self.plan.channels.intermediate_size:
            thin_layer(block, self.plan.channels.indices(layer))
        old = expert_tensors(block)["down_proj"]
        replace_tensor(block.experts, "down_proj", old, down.to(old.device))

    def warn(self) -> None:
        """Says which experts had too few tokens."""
        if self.short:
            worst = min(self.short, key=lambda each: each.tokens / each.channels)
            warnings.warn(
                f"refit: {len(self.short)} experts had few calibration tokens and stay nearer to what they were; the "
                f"fewest: {worst.name}, {worst.tokens} for {worst.channels} channels. More text fits more",
                stacklevel=3,
            )

    def _watched(
        self, block: MoeBlock, inputs: RoutedInputs, pruned: LayerInputs, whole: LayerInputs | None
    ) -> SpillingList:
        """Fills ``inputs``; what the experts should give in every batch, if experts are removed."""
        wanted = SpillingList(MEMORY)
        scale = 1.0 if whole is None else scale_of_experts(block, pruned, self.model.dtype)
        watch = Watch(inputs, 0)

        def before(batch: int) -> None:
            mask = self.checked[batch].counted
            watch.counted = None if mask is None else mask.to(next(block.experts.parameters()).device)

        def after(batch: int, output: Tensor) -> None:
            if whole is not None:
                target = whole.states(batch).to(output.device)
                missing = ((target.float() - output.float()) / scale).flatten(0, 1)
                wanted.append(missing if watch.counted is None else missing[watch.counted])

        with watching(block, watch):
            pruned.stay(before, after)
        return wanted

    def _of_channels(self, layer: int, inputs: RoutedInputs) -> Tensor:
        """Every expert's, fitted to its own outputs; as the layer's down projections are."""
        experts, channels = experts_layer(self.blocks[layer].experts), self.plan.channels
        if channels is None:
            return experts.down.detach()
        rows = []
        for expert, kept in enumerate(channels.indices(layer)):
            down = experts.outputs(expert).detach()
            gram, tokens = inputs.gram(expert, experts)
            self._count(layer, expert, tokens, len(kept), 1)
            if not bool(gram.isfinite().all()):
                raise ValueError(f"refit: {self._name(layer, expert)} gave activations that are not finite")
            if bool(gram.diagonal().any()):
                damping = CHANNEL_DAMPING * float(ridge_for(torch.tensor(tokens), len(kept), 1))
                rows.append(refitted_down(gram, down, kept, damping=damping))
            else:
                rows.append(down[:, kept.to(down.device)])
        stacked = torch.stack(rows)  # (E, H, I')
        return stacked.mT.contiguous() if experts.formula.transposed else stacked

    def _of_experts(self, layer: int, fit: OutputFit) -> Tensor:
        """All experts', fitted to what they should give together."""
        try:
            down = fit.fit()
        except ValueError as error:
            raise ValueError(f"refit: {self.blocks[layer].name}: {error}") from None
        for expert, tokens in enumerate(fit.tokens.tolist()):
            self._count(layer, expert, tokens, fit.channels, FITTED_BY)
        return down

    def _count(self, layer: int, expert: int, tokens: int, channels: int, enough: int) -> None:
        if tokens < enough * channels:
            self.short.append(_Short(self._name(layer, expert), tokens, channels))

    def _name(self, layer: int, expert: int) -> str:
        return f"{self.blocks[layer].name}, expert {self.plan.keep[layer][expert]}"
