"""Calibration: runs a model over text and fills :class:`ExpertStatistics`, norms fused into the experts' own pass; of a
model in memory, or of a checkpoint folder one decoder layer at a time.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_ext.calibration.channels import check_channels
from moe_ext.calibration.interrupted import BatchProgress, stopping_between_batches
from moe_ext.calibration.observer import Observer, observing, take
from moe_ext.calibration.pace import Pace
from moe_ext.calibration.progress import CalibrationProgress
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.models.blocks import (
    MoeBlock,
    base_of,
    decoder_layers,
    input_device,
    moe_blocks,
    refuse_novices,
    refuse_shared_out,
    router_digest,
)
from moe_ext.models.boundary import output_width
from moe_ext.models.layout import layout_of
from moe_ext.models.router_formula import gate_of
from moe_ext.models.wrapped import unwrapped
from moe_ext.runtime.batches import as_batches, check_batch, domain_of
from moe_ext.runtime.course import course_of
from moe_ext.runtime.hidden_states import FolderOptions
from moe_ext.runtime.layer_walk import LayerInputs
from moe_ext.runtime.patching import altered_gates, layer_state
from moe_ext.runtime.processes import check_same, place_among, share_of, total_of
from moe_ext.runtime.same_job import check_same_job
from moe_ext.storage.digests import joined_digest
from moe_ext.storage.formats import shown
from moe_ext.version import __version__


def add_up(stats: ExpertStatistics) -> None:
    """Replaces every process's sums by those of all, in place.

    Raises:
        RuntimeError: a process is gone, or does not answer in time.
        ValueError: the processes calibrated different models.
    """
    check_same(stats.model_digest, "the processes calibrated different models: the weights of their routers differ")
    for name, tensor in stats.every_tensor().items():
        if not name.startswith(("channel_norms", "channel_order")):  # which are the same in all
            tensor.copy_(total_of(tensor))


def calibrate(
    model: PreTrainedModel | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    progress: bool = True,
    dataset: str = "",
    outputs: bool = False,
    channels: Literal["energy", "gram"] | None = None,
    strict: bool = True,
    shard: str = "",
    distributed: bool = False,
    resume: str | os.PathLike[str] | None = None,
    minutes: float = 10,
    dtype: str | None = None,
    device: str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    read_ahead: bool | None = None,
    trust_remote_code: bool | None = None,
) -> ExpertStatistics:
    """Statistics of a model's experts over text, in one forward pass per batch.

    Args:
        model: a model that :func:`moe_ext.patch` supports, compiled or wrapped (see there) or not. Patched or not, it
            is left as it was. Or a checkpoint folder: its decoder layers are then in memory one at a time, each with
            all batches before the next, and the statistics are those of the loaded model, bit by bit.
        batches: mappings with ``input_ids`` (B, S) and optionally ``attention_mask`` (B, S); tokens whose mask is 0 are
            padding and count in nothing. What tokenizers give beside them, such as ``token_type_ids``, is left out
            where the model does not take it. :func:`moe_ext.data.batches` makes them of text, chats and data sets;
            DataLoaders and data sets of tokens are taken as they are (:func:`moe_ext.runtime.batches.as_batch`).
            Batches that name their ``domain`` are added up by it, too: :attr:`ExpertStatistics.domains`. A mask may be
            one of (B, 1, S, S); ``counted`` (B, S) then says which tokens count, or else those that see themselves.
        progress: whether to show a progress bar.
        dataset: a label for the text, kept in the statistics.
        outputs: also sum every expert's outputs, for the criterion ``mone``. Slower: the experts run twice, the second
            time one by one in transformers' code.
        channels: "energy": also what every channel of the experts contributes, for plans of thinner experts
            (:func:`moe_ext.thin_plan`); out of the experts' own pass, where the operators run. "gram": beside that the
            order in which the optimal brain surgeon removes them, from every expert's Gram matrix
            ``sum g^2 h h^T``, one in memory at a time: the layers then run one after the other, also of a model in
            memory, and the experts' inputs wait in a temporary file. O(I^3) an expert.
        strict: as for :func:`moe_ext.patch`, if the model is not patched. With False, layers that the operators cannot
            run are observed through transformers' code, with one warning.
        shard: label of this run, kept in the statistics; files with the same one do not merge.
        distributed: whether the batches are shared among the processes of torch.distributed's default group, every
            N-th whole batch to each, and the sums added up; all of them are given all batches, the same model and the
            same options, and return the same statistics.
        resume: a file from which the same call goes on where an interrupted one was; yours to remove once the result is
            saved. Of a model in memory it is written every so many ``minutes``, and when Ctrl-C stops the run, which
            then waits for the batch under way; of a checkpoint folder after every layer. Not with ``channels="gram"``
            of a model in memory.
        dtype, device, scratch, read_ahead, trust_remote_code: for a checkpoint folder only: the fields of
            :class:`moe_ext.runtime.hidden_states.FolderOptions`, which has what holds where one is None.

    Returns:
        :class:`ExpertStatistics` on the CPU.

    Raises:
        KeyboardInterrupt: Ctrl-C; with ``resume`` says where the run goes on.
        TypeError: an option for folders with a model in memory, or ``resume`` with its Gram matrices.
        ValueError: processes that differ in text, options or model (says which and in what), a malformed batch, a token
            that the model does not have, no counted token, a model that :func:`moe_ext.patch` refuses or that is
            skipping (its routing would bias the statistics), or activations that are not finite (the layer is named).
        MemoryError, OSError: hidden states for which there is no room, or a checkpoint that cannot be read.
    """
    in_folder = {"dtype": dtype, "device": device, "scratch": scratch, "read_ahead": read_ahead}
    in_folder["trust_remote_code"] = trust_remote_code
    asked = {"dataset": dataset, "outputs": outputs, "channels": channels, "strict": strict, "shard": shard}
    checked = as_batches(batches)
    if not isinstance(model, str | os.PathLike):
        FolderOptions.refuse(**in_folder)
        if channels == "gram" and resume is not None:
            raise TypeError("resume: a model in memory does not go on from half its Gram matrices; give a folder")
        inside: PreTrainedModel = unwrapped(model)
        blocks = moe_blocks(inside)
        stats = _start(inside, blocks, dataset, outputs, channels, shard)
        mine = _share(checked, inside, None, asked, stats) if distributed else checked
        if channels == "gram":
            _run_in_turn(inside, blocks, list(mine), stats, progress, outputs, strict, distributed)
        else:
            job = joined_digest([__version__, _sums_of(inside, blocks, stats, outputs, strict), place_among()])
            record = BatchProgress(resume, job, minutes)
            _run(inside, blocks, Pace(mine, batches, show=progress), stats, record, outputs, strict)
    else:
        options = FolderOptions.given(resume=resume, **in_folder)
        with options.opened(model) as layers:
            stats = _start(layers.model, layers.blocks, dataset, outputs, channels, shard)
            listed = _share(checked, layers.model, layers, asked, stats) if distributed else list(checked)
            _run_in_turn(
                *(layers.model, layers.blocks, listed, stats, progress, outputs, strict, distributed), (layers, options)
            )
    if distributed:
        add_up(stats)
    without = [name for name, tokens in zip(stats.layers, stats.tokens.tolist(), strict=True) if tokens == 0]
    if len(without) == stats.num_layers:
        raise ValueError(
            "no token was counted: 'batches' is empty, every token is padding, "
            "or set_experts_implementation was called on the patched model"
        )
    if without:
        raise ValueError(
            f"no token came to {len(without)} of {stats.num_layers} MoE layers, the first {without[0]}: its experts "
            "are for other inputs than these batches hold, such as images; add batches with them"
        )
    return stats


def _start(
    model: PreTrainedModel, blocks: list[MoeBlock], dataset: str, outputs: bool, channels: str | None, shard: str
) -> ExpertStatistics:
    """Statistics of no text, for a model that can be calibrated; ValueError for another."""
    if (altered := altered_gates(model)) is not None:
        raise ValueError(
            f"the model {altered}, which would bias its statistics; patch(model, skip=None) before calibrating"
        )
    refuse_novices(blocks, "calibrate")
    refuse_shared_out(blocks, "calibrate")
    hidden_size = output_width(blocks[0].experts) if outputs else None
    width = check_channels(channels, blocks)
    layout, ordered = layout_of(model, blocks), channels == "gram"
    stats = ExpertStatistics.empty(layout, gate_of(blocks[0]), dataset, hidden_size, width, ordered)
    stats.shards = (shard,) if shard else ()
    return stats


def _share(
    batches: Iterable[Mapping[str, Any]],
    model: PreTrainedModel,
    layers: LayersOnDisk | None,
    asked: dict[str, Any],
    stats: ExpertStatistics,
) -> list[Mapping[str, Any]]:
    """This process's batches, once all processes are known to do the same job; ValueError if they do not. The
    statistics get the domains of all processes' batches."""
    listed = list(batches)
    for index, batch in enumerate(listed):
        check_batch(index, batch, model)
    check_same_job(listed, model, layers, asked)
    for domain in _domains(listed):
        if domain is not None:
            stats.of_domain(domain)
    return list(share_of(listed))


