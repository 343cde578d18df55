"""The operators, typed: thin wrappers over ``torch.ops.moe_ext`` and their fake (Meta) kernels for ``torch.compile``.

T tokens, E experts, K slots a token, H hidden size, I expert intermediate size. A slot with expert index E (the
sentinel) has no expert: it costs nothing and adds nothing. Results are the same bits from run to run; on the CPU they
depend neither on the number of threads nor on the other tokens of the batch. On CUDA the operators run on the current
stream, never wait for the device, and can be captured in a CUDA graph. They have no backward: a patched model runs
transformers' own differentiable path when gradients are required.
"""

import torch
from torch import Tensor

from moe_ext.binary import _C  # noqa: F401  registers torch.ops.moe_ext

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def _refuse_gradients(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{op}: an input requires gradients, and this operator has no backward. Call it under torch.no_grad(), "
            "or use moe_ext.patch(model), which runs transformers' differentiable path where gradients are required."
        )


def route(
    logits: Tensor, top_k: int, thresholds: Tensor | None = None, renormalise: bool = True
) -> tuple[Tensor, Tensor]:
    """Softmax, top-K and, with thresholds, dynamic skipping of a token's weak experts (arXiv 2402.14800, section 3.3).

    With thresholds, the slot of rank j >= 2 is skipped when ``w_j < thresholds[j - 2] * w_1``; the kept weights are
    scaled so that they sum to what all K summed to.

    Args:
        logits: (T, E) float32, bfloat16 or float16. Equal logits: the lower expert index ranks first. A NaN ranks
            first and makes the token's weights NaN.
        top_k: K, from 1 to E. On CUDA E is at most 512.
        thresholds: (K - 1,) float32, or None to skip nothing.
        renormalise: whether a token's K weights are scaled to sum to 1; otherwise they are softmax values over E.

    Returns:
        weights (T, K) float32, largest first, 0 in skipped slots; experts (T, K) int64 as torch.topk's, E in skipped
        slots.

    Raises:
        RuntimeError: a shape, dtype, device or value is not as above; the argument is named.
    """
    _refuse_gradients("route", logits)
    weights, experts = torch.ops.moe_ext.route(logits, top_k, thresholds, renormalise)
    return weights, experts


def experts(x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str) -> Tensor:
    """Weighted sum of each token's experts, ``sum_s weights[t, s] * f_e(x[t])`` with ``e = experts[t, s]`` and
    ``f_e(x) = down[e] (act(gate[e] x) * (up[e] x))``.

    Args:
        x: (T, H) float32, bfloat16 or float16.
        gate_up: (E, 2I, H), contiguous, dtype of ``x``: rows [0, I) are the gate, [I, 2I) the up projection.
        down: (E, H, I), contiguous, dtype of ``x``.
        experts: (T, K) int32 or int64, in [0, E]; E marks an empty slot. On CUDA an index outside stops the kernel with
            a device-side assertion.
        weights: (T, K) float32 or dtype of ``x``.
        activation: "silu", "gelu" (erf) or "gelu_tanh".

    Returns:
        (T, H), dtype of ``x``; products and sums are accumulated in float32. On the CPU the result is rounded once, but
        that the AVX-512 BF16 variant rounds ``act(gate x) * (up x)`` of bfloat16 models, too. On CUDA it is rounded
        once for float32 and for odd H or I, while the tensor-core kernels also round ``act(gate x) * (up x)`` and, for
        more than 16 tokens, each expert's output. transformers rounds all of these.

    Raises:
        RuntimeError: a shape, dtype, device, contiguity or value is not as above; the argument is named.
    """
    _refuse_gradients("experts", x, gate_up, down, weights)
    out: Tensor = torch.ops.moe_ext.experts(x, gate_up, down, experts, weights, activation)
    return out


