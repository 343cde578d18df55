"""The gradient of a language model's loss for its last hidden states, a piece of the tokens at a time.

The loss is the cross-entropy of the next token, summed over tokens, in nats. With labels that are sampled from the
model's own distribution the gradients' second moments are the Fisher metric: the curvature of the KL divergence to the
model as it is.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.models.blocks import base_of, input_device
from moe_ext.runtime.base_forward import replaced_forwards

LabelKind = Literal["model", "text", "kl"]
LABELS: tuple[str, ...] = get_args(LabelKind)

LOGIT_BYTES = 32 << 20
"""Bytes of float32 logits that exist at a time."""


@dataclass(frozen=True)
class Labels:
    """What the cross-entropy's labels are.

    Attributes:
        kind: "model": a token sampled from the model's own distribution, one for each that is counted. "text": the next
            token of the text; the last one of a sequence, and one before padding, has none. "kl": no label, but random
            signs whose gradient has the same second moments as that of sampled labels, for the same distribution.
        seed: of the samples or signs; those of a batch depend on it and on the batch's number, not on other batches.

    Raises:
        ValueError: another kind, or no such seed.
    """

    kind: LabelKind = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in LABELS:
            raise ValueError(f"labels: expected one of {', '.join(LABELS)}, got {self.kind!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer from 0 to 2^63 - 1, got {self.seed!r}")

    def generator(self, batch: int) -> torch.Generator:
        """Random numbers of a batch, on the CPU."""
        digest = hashlib.sha256(f"{self.seed} {batch}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_head(model: PreTrainedModel) -> None:
    """ValueError unless the model predicts tokens."""
    if model.get_output_embeddings() is None:
        raise ValueError(f"loss: 'fisher' is of predicted tokens, and a {type(model).__name__} predicts none")


def head_gradient(
    model: PreTrainedModel,
    base_output: Any,
    inputs: Mapping[str, Tensor],
    counted: Tensor | None,
    labels: Labels,
    batch: int,
) -> Tensor:
    """The gradient of a batch's loss for the last hidden states.

    Args:
        base_output: what the model without its head returned for the batch; its last hidden states are replaced.
        inputs: the batch.
        counted: (B * S,) bool, the tokens that are no padding; None: all.
        batch: its number, which decides about its samples.

    Returns:
        (B, S, H), dtype of the hidden states.
    """
    hidden = base_output.last_hidden_state.detach()
    flat, device = hidden.flatten(0, 1), hidden.device
    ids = inputs["input_ids"].to(device)
    has_label, label = torch.ones(len(flat), dtype=torch.bool, device=device), None
    if counted is not None:
        has_label = counted.to(device)
    if labels.kind == "text":
        has_label, label = _of_text(ids, has_label, inputs.get("position_ids"))
    generator = labels.generator(batch)
    uniform = torch.rand(len(flat), dtype=torch.float64, generator=generator).to(device)
    gradient = torch.zeros_like(flat)
    rows = max(1, LOGIT_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))
    with replaced_forwards() as replace:
        replace(base_of(model), lambda _: lambda *args, **kwargs: base_output)
        for first in range(0, len(flat), rows):
            part = slice(first, first + rows)

            def of_logits(logits: Tensor, part: slice = part) -> Tensor:
                scores = logits if logits.dtype == torch.float64 else logits.float()
                probabilities = scores.softmax(-1)
                if labels.kind == "kl":
                    signs = torch.randint(0, 2, probabilities.shape, generator=generator).to(probabilities) * 2 - 1
                    return _random_direction(probabilities, signs)
                chosen = _sampled(probabilities, uniform[part]) if label is None else label[part]
                return probabilities.scatter_add(
                    1, chosen[:, None], torch.full_like(chosen[:, None], -1, dtype=scores.dtype)
                )

            found = _through_head(model, base_output, flat[part], of_logits)
            gradient[part] = found.masked_fill(~has_label[part, None], 0)
    return gradient.view_as(hidden)


def _through_head(
    model: PreTrainedModel, base_output: Any, hidden: Tensor, of_logits: Callable[[Tensor], Tensor]
) -> Tensor:
    """The gradient (N, H) for hidden states (N, H), of that for their logits (N, V)."""
    leaf = hidden[None].requires_grad_()
    base_output.last_hidden_state = leaf
    with torch.enable_grad():
        logits = model(
            input_ids=torch.zeros(leaf.shape[:2], dtype=torch.int64, device=input_device(model)), use_cache=False
        ).logits
    with torch.no_grad():
        direction = of_logits(logits.detach()[0]).to(logits.dtype)
    return torch.autograd.grad(logits, leaf, direction[None])[0][0]


def _of_text(ids: Tensor, counted: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens (B * S,) have a next one, and which it is; a row that positions (B, S) show to be packed has several
    texts."""
    counted = counted.view_as(ids)
    has_label = torch.zeros_like(counted)
    has_label[:, :-1] = counted[:, :-1] & counted[:, 1:]
    if positions is not None and positions.shape == ids.shape:
        has_label[:, :-1] &= (positions.diff(dim=1) == 1).to(ids.device)
    return has_label.flatten(), ids.roll(-1, dims=1).flatten().long()


def _sampled(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(N,) int64: a token of each distribution (N, V), by a number in [0, 1) for each."""
    sums = probabilities.double().cumsum(-1)
    found = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)
    return found[:, 0].clamp(max=probabilities.shape[1] - 1)


def _random_direction(probabilities: Tensor, signs: Tensor) -> Tensor:
    """(N, V) with second moments ``diag(p) - p p^T``, those of ``p`` less a sampled token's indicator.

    Args:
        signs: (N, V), 1 or -1, independent of each other.
    """
    scaled = probabilities.sqrt() * signs
    return scaled - probabilities * scaled.sum(-1, keepdim=True)
