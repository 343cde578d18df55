"""Search: the subset of every layer's experts whose output is nearest to that of all of them (arXiv 2402.14800, section
3.2), or whose difference from it matters least to what the model predicts, without running a layer once a subset.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import (
    MoeBlock,
    decoder_layers,
    layer_numbers,
    model_type_of,
    moe_blocks,
    refuse_novices,
    refuse_offloaded,
    refuse_other_sums,
    refuse_several_in_a_layer,
    refuse_shared_out,
)
from moe_ext.models.layout import Layout, layout_of
from moe_ext.models.wrapped import unwrapped
from moe_ext.reconstruction.budgets import allowed_sizes, share_out
from moe_ext.reconstruction.layer_search import LayerSearch, RouterMasks
from moe_ext.reconstruction.outliers import Outliers
from moe_ext.reconstruction.progress import SearchProgress
from moe_ext.reconstruction.request import Budget, Loss, Method, SearchRequest
from moe_ext.reconstruction.result import LayerLosses, SearchResult
from moe_ext.runtime.backward_walk import OutputGradients
from moe_ext.runtime.batches import check_batch
from moe_ext.runtime.course import Course, course_of
from moe_ext.runtime.head_gradients import LabelKind, Labels, check_head
from moe_ext.runtime.hidden_states import MEMORY, FolderOptions, room_for_all, waiting_states
from moe_ext.runtime.layer_walk import LayerInputs
from moe_ext.runtime.patching import altered_gates, patched
from moe_ext.runtime.processes import place_among, share_of
from moe_ext.runtime.same_job import check_same_job
from moe_ext.storage.digests import joined_digest, tensor_bytes, text_digest
from moe_ext.version import __version__


def search(
    model: PreTrainedModel | str | os.PathLike[str],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    keep: int | Sequence[int] | None = None,
    ratio: float | None = None,
    loss: Loss = "reconstruction",
    labels: LabelKind | None = None,
    seed: int | None = None,
    method: Method = "layerwise",
    budget: Budget | None = None,
    skip: Tensor | Literal["config"] | None = None,
    max_subsets: int = 50_000,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    dataset: str = "",
    distributed: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    read_ahead: bool | None = None,
    trust_remote_code: bool | None = None,
    statistics: ExpertStatistics | None = None,
    allow_super: bool = False,
    strict: bool = True,
) -> SearchResult:
    """The experts to keep by reconstruction loss (arXiv 2402.14800, section 3.2), or by what the model loses.

    The reconstruction loss of keeping subset R in a layer is ``||F(x) - F_R(x)||_F``, F_R routing as the pruned layer
    does; the norm is taken of each calibration batch and summed over them, as the paper's
    published code does. It is computed in float64 from the Gram matrices of the experts' outputs, as the model's dtype
    rounds them: all experts run once over all tokens, and no expert runs once a subset. Routers that take the softmax
    over the selected logits, or otherwise renormalise what they choose by, need not, either; others route among the
    experts of every subset, by their formula or their own code. Of a family with expert groups, subsets keep as many
    experts of every group. Equal losses: the lexicographically first set of dropped experts.

    With ``loss="fisher"`` it is ``1/2 mean_t (sum_e (w_R[t, e] - w[t, e]) a_t[e])^2``, with ``a_t[e] = <dL/dy_t,
    f_e(x_t)>``, w and w_R the routing weights of all experts and of R, y the experts' combined output and L the
    cross-entropy summed over tokens: to second order the nats a token by which the model's predictions move (the Fisher
    metric; what happens to different tokens is taken as independent). One forward and one backward pass, through
    transformers' differentiable path, one decoder layer at a time; the hidden states before every layer wait in
    between.

    Memory beside the model: some hundred megabytes, whatever the number of tokens; hidden states, and for greedily
    searched layers a token's products, that need more lie in a temporary file. From a checkpoint folder, hidden states
    are in memory or where ``scratch`` says.

    Args:
        model: a model that :func:`moe_ext.patch` supports. Patched or not, it is left as it was; it is not pruned. Or a
            checkpoint folder: its decoder layers are then in memory one at a time, and the result is that of the loaded
            model.
        batches: mappings with ``input_ids`` (B, S) and optionally ``attention_mask`` (B, S); tokens whose mask is 0 are
            padding and count in no loss. All are read before the search begins.
        keep: experts that every layer keeps, from what the router needs (K, or more with groups) to E; or a list of one
            number for each layer. Exactly one of ``keep`` and ``ratio`` is given.
        ratio: share of the experts removed, in [0, 1): ``floor(ratio * E + 0.5)`` of every layer, or of every group.
        loss: "reconstruction", or "fisher".
        labels: of the cross-entropy, for "fisher": "model" (default): sampled from the model's own distribution, once.
            "text": the next token of the text (the empirical Fisher metric). "kl": as "model" with random signs in the
            place of samples, an estimate of the same curvature.
        seed: of what is sampled, for "fisher"; 0 if absent.
        method: "layerwise": every layer is judged on what the unpruned model gives it. "progressive": layers in order,
            each judged on what the already pruned layers before it give it, against its own output with all experts.
            Both evaluate every subset, up to ``max_subsets`` of them in a layer. "greedy": as layerwise, but a layer
            drops one expert after the other, and the set is refined by swaps of two: a heuristic, for layers with many
            experts. ``SearchResult.losses[layer].is_exact`` says which it was.
        budget: "layer": every layer keeps its number (for "reconstruction" by default). "model" (for "fisher"): the
            layers keep as many in all, K at least in each, shared out so that the sum of their losses is the least that
            there is. Reconstruction losses are then squared errors, ``||F(x) - F_R(x)||^2`` summed over all tokens:
            norms of different layers do not add up. Not with "progressive", whose layers are judged one after the
            other: pass its ``keep`` the numbers found layerwise. With "fisher" ``plan.made_by["predicted"]`` says what
            either would cost; "layer" knows of the other only if no layer needs the greedy search for it.
        skip: (L, K - 1) skip thresholds, to judge layers that are pruned and also skip; "config": those that the
            model's config holds; None: no skipping. In "progressive" the layers before skip, too.
        max_subsets: subsets of one size up to which all of them are evaluated; a layer with more is searched greedily.
        resume: a safetensors file that every finished layer is added to. If it is there already, from a search that was
            interrupted, its layers are not searched again; the result is the same. The decoder layers before the next
            one run again, unless a checkpoint folder's hidden states lie in a ``scratch`` folder; with "fisher" both
            passes run again.
        progress: whether to show a progress bar, with the layer and the lowest loss so far.
        dataset: a label for the text, kept in the plan.
        distributed: whether the batches are shared among the processes of torch.distributed's default group, every
            N-th whole batch to each, and the losses added up; all of them are given all batches and return the same
            result. The first one reads and writes ``resume``.
        dtype, device, scratch, read_ahead, trust_remote_code: for a checkpoint folder only: the fields of
            :class:`moe_ext.runtime.hidden_states.FolderOptions`, which has what holds where one is None.
        statistics: of the model, from :func:`moe_ext.calibrate`: the super experts that they show
            (:func:`moe_ext.super_experts`, arXiv 2507.23279) are kept. Without them none is looked for; the losses see
            what an outlier does to its layer's output.
        allow_super: whether super experts may go as others do. A warning names those that the losses alone drop.
        strict: as for :func:`moe_ext.patch`, if the model is not patched. With False, experts that the operators cannot
            run are evaluated by the family's own code, one after the other.

    Returns:
        The plan, and the losses of every subset that was evaluated. With "model", or a list, the plan's layers keep
        different numbers.

    Raises:
        ValueError: an argument is not as above, statistics of another model or with more super experts in a layer than
            it keeps, a malformed batch, a token that the model does not have, no counted
            one, a model that is skipping, losses that are not finite (the layer is named), a ``resume`` file of
            another search (says what differs), or processes that differ in text, options or model (says which and in
            what).
        MemoryError, OSError: hidden states for which there is no room, or a checkpoint that cannot be read.
        RuntimeError: a process of the group is gone, or does not answer in time.
    """
    in_folder = {"dtype": dtype, "device": device, "scratch": scratch, "read_ahead": read_ahead}
    in_folder["trust_remote_code"] = trust_remote_code
    request = SearchRequest(keep, ratio, method, budget, skip, max_subsets, dataset, loss, labels, seed)
    if not isinstance(model, str | os.PathLike):
        FolderOptions.refuse(**in_folder)
        inside: PreTrainedModel = unwrapped(model)
        outliers = Outliers.of(statistics, allow_super)
        return _search(
            *(inside, moe_blocks(inside), batches, request, None, None, resume, progress, distributed),
            *(outliers, strict),
        )
    options = FolderOptions.given(**in_folder)
    with options.opened(model) as layers:
        return _search(
            *(layers.model, layers.blocks, batches, request, layers, options.scratch, resume, progress, distributed),
            *(Outliers.of(statistics, allow_super), strict),
        )


def _search(
    model: PreTrainedModel,
    blocks: list[MoeBlock],
    batches: Iterable[Mapping[str, Tensor]],
    request: SearchRequest,
    on_disk: LayersOnDisk | None,
    scratch: str | os.PathLike[str] | None,
    resume: str | os.PathLike[str] | None,
    progress: bool,
    distributed: bool,
    outliers: Outliers,
    strict: bool,
) -> SearchResult:
    """:func:`search`, of a model in memory or one whose layers are on the disk."""
    _check_model(model, blocks)
    layout = layout_of(model, blocks)
    counts = request.counts(layout)
    thresholds = request.thresholds(model, layer_numbers(blocks), layout.top_k)
    protected = outliers.protected(layout, counts)
    if request.loss == "fisher":
        check_head(model)
        if on_disk is not None:
            on_disk.load_head()
    listed, counted, tokens = _listed(batches, model)
    _check_several(model, blocks, request, counted)
    asked = {**request.as_json(layout, counts, thresholds, tokens), **outliers.as_json()}
    if not strict:
        asked["strict"] = False
    text, of_model = text_digest(listed), _digest_of_model(model, blocks, on_disk)
    numbers = list(range(len(listed)))
    if distributed:
        check_same_job(listed, model, on_disk, {name: asked[name] for name in asked if name != "tokens"})
        listed, counted, numbers = list(share_of(listed)), list(share_of(counted)), list(share_of(numbers))
    layers = LayerSearch(blocks, layout, counts, request, thresholds, distributed, tokens, protected)
    record = SearchProgress(resume, {**asked, "model": of_model, "text": text}, distributed)
    found = record.layers
    left = [layer for layer in range(len(blocks)) if layer not in found]
    course = course_of(model, blocks, listed if left else [])
    course.refuse_loops("search")
    if request.loss == "fisher":
        if left:
            walk = _backwards(
                *(model, blocks, listed, counted, request.drawn, numbers, course, on_disk, scratch, progress, strict)
            )
            with walk as (inputs, bar):
                for layer in reversed(left):
                    found[layer] = layers.search(layer, inputs, counted, bar)
                    record.write()
        result = _chosen(tuple(found[layer] for layer in range(len(blocks))), layout, counts, asked, protected)
        record.finish(result.plan)
        outliers.warn(result)
        return result
    states, position = None, 0
    if on_disk is not None:
        _, _, of_block = decoder_layers(model, blocks)
        job = joined_digest([__version__, json.dumps(asked), text, of_model, place_among()])
        reached = of_block[left[0]] if left else 0
        waiting = listed if left else []
        states, position = waiting_states(
            course, waiting, scratch, job, reached, hold=False, show=progress and bool(left)
        )
    need = None if on_disk is None else on_disk.need
    with (
        tqdm(total=len(left) * len(listed), desc="search", unit="batch", disable=not progress) as bar,
        torch.no_grad(),
        patched(model, blocks, strict=strict),
        LayerInputs(model, blocks, listed, course=course, states=states, need=need, position=position) as inputs,
        RouterMasks() as masks,
    ):
        for layer, block in enumerate(blocks):
            if layer in left:
                found[layer] = layers.search(layer, inputs, counted, bar)
                record.write()
            if request.method == "progressive":
                kept = torch.zeros(layout.num_experts, dtype=torch.bool)
                kept[list(found[layer].that_keep(protected[layer]).best(counts[layer])[0])] = True
                masks.add(block, kept, None if thresholds is None else thresholds[layer])
    result = _chosen(tuple(found[layer] for layer in range(len(blocks))), layout, counts, asked, protected)
    if states is not None:
        states.remove()
    record.finish(result.plan)
    outliers.warn(result)
    return result


def _listed(
    batches: Iterable[Mapping[str, Tensor]], model: PreTrainedModel
) -> tuple[list[Mapping[str, Tensor]], list[Tensor | None], int]:
    """The model's inputs, which of their tokens count, and how many do; ValueError if none does."""
    checked = [check_batch(index, batch, model) for index, batch in enumerate(batches)]
    listed: list[Mapping[str, Tensor]] = [each.inputs for each in checked]
    # Where no token is padding, none has to be told from the others.
    counted = [None if each.counted is None or bool(each.counted.all()) else each.counted for each in checked]
    tokens = sum(
        batch["input_ids"].numel() if mask is None else int(mask.sum())
        for batch, mask in zip(listed, counted, strict=True)
    )
    if tokens == 0:
        raise ValueError("no token was counted: 'batches' is empty, or every token is padding")
    return listed, counted, tokens