def _domains(batches: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Every batch's domain; ValueError if some have one and others have none."""
    found: list[str | None] = []
    for index, batch in enumerate(batches):
        found.append(domain_of(index, batch))
        _check_alike(index, found[0], found[-1])
    return found


def _check_alike(index: int, first: str | None, domain: str | None) -> None:
    if (first is None) != (domain is None):
        raise ValueError(f"batch {index}: names {shown(domain)} as its domain, and batch 0 {shown(first)}")


def _sums_of(
    model: PreTrainedModel, blocks: list[MoeBlock], stats: ExpertStatistics, outputs: bool, strict: bool
) -> str:
    """What the sums depend on beside the text, as a text."""
    routers = joined_digest([router_digest(block) for block in blocks])
    return f"{routers} {model.dtype} {input_device(model)} {outputs} {stats.width} {strict}"


def _run(
    model: PreTrainedModel,
    blocks: list[MoeBlock],
    pace: Pace,
    stats: ExpertStatistics,
    record: BatchProgress,
    outputs: bool,
    strict: bool,
) -> None:
    """Fills the statistics of a model in memory."""
    first, count = None, 0
    with (
        torch.no_grad(),
        observing(model, blocks, outputs, strict, stats.width, False) as observers,
        stopping_between_batches(record.is_kept) as stop,
        pace,
    ):
        for index, batch in enumerate(pace):
            inputs, counted = check_batch(index, batch, model)
            domain = domain_of(index, batch)
            first = domain if index == 0 else first
            _check_alike(index, first, domain)
            count = index + 1
            if not record.is_done(index, batch, observers):
                for observer in observers:
                    observer.begin(domain, counted)
                inputs = {name: tensor.to(input_device(model)) for name, tensor in inputs.items()}
                # The decoder without the language model head: statistics need no logits.
                base_of(model)(**inputs, use_cache=False)
                record.after(index, observers, bool(stop))
            pace.add(inputs["input_ids"].numel() if counted is None else int(counted.sum()))
    record.finished(count)
    digests = [router_digest(block) for block in blocks]
    for layer, observer in enumerate(observers):
        take(stats, layer, observer)
    stats.model_digest = joined_digest(digests)


def _before_batches(
    bar: Any, layer: int, observers: list[Observer], counted: list[Tensor | None], domains: list[str | None]
) -> Callable[[int], None]:
    """What is to be done before a layer runs a batch."""
    bar.set_description(f"calibrate layer {layer}")

    def before(batch: int) -> None:
        for observer in observers:
            observer.begin(domains[batch], counted[batch])
        bar.update()

    return before


def _mine(sums: Tensor) -> Tensor:
    return sums


def _run_in_turn(
    model: PreTrainedModel,
    blocks: list[MoeBlock],
    batches: list[Mapping[str, Tensor]],
    stats: ExpertStatistics,
    progress: bool,
    outputs: bool,
    strict: bool,
    distributed: bool,
    on_disk: tuple[LayersOnDisk, FolderOptions] | None = None,
) -> None:
    """Fills the statistics of a model one decoder layer after the other."""
    _, _, of_block = decoder_layers(model, blocks)
    checked = [check_batch(index, batch, model) for index, batch in enumerate(batches)]
    given, counted, domains = [each.inputs for each in checked], [each.counted for each in checked], _domains(batches)
    for domain in domains:
        if domain is not None:
            stats.of_domain(domain)  # before the sums of an interrupted run are read
    course = course_of(model, blocks, given)
    ends = course.last_calls(of_block)
    record = None
    if on_disk is not None:
        record = CalibrationProgress(on_disk[0], given, stats, on_disk[1], outputs, course, show=progress)
    digests = {} if record is None else record.digests
    ordered = _layers_ordered(stats, digests, distributed)
    start = 0 if record is None else record.position
    left = range(start, start if len(digests) == len(blocks) else max(ends) + 1)
    bar = tqdm(total=len(left) * len(given), desc="calibrate", unit="batch", disable=not progress)
    walk = LayerInputs(
        *(model, blocks, given),
        course=course,
        states=None if record is None else record.states,
        need=None if on_disk is None else on_disk[0].need,
        position=start,
    )
    with (
        bar,
        torch.no_grad(),
        observing(model, blocks, outputs, strict, stats.width, stats.channel_order is not None) as observers,
        walk as inputs,
    ):
        for index in digests:
            layer_state(blocks[index]).observer = None  # its sums are there from before the interruption
        for position in left:
            layer = course.calls[position]
            watched = {
                index: observers[index] for index, of in enumerate(of_block) if of == layer and index not in digests
            }
            for index in ordered & watched.keys():
                watched[index].inputs = None
            inputs.advance(_before_batches(bar, layer, list(watched.values()), counted, domains))
            for index, observer in watched.items():
                if position == ends[index]:
                    take(stats, index, observer, total_of if distributed else _mine)
                    digests[index] = router_digest(blocks[index])
            if record is not None:
                record.write(position + 1)
    stats.model_digest = joined_digest([digests[index] for index in range(len(blocks))])
    if record is not None:
        record.finish()


def _layers_ordered(stats: ExpertStatistics, digests: Mapping[int, str], distributed: bool) -> set[int]:
    """MoE layers whose channels have their order from before an interruption. It is of the text of all processes, so
    that those which were interrupted sooner take it from the others."""
    order = stats.channel_order
    if order is None or not distributed:
        return set(digests)
    have = torch.tensor([layer in digests for layer in range(stats.num_layers)])
    counts = total_of(have.long())
    shared = total_of(order.long() * have[:, None, None]) // counts.clamp(min=1)[:, None, None]
    order.copy_(torch.where(counts[:, None, None] > 0, shared, order))
    return {layer for layer, count in enumerate(counts.tolist()) if count}
