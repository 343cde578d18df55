"""Reconstruction search: the subset of every layer's experts whose output is nearest to that of all of them
(arXiv 2402.14800, section 3.2), without running a layer once a subset.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import MoeBlock, decoder_layers, evaluation_mode, model_type_of, moe_blocks, refuse_offloaded
from moe_ext.models.config_section import check_thresholds, thresholds_in_config
from moe_ext.reconstruction.budgets import counts_per_layer, share_out
from moe_ext.reconstruction.layer_search import LayerSearch, RouterMasks
from moe_ext.reconstruction.progress import SearchProgress
from moe_ext.reconstruction.result import SearchResult
from moe_ext.runtime.batches import check_batch
from moe_ext.runtime.hidden_states import Options, waiting_states
from moe_ext.runtime.layer_walk import LayerInputs
from moe_ext.runtime.patching import active_thresholds, is_patched, patch, unpatch
from moe_ext.runtime.processes import check_same, place_among, share_of
from moe_ext.storage.digests import joined_digest, tensor_bytes, text_digest
from moe_ext.version import __version__

METHODS = ("layerwise", "progressive", "greedy")
BUDGETS = ("layer", "model")


def search(
    model: PreTrainedModel | str | os.PathLike[str],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    keep: int | Sequence[int] | None = None,
    ratio: float | None = None,
    method: Literal["layerwise", "progressive", "greedy"] = "layerwise",
    budget: Literal["layer", "model"] = "layer",
    skip: Tensor | Literal["config"] | None = None,
    max_subsets: int = 50_000,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    dataset: str = "",
    distributed: bool = False,
    **from_folder: Any,
) -> SearchResult:
    """The experts to keep by reconstruction loss (arXiv 2402.14800, section 3.2).

    The loss of keeping subset R in a layer is ``||F(x) - F_R(x)||_F``, F_R routing with the other experts' logits at
    minus infinity; the norm is taken of each calibration batch and summed over them, as the paper's published code
    does. It is computed in float64 from the Gram matrices of the experts' outputs, as the model's dtype rounds them:
    all experts run once over all tokens, and nothing runs once a subset. Equal losses: the lexicographically first set
    of dropped experts.

    Memory beside the model: some hundred megabytes, whatever the number of tokens; hidden states, and for greedily
    searched layers a token's products, that need more lie in a temporary file. From a checkpoint folder, hidden states
    are in memory or where ``scratch`` says.

    Args:
        model: a model that :func:`moe_ext.patch` supports and whose router takes the softmax over the selected logits.
            Patched or not, it is left as it was; it is not pruned. Or a checkpoint folder: its decoder layers are then
            in memory one at a time, and the result is that of the loaded model.
        batches: mappings with ``input_ids`` (B, S) and optionally ``attention_mask`` (B, S); tokens whose mask is 0 are
            padding and count in no loss. All are read before the search begins.
        keep: experts that every layer keeps, K to E; or a list of one number for each layer. Exactly one of ``keep``
            and ``ratio`` is given.
        ratio: share of the experts removed, in [0, 1): ``floor(ratio * E + 0.5)`` of every layer.
        method: "layerwise": every layer is judged on what the unpruned model gives it. "progressive": layers in order,
            each judged on what the already pruned layers before it give it, against its own output with all experts.
            Both evaluate every subset, up to ``max_subsets`` of them in a layer. "greedy": as layerwise, but a layer
            drops one expert after the other, and the set is refined by swaps of two: a heuristic, for layers with many
            experts. ``SearchResult.losses[layer].is_exact`` says which it was.
        budget: "layer": every layer keeps its number. "model": the layers keep as many in all, shared out by how the
            loss of each grows (greedily on the lower convex hulls of the layers' losses), K at least in each. Not with
            "progressive", whose layers are judged one after the other: pass its ``keep`` the numbers found layerwise.
        skip: (L, K - 1) skip thresholds, to judge layers that are pruned and also skip; "config": those that the
            model's config holds; None: no skipping. In "progressive" the layers before skip, too.
        max_subsets: subsets of one size up to which all of them are evaluated; a layer with more is searched greedily.
        resume: a safetensors file that every finished layer is added to. If it is there already, from a search that was
            interrupted, its layers are not searched again; the result is the same. The decoder layers before the next
            one run again, unless a checkpoint folder's hidden states lie in a ``scratch`` folder.
        progress: whether to show a progress bar, with the layer and the lowest loss so far.
        dataset: a label for the text, kept in the plan.
        distributed: whether the batches are shared among the processes of torch.distributed's default group, every
            N-th whole batch to each, and the losses added up; all of them are given all batches and return the same
            result. The first one reads and writes ``resume``.
        **from_folder: for a checkpoint folder only; those of :class:`moe_ext.runtime.hidden_states.Options` but
            ``resume``.

    Returns:
        The plan, and the losses of every subset that was evaluated. With "model", or a list, the plan's layers keep
        different numbers.

    Raises:
        ValueError: an argument is not as above, a malformed batch, no counted token, a model that is skipping, losses
            that are not finite (the layer is named), or a ``resume`` file of another search (says what differs).
        MemoryError, OSError: hidden states for which there is no room, or a checkpoint that cannot be read.
        RuntimeError: a process of the group is gone, or does not answer in time.
    """
    asked: dict[str, Any] = {"keep": keep, "ratio": ratio, "method": method, "budget": budget, "skip": skip}
    asked |= {"max_subsets": max_subsets, "resume": resume, "progress": progress, "dataset": dataset}
    asked["distributed"] = distributed
    if isinstance(model, str | os.PathLike):
        options = Options(**from_folder)
        with LayersOnDisk(
            Path(model), dtype=options.dtype, device=options.device, read_ahead=options.read_ahead
        ) as layers:
            return _search(layers.model, batches, layers, options, **asked)
    if from_folder:
        raise TypeError(f"{next(iter(from_folder))}: is for a checkpoint folder; this model is in memory")
    return _search(model, batches, None, None, **asked)


def _search(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    on_disk: LayersOnDisk | None,
    options: Options | None,
    *,
    keep: int | Sequence[int] | None,
    ratio: float | None,
    method: Literal["layerwise", "progressive", "greedy"],
    budget: Literal["layer", "model"],
    skip: Tensor | Literal["config"] | None,
    max_subsets: int,
    resume: str | os.PathLike[str] | None,
    progress: bool,
    dataset: str,
    distributed: bool,
) -> SearchResult:
    """:func:`search`, of a model in memory or one whose layers are on the disk."""
    blocks = _check_model(model)
    num_experts, top_k = blocks[0].num_experts, blocks[0].top_k
    counts = counts_per_layer(keep, ratio, len(blocks), num_experts, top_k)
    if method not in METHODS or budget not in BUDGETS:
        raise ValueError(f"method and budget are {method!r} and {budget!r}; expected one of {METHODS} and {BUDGETS}")
    if method == "progressive" and budget == "model":
        raise ValueError(
            "budget: 'model' shares out by the losses of all layers, and progressive knows those of earlier ones only; "
            "search layerwise with budget='model', then progressive with keep=[len(kept) for kept in plan.keep]"
        )
    thresholds = _thresholds(model, skip, len(blocks), top_k)
    listed = list(batches)
    counted = [check_batch(index, batch) for index, batch in enumerate(listed)]
    tokens = sum(
        batch["input_ids"].numel() if mask is None else int(mask.sum())
        for batch, mask in zip(listed, counted, strict=True)
    )
    if tokens == 0:
        raise ValueError("no token was counted: 'batches' is empty, or every token is padding")

    asked: dict[str, Any] = {
        "method": method,
        "budget": budget,
        **({"ratio": ratio} if ratio is not None else {"keep": keep if isinstance(keep, int) else counts}),
        "max_subsets": max_subsets,
        "skip": None if thresholds is None else thresholds.tolist(),
        "dataset": dataset,
        "tokens": tokens,
    }
    text, of_model = text_digest(listed), _digest_of_model(model, blocks, on_disk)
    if distributed:
        check_same(text, "the processes search over different text")
        listed, counted = list(share_of(listed)), list(share_of(counted))
    layers = LayerSearch(blocks, counts, method, budget, thresholds, max_subsets, distributed)
    record = SearchProgress(resume, {**asked, "model": of_model, "text": text}, distributed)
    found = record.layers
    left = [layer for layer in range(len(blocks)) if layer not in found]
    states, position = None, 0
    if on_disk is not None and options is not None:
        _, _, of_block = decoder_layers(model, blocks)
        job = joined_digest([__version__, json.dumps(asked), text, of_model, place_among()])
        reached = of_block[left[0]] if left else 0
        waiting = listed if left else []
        states, position = waiting_states(
            on_disk, waiting, options.scratch, job, reached, hold=False, show=progress and bool(left)
        )
    bar = tqdm(total=len(left) * len(listed), desc="search", unit="batch", disable=not progress)
    need = None if on_disk is None else on_disk.need
    with (
        bar,
        torch.no_grad(),
        _prepared(model),
        LayerInputs(model, blocks, listed, states=states, need=need, position=position) as inputs,
        RouterMasks() as masks,
    ):
        for layer, block in enumerate(blocks):
            if layer in left:
                found[layer] = layers.search(layer, inputs, counted, bar)
                record.write()
            if method == "progressive":
                kept = torch.zeros(num_experts, dtype=torch.bool)
                kept[list(found[layer].best(counts[layer])[0])] = True
                masks.add(block, kept, None if thresholds is None else thresholds[layer])

    losses = tuple(found[layer] for layer in range(len(blocks)))
    if budget == "model":
        curves = [[layer.best(size)[1] for size in range(num_experts, top_k - 1, -1)] for layer in losses]
        counts = share_out(curves, sum(counts), num_experts)
    chosen = [layer.best(count) for layer, count in zip(losses, counts, strict=True)]
    plan = PruningPlan(
        model_type=model_type_of(model),
        num_experts=num_experts,
        top_k=top_k,
        layers=tuple(block.name for block in blocks),
        keep=tuple(kept for kept, _ in chosen),
        made_by={
            "criterion": f"reconstruction loss, {method}",
            **asked,
            "losses": [loss for _, loss in chosen],
            "exact": [layer.is_exact(count) for layer, count in zip(losses, counts, strict=True)],
            "moe_ext": __version__,
        },
    )
    result = SearchResult(plan, losses)
    if states is not None:
        states.remove()
    record.finish(plan)
    return result


def _thresholds(
    model: PreTrainedModel, skip: Tensor | Literal["config"] | None, layers: int, top_k: int
) -> Tensor | None:
    """(L, K - 1) float32 or None; ValueError if they do not fit, or the config has none."""
    if skip is None:
        return None
    if not isinstance(skip, str):
        return check_thresholds(skip, layers, top_k)
    if skip != "config":
        raise ValueError(f"skip is {skip!r}; expected thresholds, 'config' or None")
    found = thresholds_in_config(model.config, layers, top_k)
    if found is None:
        raise ValueError(f"skip: {model.config.name_or_path} holds no skip thresholds; moe-ext skip sets them")
    return found


def _check_model(model: PreTrainedModel) -> list[MoeBlock]:
    if active_thresholds(model) is not None:
        raise ValueError("the model skips experts; patch(model, skip=None) before searching, and pass skip=thresholds")
    blocks = moe_blocks(model)
    refuse_offloaded(blocks, "search")
    for block in blocks:
        if not block.family.fused or block.family.renormalise is not True or block.has_novices:
            raise ValueError(
                f"{block.name}: search evaluates routers that take the softmax over the selected logits, and this one "
                f"routes otherwise; use calibrate, score and plan"
            )
    if len({(block.num_experts, block.top_k) for block in blocks}) > 1:
        raise ValueError("the model's layers have different numbers of experts; search takes the same in every layer")
    return blocks


@contextmanager
def _prepared(model: PreTrainedModel) -> Iterator[None]:
    """The model patched, without skipping, and in evaluation mode; as it was on the way out."""
    was_patched = is_patched(model)
    if not was_patched:
        patch(model, skip=None)
    try:
        with evaluation_mode(model):
            yield
    finally:
        if not was_patched:
            unpatch(model)


def _digest_of_model(model: PreTrainedModel, blocks: Sequence[MoeBlock], on_disk: LayersOnDisk | None) -> str:
    """Tells models apart by their type, dtype, layers and routers: experts are too many to read for this. Checkpoints
    by their files' names, sizes and times."""
    digest = hashlib.sha256(f"{model_type_of(model)} {model.dtype}".encode())
    for block in blocks:
        digest.update(block.name.encode())
        if on_disk is None:
            digest.update(tensor_bytes(next(block.router.parameters())))
    if on_disk is not None:
        digest.update(on_disk.fingerprint().encode())
    return digest.hexdigest()
