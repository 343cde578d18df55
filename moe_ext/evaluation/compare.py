"""Several checkpoints side by side: perplexity, size, decode speed and memory, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.evaluation.perplexity import perplexity
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
    """

    checkpoint: str
    parameters: int
    weight_bytes: int
    perplexity: dict[str, float]
    mean: float
    skip_rate: float
    tokens_per_second: float
    peak_bytes: int | None


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


def compare(checkpoints: Sequence[str], texts: Mapping[str, str], setting: Setting) -> Iterator[Compared]:
    """Measures checkpoints one after the other; nothing of one is left in memory when the next begins.

    Args:
        checkpoints: folders, or names on the Hugging Face Hub.
        texts: domain to text.

    Yields:
        One result a checkpoint, in order.

    Raises:
        ValueError: no checkpoints, a name twice, or as :func:`moe_ext.perplexity`.
        OSError: a checkpoint that cannot be read.
    """
    if not checkpoints or len(set(checkpoints)) != len(checkpoints):
        raise ValueError(f"checkpoints: expected one or more, each once, got {', '.join(checkpoints) or 'none'}")
    context = multiprocessing.get_context("spawn")
    for name in checkpoints:
        with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=end_with_parent) as pool:
            yield pool.submit(measure, name, dict(texts), setting).result()


def end_with_parent() -> None:
    """Lets this process end when the one that started it is gone, however that ended: a worker would else wait for its
    next job for good, with a model in its memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="moe_ext-end-with-parent", daemon=True).start()


def measure(name: str, texts: Mapping[str, str], setting: Setting) -> Compared:
    """Measures one checkpoint in this process, whose largest memory is reported."""
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
    with count_skips(model) as count:
        quality = perplexity(
            model, texts, tokenizer, window=setting.window, stride=setting.stride, batch_size=setting.batch_size
        )
    prompt = prompt_batch(next(iter(texts.values()))[:PROMPT_CHARACTERS], tokenizer, model)
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
    )


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
