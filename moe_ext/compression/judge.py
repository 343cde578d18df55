"""What a compressed checkpoint lost: both models on the same text, one of them in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.data.tokens import Texts
from moe_ext.evaluation.divergence import divergence
from moe_ext.evaluation.predictions import save_predictions
from moe_ext.runtime.patching import patch
from moe_ext.runtime.skipping import count_skips


def record_reference(
    folder: Path, texts: Texts, file: Path, loading: Mapping[str, Any], scoring: Mapping[str, Any]
) -> None:
    """Writes what the checkpoint given predicts, without skipping.

    Args:
        loading: dtype, device and trust_remote_code, as for :func:`load_checkpoint`.
        scoring: window, batch_size and progress, as for :func:`moe_ext.perplexity`.
    """
    model, tokenizer = load_checkpoint(folder, **loading)
    save_predictions(patch(model, skip=None), texts, tokenizer, file, **scoring)


def judged(
    folder: Path, texts: Texts, reference: Path, loading: Mapping[str, Any], scoring: Mapping[str, Any]
) -> dict[str, Any]:
    """What was measured of a checkpoint that skips by its thresholds, beside the reference's predictions."""
    model, tokenizer = load_checkpoint(folder, **loading)
    with count_skips(patch(model, skip="config")) as count:
        found = divergence(model, reference, texts, tokenizer, **scoring)
    return {
        "before": found.reference_perplexity,
        "after": found.perplexity,
        "measured": {
            "tokens": found.perplexity.tokens,
            "kl": found.kl,
            "mean_kl": found.mean_kl,
            "top1": found.top1,
            "mean_top1": found.mean_top1,
            "skip_rate": count.rate(),
        },
    }
