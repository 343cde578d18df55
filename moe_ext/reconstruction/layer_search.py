"""Searches one layer at a time, and routes as if layers were pruned already."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_ext.models.blocks import MoeBlock, router_digest
from moe_ext.models.layout import Layout
from moe_ext.models.router_formula import RouterFormula, known_router
from moe_ext.models.sliced_router import SlicedRouter
from moe_ext.reconstruction.budgets import allowed_sizes
from moe_ext.reconstruction.losses import LayerErrors, projected, ranked
from moe_ext.reconstruction.request import SearchRequest
from moe_ext.reconstruction.result import LayerLosses
from moe_ext.reconstruction.routed_errors import RoutedErrors, RouterCall
from moe_ext.reconstruction.router_formula import ranks_stay, route_among
from moe_ext.reconstruction.subsets import GreedySearch, all_subsets, count_subsets
from moe_ext.runtime.processes import check_same, total_of
from moe_ext.runtime.skipping import skip_weak


class Observable(Protocol):
    """Shows what enters an MoE layer, batch by batch: :class:`moe_ext.runtime.layer_walk.LayerInputs`, or with the
    gradient for what leaves its experts :class:`moe_ext.runtime.backward_walk.OutputGradients`."""

    def observe(self, block: int, seen: Callable[..., None]) -> None: ...


class LayerSearch:
    """Searches one layer at a time."""

    def __init__(
        self,
        blocks: Sequence[MoeBlock],
        layout: Layout,
        counts: Sequence[int],
        request: SearchRequest,
        thresholds: Tensor | None,
        distributed: bool,
        tokens: int,
        protected: Sequence[Sequence[int]],
    ) -> None:
        self.blocks, self.layout, self.counts, self.thresholds, self.tokens = blocks, layout, counts, thresholds, tokens
        self.protected = protected
        self.total: Callable[[Tensor], Tensor] = total_of if distributed else lambda losses: losses
        self.distributed = distributed
        self.num_experts, self.top_k = blocks[0].num_experts, blocks[0].top_k
        self.every_size, self.measure = request.every_size(layout), request.measure
        self.most = 0 if request.method == "greedy" else request.max_subsets

    def search(self, layer: int, inputs: Observable, counted: Sequence[Tensor | None], bar: Any) -> LayerLosses:
        """Losses of the layer's subsets; those of every size where the budget is the model's."""
        block = self.blocks[layer]
        groups = self.layout.groups
        sizes = allowed_sizes(self.layout, self.protected[layer]) if self.every_size else [self.counts[layer]]
        smallest = sizes[-1]
        # All experts are one subset: there is nothing to be greedy about.
        exact = [
            size
            for size in sizes
            if size == self.num_experts or count_subsets(self.num_experts, size, groups) <= self.most
        ]
        greedy = [size for size in sizes if size not in exact]
        depth = min(self.num_experts, self.top_k + self.num_experts - smallest)
        thresholds = None if self.thresholds is None else self.thresholds[layer]
        subsets = all_subsets(self.num_experts, exact, groups)
        how: dict[str, Any] = {"measure": self.measure, "tokens": self.tokens, "store": bool(greedy)}
        errors: LayerErrors | RoutedErrors
        known = ranks_stay(block, thresholds)
        formula = None if known is None else known.formula
        if formula is not None:
            errors = LayerErrors(subsets, self.top_k, thresholds, scale=formula.scale, **how)
        else:
            errors = RoutedErrors(block, subsets, thresholds, **how)
        bar.set_description(f"search {block.name}")
        call: RouterCall

        def routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal call
            call = RouterCall(args, kwargs)

        def seen(batch: int, x: Tensor, logits: Tensor, gradient: Tensor | None = None) -> None:
            mask = counted[batch]
            if mask is not None:
                mask = mask.to(x.device)
                x, logits, gradient = x[mask], logits[mask], None if gradient is None else gradient[mask]
            correction = None if known is None else known.correction(block.router, call.args[1:], call.kwargs)
            if isinstance(errors, RoutedErrors):
                errors.add_batch(x, call, mask, gradient, logits)
            elif gradient is None:
                errors.add_batch(ranked(block, x, logits, depth, formula, correction))
            else:
                errors.add_batch(projected(block, x, logits, gradient, depth, formula, correction))
            if smallest in exact:  # of this process's batches
                bar.set_postfix(best=f"{float(errors.losses[errors.keep.sum(1) == smallest].min()):.4g}")
            bar.update()

        handle = block.router.register_forward_hook(routed, with_kwargs=True)
        try:
            inputs.observe(layer, seen)
            if self.distributed:
                check_same(router_digest(block), f"{block.name}: the processes search different models")
            keep, losses = errors.keep, self.total(errors.losses)
            if greedy:
                walk = GreedySearch(
                    lambda subsets: self.total(errors.losses_of(subsets)),
                    self.num_experts,
                    lambda size, loss: bar.set_postfix(kept=size, best=f"{loss:.4g}"),
                    self.protected[layer],
                    groups,
                )
                walk.run(greedy)
                walked = walk.subsets()
                fresh = ~torch.isin(walked[0].sum(1), torch.tensor(exact))  # the walk passes sizes that are enumerated
                keep, losses = torch.cat([keep, walked[0][fresh]]), torch.cat([losses, walked[1][fresh]])
        finally:
            handle.remove()
            errors.close()
        if not bool(losses.isfinite().all()):
            what = (
                "activations, router logits or gradients" if self.measure == "nats" else "activations or router logits"
            )
            raise ValueError(f"layer {block.name} gave {what} that are not finite")
        return LayerLosses(keep, losses)


class RouterMasks:
    """Routers that route as if their layers were pruned already, until the ``with`` block is left."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __enter__(self) -> "RouterMasks":
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()

    def add(self, block: MoeBlock, keep: Tensor, thresholds: Tensor | None) -> None:
        """keep: (E,) bool; thresholds: (K - 1,) or None."""

        kept, known = keep.nonzero().flatten().tolist(), known_router(block)
        is_plain = known is not None and known.formula == RouterFormula() and not known.is_corrected

        def masked(module: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor, ...]) -> tuple[Any, ...]:
            logits = output[0]
            skip = None if thresholds is None else thresholds.to(logits.device)
            if is_plain:
                return logits, *route_among(logits, keep.to(logits.device), block.top_k, skip)
            # The layer's weights may be in memory for this pass only: the twin is made of those that are there.
            weights, experts, more = SlicedRouter(block).route(kept, args, kwargs)
            if skip is not None:
                weights, experts = skip_weak(weights, experts, skip, block.num_experts)
            return logits, weights, experts, *more

        self._handles.append(block.router.register_forward_hook(masked, with_kwargs=True))