def _chosen(
    losses: tuple[LayerLosses, ...],
    layout: Layout,
    counts: list[int],
    asked: dict[str, Any],
    protected: Sequence[Sequence[int]],
) -> SearchResult:
    """The best subset of every layer that keeps the protected experts; a model's budget is shared out first."""
    allowed = [layer.that_keep(stay) for layer, stay in zip(losses, protected, strict=True)]
    predicted: dict[str, float] = {}
    if asked["measure"] != "norms":
        sizes = [allowed_sizes(layout, stay) for stay in protected]
        shares = {"layer": counts}
        if all(layer.sizes() == of_layer for layer, of_layer in zip(allowed, sizes, strict=True)):
            every = [range(layout.num_experts, of_layer[-1] - 1, -1) for of_layer in sizes]
            curves = [
                [layer.best(size)[1] if size in of_layer else torch.inf for size in through]
                for layer, of_layer, through in zip(allowed, sizes, every, strict=True)
            ]
            shares["model"] = share_out(curves, sum(counts), layout.num_experts)
        for budget, each in shares.items():
            predicted[budget] = sum(layer.best(count)[1] for layer, count in zip(allowed, each, strict=True))
        counts = shares[asked["budget"]]
    chosen = [layer.best(count) for layer, count in zip(allowed, counts, strict=True)]
    made_by = {
        "criterion": f"{'Fisher' if asked['loss'] == 'fisher' else 'reconstruction'} loss, {asked['method']}",
        **asked,
        "losses": [loss for _, loss in chosen],
        "exact": [layer.is_exact(count, layout.groups) for layer, count in zip(losses, counts, strict=True)],
        **({"predicted": predicted} if predicted else {}),
        "moe_ext": __version__,
    }
    return SearchResult(PruningPlan.of(layout, tuple(kept for kept, _ in chosen), made_by), losses)


