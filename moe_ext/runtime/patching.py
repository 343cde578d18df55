"""Patch and unpatch: puts the operators behind a Hugging Face model's MoE layers, in place and reversibly.

The experts go through transformers' own door: ``moe_ext`` is an experts implementation next to ``eager`` and
``grouped_mm``, selected with ``model.set_experts_implementation``; where a family has no such door, the forward of its
experts is replaced on the instance. Weights stay the model's own parameters, uncopied.
The router's forward is replaced on the instance: where the ``route`` operator computes the family's routing, as numbers
show (:mod:`moe_ext.models.router_formula`), scores, top-K, renormalisation and skipping are one operator; elsewhere the
family's own code runs and the skip rule follows it. Where
gradients are required, both run transformers' own differentiable code.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_ext import ops
from moe_ext.models.blocks import MoeBlock, evaluation_mode, layer_numbers, moe_blocks
from moe_ext.models.boundary import eager_forward, goes_through_interface, num_experts, num_routed
from moe_ext.models.config_section import (
    SCALE_KEY,
    THRESHOLDS_KEY,
    GateScale,
    check_thresholds,
    is_scale,
    scale_in_config,
    section_of,
    section_with,
    section_with_scale,
    set_section,
    thresholds_in_config,
)
from moe_ext.models.direct_experts import block_forward, passed_on, router_code
from moe_ext.models.packed_experts import IMPLEMENTATION, packed_format
from moe_ext.models.router_formula import KnownRouter, RouterFormula, known_router
from moe_ext.models.shared_out import check_shared_out, exchanges_tokens, has_some_experts, own_parts
from moe_ext.models.wrapped import unwrapped
from moe_ext.runtime.formulas import FORMULA, experts_layer, find_formula
from moe_ext.runtime.skipping import share_of_largest, skip_weak
from moe_ext.runtime.supported import check_experts, check_tensors, reason_unsupported
from moe_ext.storage.formats import shown

STATE = "_moe_ext"
"""Attribute of a patched model (:class:`_ModelState`), and of its routers and experts (:class:`LayerState`)."""


Activations = Literal["int8"]


@dataclass
class _ModelState:
    """What a patched model needs to become what it was."""

    implementation: dict[str, str | None] | None  # as transformers' get_experts_implementation returns it
    of_experts: str | None  # the one of the model's part that holds the experts
    config_entry: dict[str, Any] | None  # config.moe_ext before the patch
    thresholds: Tensor | None  # (L, K - 1) in use
    scale: GateScale = "kept"


@dataclass
class LayerState:
    """How a patched MoE layer runs; its router and its experts hold the same one.

    Attributes:
        fallback: transformers' experts implementation where gradients are required, and where ``stock`` is set.
        stock: whether the operators cannot run the experts.
        thresholds: (K - 1,) skip thresholds, or None.
        router: what the router computes; None: it runs its own code.
        scale: what becomes of the weights of experts that are kept.
        top_k: K.
        experts: the experts module.
        observer: called in the place of the ``experts`` operator during calibration.
        exchange: the hook before experts that other processes have, too.
        router_code: the router's forward, where its class's own returns other things; None: the class's own.
        activations: what the products of quantised experts take them as; None: as they are.
    """

    fallback: str
    stock: bool
    thresholds: Tensor | None
    router: KnownRouter | None
    scale: GateScale
    top_k: int
    experts: nn.Module
    observer: Any = None
    exchange: RemovableHandle | None = None
    router_code: Callable[..., Any] | None = None
    activations: Activations | None = None


def is_patched(model: PreTrainedModel) -> bool:
    return hasattr(model, STATE)


def active_thresholds(model: PreTrainedModel) -> Tensor | None:
    """Skip thresholds (L, K - 1) that a patched model applies; None if it skips nothing or is not patched."""
    state = _state_of(model)
    return None if state is None else state.thresholds


def altered_gates(model: PreTrainedModel) -> str | None:
    """How a patched model's routing weights differ from its router's own: ``"skips experts"``; None if they do not."""
    state = _state_of(model)
    if state is not None and state.thresholds is not None:
        return "skips experts"
    if state is not None and isinstance(state.scale, int):
        return f"runs with renormalise={state.scale}"
    return None


def _state_of(model: PreTrainedModel) -> _ModelState | None:
    return getattr(model, STATE, None)


def layer_state(block: MoeBlock) -> LayerState:
    """How a block of a patched model runs."""
    return cast(LayerState, getattr(block.experts, STATE))


def patch(
    model: PreTrainedModel,
    *,
    skip: Tensor | Literal["config"] | None = "config",
    strict: bool = True,
    renormalise: GateScale | Literal["config"] = "config",
    activations: Activations | None = None,
) -> PreTrainedModel:
    """Runs a model's MoE layers on moe_ext's operators, in place. Patching again replaces the skip thresholds.

    Args:
        model: a supported transformers model (float32, bfloat16 or float16), on a device that has kernels; compiled by
            ``torch.compile``, wrapped by DistributedDataParallel or by PEFT or not.
        skip: thresholds (L, K - 1) for dynamic expert skipping, from :func:`moe_ext.skip_thresholds`; they are also
            written into ``model.config``, so that ``save_pretrained`` keeps them. "config" (default): those that the
            config holds, if it holds any. None: no skipping by this model object; thresholds that a checkpoint brought
            stay in its config.
        strict: False leaves experts that the operators cannot run (an activation, layout, dtype or device that they do
            not have) on transformers' implementation, with one warning that says why. Their routers are patched all
            the same; skipping a slot then saves no time in them.
        renormalise: what becomes of a token's routing weights when some of its experts are skipped. "kept": the kept
            ones are scaled to sum to what all K summed to, as arXiv 2402.14800 does. "none": they stay as they are, for
            routers that were trained without renormalisation (arXiv 2610.41366). K2, from K to E: they are the softmax
            over the K2 largest logits, K of them used (arXiv 2609.04575), for models that run with fewer experts a
            token than they were trained with; for routers that take the softmax over the selected logits. Like
            thresholds it is written into ``model.config``. "config" (default): what the config holds; "kept" if
            nothing, or with ``skip=None``.
        activations: "int8", for experts quantised to int8, int4 or mxfp4, on the CPU: what they multiply is rounded to
            8 bits, 128 columns a scale. Faster where unpacking weights is what takes the time, and an error of its own
            (docs/quantisation.md). It stays with this model object. None: activations as they are.

    Returns:
        The same model.

    Raises:
        TypeError: not a transformers model.
        ValueError: no MoE layers, an unsupported model type, weights that are not plain or not in memory, thresholds,
            ``renormalise`` or ``activations`` that do not fit or, if strict, experts that the operators cannot run. The
            model is left as it was.
    """
    inside = unwrapped(model)
    _patch_blocks(inside, moe_blocks(inside), skip, strict, renormalise, activations)
    return model


def _patch_blocks(
    model: PreTrainedModel,
    blocks: list[MoeBlock],
    skip: Tensor | Literal["config"] | None,
    strict: bool,
    renormalise: GateScale | Literal["config"] = "config",
    activations: Activations | None = None,
) -> PreTrainedModel:
    check_shared_out(model, [(block.name, block.experts) for block in blocks])
    unsupported: dict[str, str] = {}
    for block in blocks:
        with own_parts(block.experts):
            check_tensors(block)
            if (reason := reason_unsupported(block)) is not None:
                unsupported[block.name] = reason
    if unsupported and strict:
        raise ValueError(
            f"{next(iter(unsupported.values()))}. With strict=False such layers stay on transformers' implementation"
        )
    top_k = max(block.top_k for block in blocks)
    if isinstance(skip, str):
        if skip != "config":
            raise ValueError(f"skip is {skip!r}; expected thresholds, 'config' or None")
        thresholds = thresholds_in_config(model.config, layer_numbers(blocks), top_k)
    else:
        thresholds = None if skip is None else check_thresholds(skip, len(blocks), top_k)
    for block in blocks:
        if thresholds is not None and passed_on(block.experts):
            raise ValueError(
                f"skip: {block.name} has {passed_on(block.experts)} choices beside its experts that compute nothing: "
                "its router skips experts as it was trained to, and thresholds are not for it"
            )
    scale = _scale_asked(model, blocks, renormalise, stored=skip is not None)
    _check_activations(blocks, activations)

    state = _state_of(model)
    if state is None:
        _check_unpatched(blocks)
        entry = section_of(model.config)
        implementation, of_experts = None, None
        if goes_through_interface(blocks[0].experts):
            implementation = model.get_experts_implementation()
            of_experts = cast(Any, blocks[0].experts).config._experts_implementation
        state = _ModelState(implementation, of_experts, None if entry is None else dict(entry), None)
    if state.implementation is not None:
        model.set_experts_implementation(IMPLEMENTATION)  # before anything else changes: transformers may refuse
    setattr(model, STATE, state)
    state.thresholds, state.scale = thresholds, scale
    if not isinstance(skip, str) or renormalise != "config":
        section = _section_before(model, state)
        if thresholds is not None:  # those of an earlier patch are replaced, not kept
            section = section_with(thresholds, section, layer_numbers(blocks))
        if skip is not None or renormalise != "config":
            section = section_with_scale(scale, section)
        set_section(model.config, section)
    # Ours, where a model was loaded with it by name, has no backward.
    named = "eager" if state.of_experts in (None, IMPLEMENTATION) else state.of_experts
    for layer, block in enumerate(blocks):
        stock = block.name in unsupported
        own = LayerState(
            fallback=named,
            stock=stock,
            thresholds=None if thresholds is None else thresholds[layer, : block.top_k - 1].clone(),
            router=known_router(block),
            scale=scale,
            top_k=block.top_k,
            experts=block.experts,
            router_code=router_code(block.experts),
            activations=activations,
        )
        setattr(block.experts, STATE, own)
        setattr(block.router, STATE, own)
        if not stock:
            setattr(block.experts, FORMULA, find_formula(block.experts))
        for module, forward in _replaced(block):
            # Below accelerate's hooks where there are any: they bring the weights.
            setattr(module, "_old_forward" if hasattr(module, "_hf_hook") else "forward", forward)
        if has_some_experts(block.experts):
            own.exchange = block.experts.register_forward_pre_hook(partial(_for_exchange, model))
    if unsupported:
        first, *others = unsupported.values()
        more = f" (and {len(others)} more such layers)" if others else ""
        warnings.warn(f"{first}{more}: left on transformers' {named!r} experts", stacklevel=3)
    return model


def _replaced(block: MoeBlock) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The modules of a block whose forward is another one while it is patched, and which. No bound methods: these would
    not unpickle."""
    found: list[tuple[nn.Module, Callable[..., Any]]] = [(block.router, partial(_router_forward, block.router))]
    if not goes_through_interface(block.experts):
        found.append((block.experts, partial(_direct_forward, block.experts)))
    if (forward := block_forward(block.module, block.experts)) is not None:
        found.append((block.module, forward))
    return found