def experts_observed(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
    moments: Tensor,
    counted: Tensor | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    """:func:`experts` that also adds every routed slot to its expert's moments, in the same pass, and if asked to the
    energies of its channels.

    ``moments[e, a, b] += sum over counted slots of e of weights^a * ||f_e(x)||_2^b`` for a, b in {0, 1, 2}, and
    ``channels[e, j] += sum over counted slots of e of weights^2 * h_j^2`` with ``h = act(gate[e] x) * (up[e] x)``.

    Args:
        moments: (E, 3, 3) float64, contiguous; updated in place. Left as it was if an argument is refused.
        counted: (T,) bool, the tokens that enter the sums (padding does not); None: all. The output has every token.
        channels: (E, I) float64, contiguous; updated in place. None: channels are not observed. On the CPU only.

    Returns:
        The same bits as :func:`experts`.

    Raises:
        RuntimeError: as :func:`experts`.
    """
    _refuse_gradients("experts_observed", x, gate_up, down, weights)
    out: Tensor = torch.ops.moe_ext.experts_observed(
        x, gate_up, down, experts, weights, activation, moments, counted, channels
    )
    return out


def expert_gram(x: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Scalar products of every pair of experts' outputs for every token, ``<f_i(x[t]), f_j(x[t])>``, ``f_e`` as in
    :func:`experts` and rounded to the dtype of ``x``. The (T, E, H) outputs exist for some tokens at a time only.

    With them the layer's output without some experts is known without running it again (arXiv 2402.14800, section 3.2):
    for two vectors of routing weights with difference ``d``, ``||sum_e d_e f_e||^2 = d^T gram[t] d``.

    Args:
        x: (T, H) float32, bfloat16 or float16.
        gate_up: (E, 2I, H), contiguous, dtype of ``x``.
        down: (E, H, I), contiguous, dtype of ``x``.
        activation: "silu", "gelu" (erf) or "gelu_tanh".

    Returns:
        (T, E, E) float64, symmetric to the bit: ``d^T gram d`` cancels. Products and sums are float64.

    Raises:
        RuntimeError: a shape, dtype, device, contiguity or value is not as above; the argument is named.
    """
    _refuse_gradients("expert_gram", x, gate_up, down)
    gram: Tensor = torch.ops.moe_ext.expert_gram(x, gate_up, down, activation)
    return gram


def subset_errors(
    distances: Tensor, ranks: Tensor, scores: Tensor, keep: Tensor, top_k: int, thresholds: Tensor | None = None
) -> Tensor:
    """Squared errors of a layer's output for subsets of its experts, summed over tokens, without running the layer:
    ``sum_t ||F(x[t]) - F_s(x[t])||^2`` (arXiv 2402.14800, section 3.2). A CPU operator: its work is small.

    F combines the experts of a token's first K ranks, F_s those of the first K that subset s keeps, weighted with their
    scores over the scores' sum. N <= E is how many ranks of a token are given.

    Args:
        distances: (T, N (N - 1) / 2) float64, ``||f_i - f_j||^2`` of the experts of ranks i < j: (0, 1), (0, 2), ...,
            (1, 2), ...
        ranks: (T, N) int64, the expert of every rank, in [0, E).
        scores: (T, N) float64, by rank; for a softmax over the chosen logits their exponentials.
        keep: (S, E) bool, the subsets; each drops N - K experts at most, so that K of the given ranks are left.
        top_k: K, from 1 to N.
        thresholds: (K - 1,) float32: skip thresholds of F_s, as for :func:`route`; F skips nothing. None: no skipping.

    Returns:
        (S,) float64; the same bits for any number of threads.

    Raises:
        RuntimeError: a shape, dtype or value is not as above; the argument is named.
    """
    errors: Tensor = torch.ops.moe_ext.subset_errors(distances, ranks, scores, keep, top_k, thresholds)
    return errors


@torch.library.register_fake("moe_ext::route")
def _route_fake(
    logits: Tensor, top_k: int, thresholds: Tensor | None = None, renormalise: bool = True
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("moe_ext::experts")
def _experts_fake(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("moe_ext::experts_observed")
def _experts_observed_fake(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
    moments: Tensor,
    counted: Tensor | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("moe_ext::expert_gram")
def _expert_gram_fake(x: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    num_experts = gate_up.shape[0]
    return x.new_empty((x.shape[0], num_experts, num_experts), dtype=torch.float64)


@torch.library.register_fake("moe_ext::subset_errors")
def _subset_errors_fake(
    distances: Tensor, ranks: Tensor, scores: Tensor, keep: Tensor, top_k: int, thresholds: Tensor | None = None
) -> Tensor:
    return scores.new_empty((keep.shape[0],))
