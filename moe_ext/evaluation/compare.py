"""Several checkpoints side by side: perplexity, divergence from a reference, size, decode speed and memory, each in a
process of its own."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_ext.checkpoints.load_save import load_checkpoint, stored_bytes
from moe_ext.data.tokens import Texts
from moe_ext.evaluation.divergence import Divergence, divergence
from moe_ext.evaluation.perplexity import perplexity
from moe_ext.evaluation.predictions import save_predictions
from moe_ext.runtime.batches import prompt_batch
from moe_ext.runtime.patching import patch
from moe_ext.runtime.skipping import count_skips
from moe_ext.storage.machine import peak_resident_bytes

PROMPT_CHARACTERS = 400
ROUNDS = 3


@dataclass(frozen=True)
class Compared:
    """What was measured of one checkpoint.

    Attributes:
        checkpoint: its name, as given.
        parameters: their number.
        weight_bytes: of the parameters, in the dtype that ran.
        perplexity: by domain.
        mean: geometric mean of ``perplexity``.
        skip_rate: share of the expert slots skipped while evaluating.
        tokens_per_second: greedy decoding of one sequence, the median of ``ROUNDS``.
        peak_bytes: largest memory of the process that loaded, evaluated and decoded; on CUDA that of the device. None
            where the system does not tell.
        kl, mean_kl, top1, mean_top1, reference_perplexity, reference_mean: as in
            :class:`moe_ext.evaluation.divergence.Divergence`; None without a reference.
        bits_per_weight: bits of the stored tensors, whatever their format, a parameter of the reference.
    """

    checkpoint: str
    parameters: int
    weight_bytes: int
    perplexity: dict[str, float]
    mean: float
    skip_rate: float
    tokens_per_second: float
    peak_bytes: int | None
    kl: dict[str, float] | None = None
    mean_kl: float | None = None
    top1: dict[str, float] | None = None
    mean_top1: float | None = None
    reference_perplexity: dict[str, float] | None = None
    reference_mean: float | None = None
    bits_per_weight: float | None = None


def judged_against(found: Divergence, stored_bytes: int) -> dict[str, Any]:
    """What a divergence adds to a result, by the names in :class:`Compared`."""
    return {
        "kl": found.kl,
        "mean_kl": found.mean_kl,
        "top1": found.top1,
        "mean_top1": found.mean_top1,
        "reference_perplexity": found.reference_perplexity.per_domain,
        "reference_mean": found.reference_perplexity.mean,
        "bits_per_weight": stored_bytes * 8 / found.reference_parameters,
    }


@dataclass(frozen=True)
class Setting:
    """How every checkpoint is run; fields as the options of ``moe-ext eval``."""

    skip: bool = True
    stock: bool = False
    window: int = 512
    stride: int | None = None
    batch_size: int = 8
    decode_tokens: int = 64
    dtype: str = "auto"
    device: str = "cpu"
    strict: bool = True
    threads: int = 0  # 0: as many as torch takes
    trust_remote_code: bool = False
    allow_missing: bool = False
    reference: str | None = None  # a checkpoint, or a file of predictions


def compare(checkpoints: Sequence[str], texts: Texts, setting: Setting) -> Iterator[Compared]:
    """Measures checkpoints one after the other; nothing of one is left in memory when the next begins.

    A reference that is a checkpoint runs once, in a process of its own, whole and without skipping. Its predictions
    wait in a temporary file (in ``TMPDIR``; 2 bytes a token of the vocabulary and scored token), so that the memory
    that is measured is a checkpoint's own.

    Args:
        checkpoints: folders, or names on the Hugging Face Hub.
        texts: domain to text, or to several.

    Yields:
        One result a checkpoint, in order.

    Raises:
        ValueError: no checkpoints, a name twice, or as :func:`moe_ext.perplexity`.
        OSError: a checkpoint that cannot be read, or a disk too small for the reference's predictions.
    """
    if not checkpoints or len(set(checkpoints)) != len(checkpoints):
        raise ValueError(f"checkpoints: expected one or more, each once, got {', '.join(checkpoints) or 'none'}")
    # A server that has imported what a worker needs forks it: a second instead of six.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload([__name__])

    def alone(job: Callable[..., Any], *arguments: Any) -> Any:
        with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=end_with_parent) as pool:
            return pool.submit(job, *arguments).result()

    with ExitStack() as stack:
        predictions = None if setting.reference is None else Path(setting.reference)
        if setting.reference is not None and predictions is not None and not predictions.is_file():
            folder = stack.enter_context(TemporaryDirectory(prefix="moe_ext-"))
            predictions = Path(folder, "reference.safetensors")
            alone(record_reference, setting.reference, dict(texts), setting, predictions)
        for name in checkpoints:
            yield alone(measure, name, dict(texts), setting, predictions)


def record_reference(name: str, texts: Texts, setting: Setting, path: Path) -> None:
    """Writes what a reference predicts."""
    model, tokenizer = _loaded(name, replace(setting, skip=False))
    save_predictions(
        *(model, texts, tokenizer, path),
        window=setting.window,
        stride=setting.stride,
        batch_size=setting.batch_size,
    )


def end_with_parent() -> None:
    """Lets this process end when the one that started it is gone, however that ended: a worker would else wait for its
    next job for good, with a model in its memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="moe_ext-end-with-parent", daemon=True).start()


def measure(name: str, texts: Texts, setting: Setting, predictions: Path | None = None) -> Compared:
    """Measures one checkpoint in this process, whose largest memory is reported, against a reference's predictions."""
    model, tokenizer = _loaded(name, setting)
    options: dict[str, Any] = {"window": setting.window, "stride": setting.stride, "batch_size": setting.batch_size}
    judged: dict[str, Any] = {}
    with count_skips(model) as count:
        if predictions is None:
            quality = perplexity(model, texts, tokenizer, **options)
        else:
            found = divergence(model, predictions, texts, tokenizer, **options)
            quality, judged = found.perplexity, judged_against(found, stored_bytes(name))
    first = next(iter(texts.values()))
    prompt = prompt_batch((first if isinstance(first, str) else first[0])[:PROMPT_CHARACTERS], tokenizer, model)
    prompt = {name: tensor.to(setting.device) for name, tensor in prompt.items()}
    seconds = _decode_seconds(model, prompt, setting.decode_tokens)
    return Compared(
        name,
        model.num_parameters(),
        weight_bytes(model),
        quality.per_domain,
        quality.mean,
        count.rate(),
        setting.decode_tokens / seconds,
        torch.cuda.max_memory_allocated() if setting.device.startswith("cuda") else peak_resident_bytes(),
        **judged,
    )


def _loaded(name: str, setting: Setting) -> tuple[PreTrainedModel, Any]:
    """A checkpoint's model, patched as it is to run, and its tokenizer."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    model, tokenizer = load_checkpoint(
        name,
        dtype=setting.dtype,
        device=setting.device,
        trust_remote_code=setting.trust_remote_code,
        allow_missing=setting.allow_missing,
    )
    if not setting.stock:
        patch(model, skip="config" if setting.skip else None, strict=setting.strict)
    return model, tokenizer


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _decode_seconds(model: PreTrainedModel, prompt: Mapping[str, torch.Tensor], tokens: int) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first warms up