def _scale_asked(
    model: PreTrainedModel, blocks: list[MoeBlock], renormalise: GateScale | Literal["config"], *, stored: bool
) -> GateScale:
    """The gate scale of a patch; ValueError for one that the model cannot have."""
    if renormalise == "config":
        scale: GateScale = scale_in_config(model.config) if stored else "kept"
    elif is_scale(renormalise):
        scale = renormalise
    else:
        raise ValueError(
            f"renormalise is {shown(renormalise)}; expected 'kept', 'none', a number of experts, or 'config'"
        )
    if isinstance(scale, str):
        return scale
    for block in blocks:
        known = known_router(block)
        if known is None or known.formula != RouterFormula() or known.is_corrected:
            raise ValueError(
                f"renormalise is {scale}: a number is for routers that take the softmax over the selected logits, and "
                f"that of {block.name} does not"
            )
        if not block.top_k <= scale <= block.num_routed:
            raise ValueError(
                f"renormalise is {scale}; expected {block.top_k} to {block.num_routed} (top_k to the experts of "
                f"{block.name})"
            )
    return scale


def _check_activations(blocks: list[MoeBlock], activations: Activations | None) -> None:
    """ValueError if a layer's products cannot take activations in that type."""
    if activations is None:
        return
    if activations != "int8":
        raise ValueError(f"activations is {shown(activations)}; expected 'int8' or None")
    for block in blocks:
        form = packed_format(block.experts)
        if form is None or form.type == "fp8":
            held = "float weights" if form is None else "fp8 weights"
            raise ValueError(
                f"activations is 'int8', and {block.name} has {held}: quantise its experts to int8, int4 or mxfp4 "
                "first (moe_ext.quantize), or leave activations as they are"
            )
        if (device := block.experts.down_proj.device).type != "cpu":
            raise ValueError(f"activations is 'int8', and {block.name} is on {device}: only the CPU's kernels take it")


