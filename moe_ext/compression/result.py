"""What compressing a checkpoint gave, and what it cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One of the two checkpoints.

    Attributes:
        parameters: their number.
        weight_bytes: bytes of its tensors as they are stored.
        perplexity: by domain; None if nothing was judged.
        mean: their geometric mean.
    """

    parameters: int
    weight_bytes: int
    perplexity: dict[str, float] | None = None
    mean: float | None = None


@dataclass(frozen=True)
class Compressed:
    """What :func:`moe_ext.compress` returns.

    Attributes:
        checkpoint: the folder that was written.
        method: by which it was made.
        stock: whether stock transformers loads it; else :func:`moe_ext.from_pretrained` does.
        before, after: the checkpoint given, and the one written, which skips by its thresholds.
        held_back: share of every domain, at its end, that was judged on and not calibrated on; None where it was other
            text, or none.
        tokens: scored tokens by domain; with ``kl``, ``mean_kl``, ``top1`` and ``mean_top1`` as in
            :class:`moe_ext.evaluation.divergence.Divergence`, the checkpoint given being the reference. None if nothing
            was judged.
        skip_rate: share of expert slots that the result skipped on the judged text.
    """

    checkpoint: str
    method: str
    stock: bool
    before: Measured
    after: Measured
    held_back: float | None = None
    tokens: dict[str, int] | None = None
    kl: dict[str, float] | None = None
    mean_kl: float | None = None
    top1: dict[str, float] | None = None
    mean_top1: float | None = None
    skip_rate: float | None = None

    def to_json(self) -> str:
        """With ``Infinity`` and ``NaN``, as Python writes them."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> Compressed:
        """What :meth:`to_json` wrote; TypeError or KeyError for something else."""
        return cls(**{**content, "before": Measured(**content["before"]), "after": Measured(**content["after"])})