def _check_model(model: PreTrainedModel, blocks: list[MoeBlock]) -> None:
    """ValueError, naming the layer, for a model that cannot be searched."""
    if (altered := altered_gates(model)) is not None:
        raise ValueError(f"the model {altered}; patch(model, skip=None) before searching, and pass skip=thresholds")
    refuse_offloaded(blocks, "search")
    refuse_shared_out(blocks, "search")
    refuse_novices(blocks, "search")
    refuse_other_sums(blocks, "search")
    if len({(block.num_experts, block.top_k) for block in blocks}) > 1:
        raise ValueError("the model's layers have different numbers of experts; search takes the same in every layer")


def _check_several(
    model: PreTrainedModel, blocks: list[MoeBlock], request: SearchRequest, counted: Sequence[Tensor | None]
) -> None:
    """ValueError if a decoder layer has several MoE blocks, and what is asked for does not go with that."""
    jobs = {
        "search, method='progressive'": request.method == "progressive",
        "search, budget='model'": request.shares == "model",  # they need as many experts each
        "search of text with padding": any(mask is not None for mask in counted),
    }
    for job, is_asked in jobs.items():
        if is_asked:
            refuse_several_in_a_layer(blocks, decoder_layers(model, blocks)[2], job)


@contextmanager
def _backwards(
    model: PreTrainedModel,
    blocks: list[MoeBlock],
    batches: Sequence[Mapping[str, Tensor]],
    counted: Sequence[Tensor | None],
    labels: Labels,
    numbers: Sequence[int],
    course: Course,
    on_disk: LayersOnDisk | None,
    scratch: str | os.PathLike[str] | None,
    progress: bool,
    strict: bool,
) -> Iterator[tuple[OutputGradients, Any]]:
    """The walk through a model's layers and back, and the bar that shows where it is."""
    memory = MEMORY
    if on_disk is not None:
        memory = room_for_all(course, batches, scratch, show=progress)
    with (
        tqdm(desc="search", unit="batch", disable=not progress) as bar,
        torch.no_grad(),
        patched(model, blocks, strict=strict),
    ):

        def ran(what: str) -> None:
            if what != "backward":
                bar.set_description(what)
            bar.update()

        need = None if on_disk is None else on_disk.need
        with OutputGradients(
            *(model, blocks, batches, counted, labels),
            numbers=numbers,
            memory=memory,
            folder=scratch,
            need=need,
            ran=ran,
            course=course,
        ) as walk:
            bar.reset(walk.passes() + len(blocks) * len(batches))
            yield walk, bar


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