def _check_unpatched(blocks: list[MoeBlock]) -> None:
    """ValueError if a block is patched already, through another model object, or has a forward of its own."""
    for block in blocks:
        if hasattr(block.router, STATE):
            raise ValueError(f"{block.name} is patched already as part of another model; unpatch that one first")
        for module, _ in _replaced(block):
            if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
                name = "router" if module is block.router else type(module).__name__
                raise ValueError(f"{block.name}: the {name}'s forward was replaced on the instance; patch before that")


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes :func:`patch`, thresholds in the config included. A model that is not patched is returned as it is."""
    inside = unwrapped(model)
    if _state_of(inside) is not None:
        _unpatch_blocks(inside, moe_blocks(inside))
    return model


def _unpatch_blocks(model: PreTrainedModel, blocks: list[MoeBlock]) -> PreTrainedModel:
    state = cast(_ModelState, _state_of(model))
    for block in blocks:
        for module, _ in _replaced(block):
            if hasattr(module, "_hf_hook"):
                module._old_forward = MethodType(type(module).forward, module)  # type: ignore[assignment]
            else:
                del module.forward
        if (exchange := layer_state(block).exchange) is not None:
            exchange.remove()
        delattr(block.router, STATE)
        delattr(block.experts, STATE)
        vars(block.experts).pop(FORMULA, None)
    if any(packed_format(block.experts) is not None for block in blocks):  # which transformers cannot run
        model.set_experts_implementation(IMPLEMENTATION)
    elif state.implementation is not None:
        model.set_experts_implementation(state.implementation)
    _restore_config_entry(model, state)
    delattr(model, STATE)
    return model


@contextmanager
def patched(model: PreTrainedModel, blocks: list[MoeBlock], *, strict: bool = True) -> Iterator[None]:
    """A model that skips nothing, patched if it was not, and in evaluation mode; as it was on the way out."""
    was_patched = is_patched(model)
    if not was_patched:
        _patch_blocks(model, blocks, None, strict)
    try:
        with evaluation_mode(model):
            yield
    finally:
        if not was_patched:
            _unpatch_blocks(model, blocks)


def _restore_config_entry(model: PreTrainedModel, state: _ModelState) -> None:
    set_section(model.config, _section_before(model, state))


def _section_before(model: PreTrainedModel, state: _ModelState) -> dict[str, Any] | None:
    """The config's section with what it said of skipping before the patch; of the rest, which a job on the patched
    model may have written, what it says now."""
    before, section = state.config_entry, dict(section_of(model.config) or {})
    for key in (THRESHOLDS_KEY, SCALE_KEY):
        section.pop(key, None)
        if before is not None and key in before:
            section[key] = before[key]
    return section if section or before is not None else None


def _experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation ``moe_ext`` of transformers' interface: (T, H), (T, K), (T, K) -> (T, H)."""
    state: LayerState | None = getattr(self, STATE, None)  # None: selected by name, without patch
    observer = None if state is None else state.observer
    if state is not None and state.stock:
        if observer is not None:
            observer.observe(hidden_states, top_k_index, top_k_weights)
        return _stock_forward(self, state, hidden_states, top_k_index, top_k_weights)
    # Asked first: collecting the module's parameters takes longer than anything else here.
    if ops.gradients_possible() and ops.gradients_required(
        hidden_states, top_k_weights, *self.parameters(recurse=False)
    ):
        if packed_format(self) is not None:
            raise NotImplementedError(
                "the experts are quantised, and gradients are required, which are not computed through them: run the "
                "model under torch.no_grad()"
            )
        return _stock_forward(self, state, hidden_states, top_k_index, top_k_weights)
    if state is None:  # nobody has checked this module
        check_experts("experts", self)
    layer = experts_layer(self)
    x = layer.taken(hidden_states)
    run, options = ops.experts if observer is None else observer, layer.options()
    if state is not None and state.activations is not None:
        options["activation_type"] = state.activations
    out = run(x, layer.gate_up, layer.down, top_k_index, top_k_weights, layer.activation, **options)
    return cast(Tensor, out.to(hidden_states.dtype))


def _direct_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A patched experts module that is called past transformers' interface."""
    if not passed_on(self):
        return _experts_forward(self, hidden_states, top_k_index, top_k_weights)
    beyond = top_k_index >= (count := num_experts(self))  # (T, K): the token as it is
    kept = top_k_weights.masked_fill(beyond, 0.0)
    out = _experts_forward(self, hidden_states, top_k_index.clamp(max=count), kept)
    return out + (hidden_states * (top_k_weights - kept).sum(-1, keepdim=True)).to(out.dtype)


def _for_exchange(model: PreTrainedModel, experts: nn.Module, args: Any) -> Any:
    """Before experts that slots are sent to: they count experts without a place for the skipped. Such a slot goes to
    the token's strongest expert instead; its weight is 0."""
    x, top_k_index, top_k_weights = args
    training = torch.is_grad_enabled() and x.requires_grad
    if not exchanges_tokens(model, training):
        return None
    strongest = top_k_index.gather(-1, top_k_weights.detach().abs().argmax(-1, keepdim=True))
    return x, torch.where(top_k_index == num_routed(experts), strongest, top_k_index), top_k_weights


def _stock_forward(
    experts: nn.Module, state: LayerState | None, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers ran before the patch."""
    run: Any = ALL_EXPERTS_FUNCTIONS.get("eager" if state is None else state.fallback, eager_forward(experts))
    # Not every implementation knows the sentinel; a skipped slot's weight is 0, so any expert does.
    top_k_index = top_k_index.masked_fill(top_k_index == num_experts(experts), 0)
    return cast(Tensor, run(experts, hidden_states, top_k_index, top_k_weights))


def _router_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """A patched router: logits (T, E), weights (T, K), experts (T, K) int64, E where a slot is skipped."""
    state = cast(LayerState, getattr(self, STATE))
    thresholds, known, scale = state.thresholds, state.router, state.scale
    count, top_k = num_routed(state.experts), state.top_k
    if thresholds is not None and thresholds.device != hidden_states.device:
        thresholds = state.thresholds = thresholds.to(hidden_states.device)
    if known is None or not known.runs(hidden_states, args, kwargs) or _differentiates(known, self, hidden_states):
        own = state.router_code or type(self).forward
        output: tuple[Tensor, ...] = own(self, hidden_states, *args, **kwargs)
        if thresholds is None and not isinstance(scale, int):
            return output
        logits, weights, experts, *more = output
        if isinstance(scale, int):
            weights = (weights * share_of_largest(logits, top_k, scale)).to(weights.dtype)
        if thresholds is not None:
            weights, experts = skip_weak(weights, experts, thresholds, count, rescale=scale == "kept")
        return logits, weights, experts, *more
    logits = known.logits(self, hidden_states)  # (T, E)
    correction = known.correction(self, args, kwargs)
    if scale == "kept":
        return logits, *_routed(known.formula, logits, top_k, thresholds, correction)
    # The operator scales; what is scaled otherwise is made of its output, which is small.
    chosen = scale if isinstance(scale, int) else top_k
    weights, experts = _routed(known.formula, logits, chosen, None, correction)
    weights, experts = weights[:, :top_k].contiguous(), experts[:, :top_k].contiguous()
    if thresholds is not None:
        weights, experts = skip_weak(weights, experts, thresholds, count, rescale=False)
    return logits, weights, experts


def _differentiates(known: KnownRouter, router: nn.Module, hidden_states: Tensor) -> bool:
    return ops.gradients_possible() and ops.gradients_required(hidden_states, *known.tensors(router))


def _routed(
    formula: RouterFormula, logits: Tensor, top_k: int, thresholds: Tensor | None, correction: Tensor | None
) -> tuple[Tensor, Tensor]:
    groups = formula.groups, formula.groups_per_token, formula.group_best, formula.outside_zero
    of_sum = formula.epsilon, formula.least, formula.scale
    given = (thresholds, formula.renormalise, formula.score, correction, formula.by_logits, *groups, *of_sum)
    return ops.route(logits, top_k, *given)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
