"""The operators, typed: thin wrappers over ``torch.ops.moe_ext`` and their fake (Meta) kernels for ``torch.compile``.

T tokens, E experts, K slots a token, H hidden size, I expert intermediate size. A slot with expert index E (the
sentinel) has no expert: it costs nothing and adds nothing. Results are the same bits from run to run; on the CPU they
depend neither on the number of threads nor on the other tokens of the batch. On CUDA the operators run on the current
stream, never wait for the device, and can be captured in a CUDA graph. They compute no gradients, backward or forward,
and say so where some are required: a patched model runs transformers' own differentiable path there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_ext.binary import _C  # noqa: F401  registers torch.ops.moe_ext

if TYPE_CHECKING:
    from typing_extensions import Unpack

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
WEIGHT_TYPES = ("int8", "int4", "fp8", "mxfp4")
ACTIVATION_TYPES = ("int8",)


class LayerOptions(TypedDict, total=False):
    """What few models' experts have; every operator on a layer's weights takes it by keyword.

    With ``gate`` and ``up`` the products of an expert's first projection, biases added, ``cap(z, c) = c tanh(z / c)``,
    and what is left out left out::

        g = min(gate, limit)                                      # with limit_after: gate
        u = min(max(up, -limit), limit)
        a = act(g), for silu cap(g, gate_cap) sigmoid(alpha g)    # with limit_after: min(a, limit)
        h = a (cap(u, up_cap) + up_offset)                        # not gated: act(up)
        f_e(x) = down[e] h + down_bias[e]

    Quantised weights are packed by :func:`pack_weights`, ``gate_up`` (E, 2I, bytes) and ``down`` (E, H, bytes) uint8. A
    weight is ``q * scale``, of int4 ``(q - zero) * scale``. Below, R and C are a matrix' rows and columns: 2I and H of
    ``gate_up``, H and I of ``down``; the last group of a row may be short.

    Keys:
        gate_up_bias: (E, 2I), contiguous, dtype of ``x``, in the order of the rows of ``gate_up``; (E, I) if not gated.
        down_bias: (E, H), contiguous, dtype of ``x``.
        gated: False: ``gate_up`` is one projection, (E, I, H). Nothing of a gate can be given then.
        interleaved: the rows of ``gate_up`` are gate and up in turn, instead of all gate rows first.
        transposed: ``gate_up`` is (E, H, 2I) and ``down`` (E, I, H), as in ``x @ gate_up[e]``.
        limit: more than 0; limit_after: see above.
        alpha, gate_cap: of activation "silu" only; gate_cap, like up_cap, more than 0.
        up_offset: 1 in models that add it.
        weight_type: of quantised weights "int8", "int4", "fp8" (e4m3fn) or "mxfp4" (e2m1); None: dtype of ``x``.
            Not with ``transposed``. The scale of a row multiplies finished sums. On the CPU a weight times the scale of
            its group is rounded once, to float32, or for bfloat16 ``x`` by the AVX-512 BF16 variant to bfloat16; so it
            is for many bfloat16 tokens on an H100 (wgmma), while other CUDA kernels multiply sums of a group.
        group_size: columns that share a scale: 0, all, for int8; 32, 64 or 128 for int4; 0, or 128 for blocks of 128
            rows and 128 columns, for fp8; 32 for mxfp4.
        gate_up_scales, down_scales: contiguous. int8 and fp8 (E, R) float32, fp8 in blocks (E, ceil(R / 128),
            ceil(C / 128)) float32; int4 (E, R, ceil(C / group_size)) float32, bfloat16 or float16, both of one dtype;
            mxfp4 (E, R, ceil(C / 32)) uint8 s, for ``2 ** (s - 127)``; 255 is no number.
        gate_up_zeros, down_zeros: of int4, (E, R, ceil(C / group_size)) uint8, contiguous; both or neither: 8.
        activation_type: "int8", with int8, int4 and mxfp4 weights on the CPU: the rows of ``x`` and of h are rounded to
            whole numbers from -127 to 127, 128 columns a scale, before they are multiplied, which takes less time and
            is an error of its own. None: products of ``x`` and h as they are.
    """

    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gated: bool
    interleaved: bool
    transposed: bool
    limit: float | None
    limit_after: bool
    alpha: float
    up_offset: float
    gate_cap: float | None
    up_cap: float | None
    weight_type: str | None
    group_size: int
    gate_up_scales: Tensor | None
    down_scales: Tensor | None
    gate_up_zeros: Tensor | None
    down_zeros: Tensor | None
    activation_type: str | None


# In the order of the schemas.
_DEFAULTS = LayerOptions(
    gate_up_bias=None, down_bias=None, gated=True, interleaved=False, transposed=False, limit=None, limit_after=False,
    alpha=1.0, up_offset=0.0, gate_cap=None, up_cap=None, weight_type=None, group_size=0, gate_up_scales=None,
    down_scales=None, gate_up_zeros=None, down_zeros=None, activation_type=None,
)  # fmt: skip


def _in_order(op: str, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Options as trailing arguments of an operator; none where none are given."""
    if not options:
        return ()
    if unknown := options.keys() - _DEFAULTS.keys():
        raise TypeError(f"{op}: got an unexpected argument {min(unknown)!r}; known options are {', '.join(_DEFAULTS)}")
    for name in ("limit", "alpha", "up_offset", "gate_cap", "up_cap", "group_size"):
        if isinstance(options.get(name), Tensor):  # torch would read one of a single value, and wait for it on CUDA
            expected = {"alpha": "float", "up_offset": "float", "group_size": "int"}.get(name, "Optional[float]")
            raise TypeError(f"{op}: '{name}' is of type Tensor; expected {expected}")
    return tuple({**_DEFAULTS, **options}.values())


# ---- gradients


def gradients_possible() -> bool:
    """Whether autograd could differentiate at all: gradients are recorded, or a level of forward mode is open. Takes no
    look at tensors, and so no time."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def gradients_required(*tensors: Any) -> bool:
    """Whether autograd would differentiate an operation on these: one requires gradients while they are recorded, or
    carries a tangent of forward mode (``torch.func.jvp`` and ``torch.autograd.forward_ad``, which no_grad leaves on).
    What is no tensor requires none."""
    if torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
        return True
    return forward_ad._current_level >= 0 and any(isinstance(tensor, Tensor) and _tangent(tensor) for tensor in tensors)


def _tangent(tensor: Tensor) -> bool:
    """Whether a tensor carries a tangent; also where torch cannot say, which is a vmap within a jvp."""
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:
        return True


def _register_autograd(name: str) -> Callable[..., Any]:
    """The kernel of an operator's Autograd key: it refuses gradients, of which torch would otherwise say None or 0.
    Returns the operator."""
    operator = getattr(torch.ops.moe_ext, name).default

    def autograd(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if gradients_required(*args, *kwargs.values()):
            raise NotImplementedError(
                f"{name}: an input requires gradients or carries a tangent, and this operator computes neither. Call "
                "it under torch.no_grad() and without tangents, or use moe_ext.patch(model), which runs transformers' "
                "differentiable path where gradients are required."
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return operator


_LIBRARY = torch.library.Library("moe_ext", "FRAGMENT")
_ROUTE = _register_autograd("route")
_EXPERTS = _register_autograd("experts")
_EXPERTS_OBSERVED = _register_autograd("experts_observed")
_EXPERT_GRAM = _register_autograd("expert_gram")
_EXPERT_PROJECTION = _register_autograd("expert_projection")
_PACK_WEIGHTS = _register_autograd("pack_weights")
_UNPACK_WEIGHTS = _register_autograd("unpack_weights")
_SUBSET_ERRORS = _register_autograd("subset_errors")
_PROJECTED_ERRORS = _register_autograd("projected_errors")


def _call(operator: Any, *args: Any) -> Any:
    """Calls an operator: without its Autograd kernel, whose Python takes a few microseconds, where no gradients can be
    required. What torch refuses before a kernel sees it, it says at length, or in the words of its dispatcher: here the
    argument is named."""
    if torch.compiler.is_compiling():
        return operator(*args)
    try:
        if gradients_possible() or _in_transform():
            return operator(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)
    except Exception as error:
        for argument, value in zip(operator._schema.arguments, args, strict=False):  # the others have defaults
            refusal = _refusal(f"{operator._opname}: '{argument.name}' is", value, argument, error)
            if refusal is not None:
                raise refusal from error
        raise


def _in_transform() -> bool:
    """Whether torch.func's transforms are under way: they see an operator before its Autograd kernel does."""
    return torch._C._functorch.peek_interpreter_stack() is not None


_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "Optional[Tensor]": (Tensor, type(None)),
    "int": (int,),
    "bool": (bool,),
    "float": (float, int),
    "Optional[float]": (float, int, type(None)),
    "str": (str,),
    "Optional[str]": (str, type(None)),
}
_NAMES = {"score": SCORES, "activation": ACTIVATIONS, "weight_type": WEIGHT_TYPES, "activation_type": ACTIVATION_TYPES}


def _refusal(what: str, value: Any, argument: Any, error: Exception) -> Exception | None:
    """The error for a value that torch does not take for an argument of a schema, or has no kernel for."""
    expected = str(argument.type)
    if not isinstance(value, _PYTHON_TYPES[expected]):
        return TypeError(f"{what} of type {type(value).__name__}; expected {expected}")
    if isinstance(value, int) and expected == "int" and not -(2**63) <= value < 2**63:
        return ValueError(f"{what} beyond 64 bits")
    if isinstance(value, str) and not value.isprintable():
        return ValueError(f"{what} {value[:80]!r}; expected one of {', '.join(_NAMES[argument.name])}")
    if not isinstance(value, Tensor):
        return None
    if value.is_nested or value.is_quantized or value.layout != torch.strided:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else f"of layout {value.layout}"
        return TypeError(f"{what} {kind}; expected a dense tensor")
    if value.device.type not in ("cpu", "meta") and str(error).startswith("Could not run"):
        return NotImplementedError(f"{what} on {value.device}; there is no kernel for it")
    return None


# ---- the operators


def route(
    logits: Tensor,
    top_k: int,
    thresholds: Tensor | None = None,
    renormalise: bool = True,
    score: str = "softmax",
    bias: Tensor | None = None,
    by_logits: bool = False,
    groups: int = 1,
    groups_per_token: int = 1,
    group_best: int = 1,
    outside_zero: bool = False,
    epsilon: float = 0.0,
    least: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scores, top-K and, with thresholds, dynamic skipping of a token's weak experts (arXiv 2402.14800, section 3.3).

    The K experts with the largest choices ``s_e + bias_e`` get the weights ``scale * s_e``, or with ``renormalise``
    ``scale * s_e / max(sum + epsilon, least)`` over the sum of the K scores s_e. With groups the choice is among the
    ``groups_per_token`` groups whose ``group_best`` largest choices sum to the most.

    With thresholds, the slot of rank j >= 2 by weight is skipped when ``w_j < thresholds[j - 2] * w_1``; the kept
    weights are scaled so that they sum to what all K summed to.

    Args:
        logits: (T, E) float32, bfloat16 or float16. Equal choices: the lower expert index ranks first. A NaN ranks
            first and makes the token's weights NaN.
        top_k: K, from 1 to E. On CUDA E is at most 512.
        thresholds: (K - 1,) float32, or None to skip nothing.
        renormalise: whether a token's K weights are scaled to sum to 1 (times ``scale``); otherwise they are scores.
        score: "softmax" over E, "sigmoid", or "sqrtsoftplus", of the logits in float32.
        bias: (E,) float32, for the choice only; None: 0.
        by_logits: whether the choice is by ``logits + bias``, not by scores. Softmax without bias and groups always
            chooses by logits, which order as its scores do.
        groups: contiguous groups of equal size. On CUDA at most 32 where there are several.
        groups_per_token: of these, that a token's experts come from; they hold K at least.
        group_best: experts that rank a group, 1 to E / groups.
        outside_zero: whether choices outside a token's groups are 0, below which others may lie; otherwise -inf.
        epsilon, least: of the sum that renormalisation divides by; 0 or more.
        scale: of all weights.

    Returns:
        weights (T, K) float32 in the order of the choices, 0 in skipped slots; experts (T, K) int64 as torch.topk's, E
        in skipped slots.

    Raises:
        RuntimeError: a shape, dtype, device or value is not as above; the argument is named. Not enough memory.
        NotImplementedError: gradients are required, of either mode; or a tensor's device has no kernel.
        TypeError, ValueError: an argument is no tensor, number or name at all; or a tensor is not dense.
    """
    numbers: dict[str, Any] = {"epsilon": epsilon, "least": least, "scale": scale}
    for name, value in numbers.items():
        if isinstance(value, Tensor):  # torch would read one of a single value, and wait for it on CUDA
            raise TypeError(f"route: '{name}' is of type Tensor; expected float")
    groups_of = groups, groups_per_token, group_best, outside_zero
    given = logits, top_k, thresholds, renormalise, score, bias, by_logits, *groups_of, epsilon, least, scale
    weights, experts = _call(_ROUTE, *given)
    return weights, experts


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
    **options: Unpack[LayerOptions],
) -> Tensor:
    """Weighted sum of each token's experts, ``sum_s weights[t, s] * f_e(x[t])`` with ``e = experts[t, s]`` and
    ``f_e(x) = down[e] (act(gate[e] x) * (up[e] x))``, or as the options say.

    Args:
        x: (T, H) float32, bfloat16 or float16.
        gate_up: (E, 2I, H), contiguous, dtype of ``x``: rows [0, I) are the gate, [I, 2I) the up projection.
        down: (E, H, I), contiguous, dtype of ``x``.
        experts: (T, K) int32 or int64, in [0, E]; E marks an empty slot. On CUDA an index outside stops the kernel with
            a device-side assertion.
        weights: (T, K) float32 or dtype of ``x``.
        activation: "silu", "gelu" (erf), "gelu_tanh" or "relu2", the square of what is positive.
        options: see :class:`LayerOptions`.

    Returns:
        (T, H), dtype of ``x``; products and sums are accumulated in float32. On the CPU the result is rounded once, but
        that the AVX-512 BF16 variant rounds ``act(gate x) * (up x)`` of bfloat16 models, too. On CUDA it is rounded
        once for float32 and for odd H or I, while the tensor-core kernels also round ``act(gate x) * (up x)`` and, for
        more than 16 tokens, each expert's output. transformers rounds all of these.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`route`; or a tensor is not contiguous that
            has to be.
    """
    more = _in_order("experts", options)
    out: Tensor = _call(_EXPERTS, x, gate_up, down, experts, weights, activation, *more)
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
    pairs: Tensor | None = None,
    **options: Unpack[LayerOptions],
) -> Tensor:
    """:func:`experts` that also adds every routed slot to its expert's moments, in the same pass, and if asked to the
    energies of its channels and to the products of pairs.

    ``moments[e, a, b] += sum over counted slots of e of weights^a * ||f_e(x)||_2^b`` for a, b in {0, 1, 2},
    ``channels[e, j] += sum over counted slots of e of weights^2 * h_j^2`` with ``h = act(gate[e] x) * (up[e] x)`` or as
    the options say.
    ``pairs[i, j] += sum over counted tokens with slots of both of g_i ||f_i(x)||_2 * g_j ||f_j(x)||_2``, g the weights.

    Args:
        moments: (E, 3, 3) float64, contiguous; updated in place. Left as it was if an argument is refused.
        counted: (T,) bool, the tokens that enter the sums (padding does not); None: all. The output has every token.
        channels: (E, I) float64, contiguous; updated in place. None: channels are not observed. The CPU sums, in
            float64, squares of h as the down projection takes it; CUDA those of h before it is rounded to the dtype of
            ``x``, in float32 over up to 192 slots and then in float64: to 2^-18, and where the H100's large-batch
            kernels run to 2^-11, of every square.
        pairs: (E, E) float64, contiguous; updated in place, the halves by the same bits. None: they are not observed.

    Returns:
        The same bits as :func:`experts`.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`experts`; or ``moments`` is a tensor of
            torch.func.functionalize.
    """
    if not torch.compiler.is_compiling():
        for name, sums in (("moments", moments), ("channels", channels), ("pairs", pairs)):
            # Torch reads through such a view; that it cannot write, it finds after the other sums are written.
            if isinstance(sums, Tensor) and sums.is_neg():
                raise ValueError(f"experts_observed: '{name}' is a negated view; expected a tensor of its own values")
    if not torch.compiler.is_compiling() and isinstance(moments, Tensor) and torch._is_functional_tensor(moments):
        raise NotImplementedError(
            "experts_observed: 'moments' is updated in place, which torch.func.functionalize cannot express for this "
            "operator. Call it outside; torch.compile does express it."
        )
    observed = (moments, counted, channels, pairs, *_in_order("experts_observed", options))
    out: Tensor = _call(_EXPERTS_OBSERVED, x, gate_up, down, experts, weights, activation, *observed)
    return out


def expert_gram(x: Tensor, gate_up: Tensor, down: Tensor, activation: str, **options: Unpack[LayerOptions]) -> Tensor:
    """Scalar products of every pair of experts' outputs for every token, ``<f_i(x[t]), f_j(x[t])>``, ``f_e`` as in
    :func:`experts` and rounded to the dtype of ``x``. The (T, E, H) outputs exist for some tokens at a time only.

    With them the layer's output without some experts is known without running it again (arXiv 2402.14800, section 3.2):
    for two vectors of routing weights with difference ``d``, ``||sum_e d_e f_e||^2 = d^T gram[t] d``.

    Args:
        x: (T, H) float32, bfloat16 or float16.
        gate_up: (E, 2I, H), contiguous, dtype of ``x``.
        down: (E, H, I), contiguous, dtype of ``x``.
        activation, options: as for :func:`experts`.

    Returns:
        (T, E, E) float64, symmetric to the bit: ``d^T gram d`` cancels. Products and sums are float64.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`route`; or a tensor is not contiguous that
            has to be.
    """
    gram: Tensor = _call(_EXPERT_GRAM, x, gate_up, down, activation, *_in_order("expert_gram", options))
    return gram


def expert_projection(
    x: Tensor, gate_up: Tensor, down: Tensor, g: Tensor, activation: str, **options: Unpack[LayerOptions]
) -> Tensor:
    """Scalar products of every expert's output with one vector a token, ``<g[t], f_e(x[t])>``, ``f_e`` as in
    :func:`experts`. On the CPU the outputs are neither rounded nor stored; on CUDA they are as the kernels for more
    than 16 tokens leave them, and exist for some tokens at a time.

    With ``g`` the gradient of a loss for a layer's output they say to first order what the loss does when a token's
    routing weights change: by ``sum_e d_e out[t, e]`` for a difference ``d``.

    Args:
        x: (T, H) float32, bfloat16 or float16.
        gate_up: (E, 2I, H), contiguous, dtype of ``x``.
        down: (E, H, I), contiguous, dtype of ``x``.
        g: (T, H) float32 or dtype of ``x``.
        activation, options: as for :func:`experts`.

    Returns:
        (T, E) float64. Products of experts are as :func:`experts` accumulates them; those with ``g`` are summed in
        float64.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`route`; or a tensor is not contiguous that
            has to be.
    """
    more = _in_order("expert_projection", options)
    projection: Tensor = _call(_EXPERT_PROJECTION, x, gate_up, down, g, activation, *more)
    return projection


def pack_weights(values: Tensor, weight_type: str) -> Tensor:
    """Quantised weights in the order in which the kernels read them, for :class:`LayerOptions`. An
    expert's bytes are contiguous and depend on no other's: ``packed[kept]`` prunes.

    Args:
        values: int8 (E, R, C) for "int8", float8_e4m3fn (E, R, C) for "fp8"; for "int4" and "mxfp4" uint8 (E, R,
            ceil(C / 2)), the even column in the low four bits.
        weight_type: "int8", "int4", "fp8" or "mxfp4".

    Returns:
        (E, R, B) uint8; B is C bytes (half of them for int4 and mxfp4) in whole cache lines of 64. The CPU's and CUDA's
        kernels read the same bytes: a packed tensor may move between them.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`route`.
    """
    packed: Tensor = _call(_PACK_WEIGHTS, values, weight_type)
    return packed


def unpack_weights(packed: Tensor, weight_type: str, columns: int) -> Tensor:
    """The exact inverse of :func:`pack_weights`.

    Args:
        packed: (E, R, B) uint8.
        weight_type: "int8", "int4", "fp8" or "mxfp4".
        columns: C.

    Returns:
        What :func:`pack_weights` was given.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`route`.
    """
    values: Tensor = _call(_UNPACK_WEIGHTS, packed, weight_type, columns)
    return values


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
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`route`.
    """
    errors: Tensor = _call(_SUBSET_ERRORS, distances, ranks, scores, keep, top_k, thresholds)
    return errors


def projected_errors(
    projections: Tensor, ranks: Tensor, scores: Tensor, keep: Tensor, top_k: int, thresholds: Tensor | None = None
) -> Tensor:
    """:func:`subset_errors` of experts whose outputs are one number each: their projections on a gradient, from
    :func:`expert_projection`. ``sum_t (sum_e (w_s[t, e] - w[t, e]) a[t, e])^2``, without a number for every pair.

    Args:
        projections: (T, N) float64, by rank.
        ranks, scores, keep, top_k, thresholds: as for :func:`subset_errors`.

    Returns:
        (S,) float64; the same bits for any number of threads.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`route`.
    """
    errors: Tensor = _call(_PROJECTED_ERRORS, projections, ranks, scores, keep, top_k, thresholds)
    return errors


# ---- fake kernels: what a call would return, or refuse, by the shapes, dtypes and devices of its arguments alone.
# Where tensors of the meta device and others are mixed, torch calls them, too.

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Arguments:
    """Checks of an operator's arguments with the words of csrc/torch/arguments.h; ``first`` is the one whose device the
    others share."""

    def __init__(self, op: str, first_name: str, first: Tensor) -> None:
        self.op, self.first_name, self.first = op, first_name, first

    def require(self, condition: Any, message: str) -> None:
        torch._check(condition, lambda: f"{self.op}: {message}")

    def dims(self, name: str, tensor: Tensor, dims: int, meaning: str) -> None:
        shape = tuple(tensor.shape)
        self.require(tensor.dim() == dims, f"'{name}' has shape {shape}; expected {dims} dimensions {meaning}")

    def like(
        self, name: str, tensor: Tensor, shape: Sequence[int], meaning: str, dtypes: Sequence[torch.dtype]
    ) -> None:
        got = tuple(tensor.shape)
        message = f"'{name}' has shape {got}; expected {tuple(shape)} = {meaning}"
        self.require(len(got) == len(shape), message)
        for size, expected in zip(got, shape, strict=True):
            self.require(size == expected, message)
        self.typed(name, tensor, dtypes)
        expected_device = self.first.device
        self.require(
            tensor.device == expected_device,
            f"'{name}' is on {tensor.device}; expected {expected_device} like '{self.first_name}'",
        )

    def typed(self, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        expected = " or ".join(map(_name, dtypes))
        self.require(tensor.dtype in dtypes, f"'{name}' has dtype {_name(tensor.dtype)}; expected {expected}")

    def contiguous(self, name: str, tensor: Tensor) -> None:
        self.require(tensor.is_contiguous(), f"'{name}' is not contiguous; pass {name}.contiguous()")

    def top_k(self, top_k: int, most: int, meaning: str) -> None:
        self.require(top_k >= 1, f"'top_k' is {top_k}; expected 1 to {most}, {meaning}")
        self.require(top_k <= most, f"'top_k' is {top_k}; expected 1 to {most}, {meaning}")


def _check_formula(check: _Arguments, activation: str, options: Mapping[str, Any]) -> None:
    for name in ("limit", "gate_cap", "up_cap"):
        value = options[name]
        if value is not None:
            check.require(0 < value < float("inf"), f"'{name}' is {value:g}; expected more than 0, or none")
    for name in ("alpha", "up_offset"):
        value = options[name]
        check.require(abs(value) < float("inf"), f"'{name}' is {value:g}; expected a finite number")
    check.require(options["alpha"] != 0, "'alpha' is 0; expected another number")
    silu = activation == "silu"
    names = ", ".join(f'"{known}"' for known in ACTIVATIONS[:-1]) + f' or "{ACTIVATIONS[-1]}"'
    check.require(activation in ACTIVATIONS, f"'activation' is \"{activation[:80]}\"; expected {names}")
    for name in ("alpha", "gate_cap"):
        of_silu = f'\'{name}\' is given with activation "{activation}"; it belongs to "silu"'
        check.require(silu or options[name] == _DEFAULTS[name], of_silu)  # type: ignore[literal-required]
    check.require(options["limit"] is not None or not options["limit_after"], "'limit_after' is given without 'limit'")
    for name in ("interleaved", "limit", "up_offset", "gate_cap", "up_cap"):
        of_gate = f"'{name}' is given with gated=False; it belongs to experts with a gate"
        check.require(options["gated"] or options[name] == _DEFAULTS[name], of_gate)  # type: ignore[literal-required]


_GROUP_SIZES = {"int8": (0,), "int4": (32, 64, 128), "fp8": (0, 128), "mxfp4": (32,)}
_SCALES = ("gate_up_scales", "down_scales")
_ZEROS = ("gate_up_zeros", "down_zeros")
_GIVEN_TYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn, "mxfp4": torch.uint8}


def _check_weight_type(check: _Arguments, weight_type: str) -> None:
    names = ", ".join(f'"{known}"' for known in WEIGHT_TYPES[:-1]) + f' or "{WEIGHT_TYPES[-1]}"'
    check.require(weight_type in WEIGHT_TYPES, f"'weight_type' is \"{weight_type[:80]}\"; expected {names}")


def _packed_row_bytes(weight_type: str, columns: int) -> int:
    of_line = 128 if weight_type in ("int4", "mxfp4") else 64
    return (columns + of_line - 1) // of_line * 64


def _check_format(check: _Arguments, options: Mapping[str, Any]) -> None:
    weight_type, size = options["weight_type"], options["group_size"]
    if weight_type is None:
        for name in ("group_size", *_SCALES, *_ZEROS):
            given = options[name] != 0 if name == "group_size" else options[name] is not None
            check.require(not given, f"'{name}' is given without 'weight_type'")
        return
    _check_weight_type(check, weight_type)
    *sizes, last = map(str, _GROUP_SIZES[weight_type])
    expected = f"{', '.join(sizes)} or {last}" if sizes else last
    known = size in _GROUP_SIZES[weight_type]
    check.require(known, f"'group_size' is {size}; expected {expected} with weight_type \"{weight_type}\"")
    rows = "'transposed' is given with 'weight_type'; quantised weights are rows"
    check.require(not options["transposed"], rows)
    for name in _SCALES:
        check.require(options[name] is not None, f"'weight_type' is given without '{name}'")
    given_zeros = [name for name in _ZEROS if options[name] is not None]
    if given_zeros:
        of_int4 = f'\'{given_zeros[0]}\' is given with weight_type "{weight_type}"; it belongs to "int4"'
        check.require(weight_type == "int4", of_int4)
        alone = f"'{given_zeros[0]}' is given alone; expected zeros of both weights, or of neither"
        check.require(len(given_zeros) == 2, alone)


def _check_activation_type(check: _Arguments, options: Mapping[str, Any]) -> None:
    given = options["activation_type"]
    if given is None:
        return
    check.require(given in ACTIVATION_TYPES, f'\'activation_type\' is "{given[:80]}"; expected "int8", or none')
    of_numbers = "'activation_type' is given with weights that are no whole numbers; expected weight_type"
    whole = options["weight_type"] in ("int8", "int4", "mxfp4")
    check.require(whole, f'{of_numbers} "int8", "int4" or "mxfp4"')
    of_cuda = "'activation_type' is \"int8\"; CUDA kernels multiply activations as they are"
    check.require(check.first.device.type != "cuda", of_cuda)


def _check_quantised(
    check: _Arguments, name: str, weight: Tensor, sizes: Sequence[int], shape: str, options: Mapping[str, Any]
) -> None:
    weight_type, group = options["weight_type"], options["group_size"]
    num_experts, rows, columns = sizes
    packed = (num_experts, rows, _packed_row_bytes(weight_type, columns))
    check.like(name, weight, packed, f"weights {shape} as pack_weights packs them", (torch.uint8,))
    check.contiguous(name, weight)
    in_blocks = weight_type == "fp8" and group == 128
    expected: tuple[int, ...] = (num_experts, (rows + 127) // 128 if in_blocks else rows)
    meaning = f"a scale for every row of {shape}"
    if group != 0:
        expected += ((columns + group - 1) // group,)
        of = (
            "a scale for every block of 128 rows and 128 columns"
            if in_blocks
            else "one for every row and group of columns"
        )
        meaning = f"{of} of {shape}"
    dtypes = {"int4": _FLOATS, "mxfp4": (torch.uint8,)}.get(weight_type, (torch.float32,))
    for what, allowed in (("scales", dtypes), ("zeros", (torch.uint8,))):
        tensor = options[f"{name}_{what}"]
        if tensor is not None:
            check.like(f"{name}_{what}", tensor, expected, meaning, allowed)
            check.contiguous(f"{name}_{what}", tensor)


def _check_layer(
    op: str, x: Tensor, gate_up: Tensor, down: Tensor, activation: str, options: Mapping[str, Any]
) -> _Arguments:
    check = _Arguments(op, "x", x)
    check.dims("x", x, 2, "(T, H)")
    _check_formula(check, activation, options)
    _check_format(check, options)
    _check_activation_type(check, options)
    quantised = options["weight_type"] is not None
    gated, transposed = options["gated"], options["transposed"]
    rows_name = "2I" if gated else "I"
    meaning = f"(E, H, {rows_name})" if transposed else f"(E, {rows_name}, H)"
    dims = f"(E, {rows_name}, bytes)" if quantised else meaning
    check.dims("gate_up", gate_up, 3, dims)
    hidden, num_experts, rows = x.shape[1], gate_up.shape[0], gate_up.shape[2 if transposed else 1]
    even = f" with an even {'last' if transposed else 'second'} dimension and" if gated else " with"
    even = f"'gate_up' has shape {tuple(gate_up.shape)}; expected {dims}{even} none of them 0"
    for size in (num_experts, rows, hidden):
        check.require(size >= 1, even)
    if gated:
        check.require(rows % 2 == 0, even)
    width = rows // 2 if gated else rows
    check.typed("x", x, _FLOATS)
    shape = (num_experts, hidden, rows) if transposed else (num_experts, rows, hidden)
    down_shape = (num_experts, width, hidden) if transposed else (num_experts, hidden, width)
    of_gate_up = f"{meaning} with H from 'x'"
    of_down = "(E, I, H) from 'gate_up'" if transposed else "(E, H, I) from 'gate_up'"
    if quantised:
        _check_quantised(check, "gate_up", gate_up, shape, of_gate_up, options)
        _check_quantised(check, "down", down, down_shape, of_down, options)
        check.typed("down_scales", options["down_scales"], (options["gate_up_scales"].dtype,))
    else:
        check.like("gate_up", gate_up, shape, of_gate_up, (x.dtype,))
        check.like("down", down, down_shape, of_down, (x.dtype,))
        check.contiguous("gate_up", gate_up)
        check.contiguous("down", down)
    biases: dict[str, tuple[tuple[int, int], str]] = {
        "gate_up_bias": ((num_experts, rows), f"(E, {rows_name}) from 'gate_up'"),
        "down_bias": ((num_experts, hidden), "(E, H) from 'gate_up'"),
    }
    for name, (of_shape, of_bias) in biases.items():
        if options[name] is not None:
            check.like(name, options[name], of_shape, of_bias, (x.dtype,))
            check.contiguous(name, options[name])
    return check


def _options(given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a fake kernel gets them: the first by place, others by name, the rest not at all."""
    return {**_DEFAULTS, **dict(zip(_DEFAULTS, given, strict=False)), **named}


def _check_experts(
    op: str,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
    options: Mapping[str, Any],
) -> _Arguments:
    check = _check_layer(op, x, gate_up, down, activation, options)
    check.dims("experts", experts, 2, "(T, K)")
    shape = (x.shape[0], experts.shape[1])
    check.like("experts", experts, shape, "(T, K) with T from 'x'", (torch.int32, torch.int64))
    weights_dtypes = (torch.float32,) if x.dtype == torch.float32 else (torch.float32, x.dtype)
    check.like("weights", weights, shape, "(T, K) from 'experts'", weights_dtypes)
    return check


@torch.library.register_fake("moe_ext::route")
def _route_fake(
    logits: Tensor,
    top_k: int,
    thresholds: Tensor | None = None,
    renormalise: bool = True,
    score: str = "softmax",
    bias: Tensor | None = None,
    by_logits: bool = False,
    groups: int = 1,
    groups_per_token: int = 1,
    group_best: int = 1,
    outside_zero: bool = False,
    epsilon: float = 0.0,
    least: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    check = _Arguments("route", "logits", logits)
    check.dims("logits", logits, 2, "(T, E)")
    check.top_k(top_k, logits.shape[1], "the number of experts in 'logits'")
    check.typed("logits", logits, _FLOATS)
    if thresholds is not None:
        check.like("thresholds", thresholds, (top_k - 1,), "(top_k - 1,)", (torch.float32,))
    names = ", ".join(f'"{known}"' for known in SCORES[:-1]) + f' or "{SCORES[-1]}"'
    check.require(score in SCORES, f"'score' is \"{score[:80]}\"; expected {names}")
    num_experts = logits.shape[1]
    if bias is not None:
        check.like("bias", bias, (num_experts,), "(E,) with E from 'logits'", (torch.float32,))
    divisor = f"'groups' is {groups}; expected a divisor of {num_experts}, the number of experts"
    check.require(groups >= 1, divisor)
    check.require(num_experts % groups == 0, divisor)
    size = num_experts // groups
    fewest = (top_k + size - 1) // size
    held = f"'groups_per_token' is {groups_per_token}; expected {fewest} to {groups}, which hold 'top_k' experts"
    check.require(groups_per_token >= fewest, held)
    check.require(groups_per_token <= groups, held)
    best = f"'group_best' is {group_best}; expected 1 to {size}, the experts of a group"
    check.require(group_best >= 1, best)
    check.require(group_best <= size, best)
    for name, value in (("epsilon", epsilon), ("least", least)):
        check.require(0 <= value < math.inf, f"'{name}' is {value:g}; expected a number from 0 on")
    check.require(math.isfinite(scale), f"'scale' is {scale:g}; expected a finite number")
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("moe_ext::experts")
def _experts_fake(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
    *options: Any,
    **named: Any,
) -> Tensor:
    _check_experts("experts", x, gate_up, down, experts, weights, activation, _options(options, named))
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
    pairs: Tensor | None = None,
    *options: Any,
    **named: Any,
) -> Tensor:
    of_layer = _options(options, named)
    check = _check_experts("experts_observed", x, gate_up, down, experts, weights, activation, of_layer)
    check.like("moments", moments, (gate_up.shape[0], 3, 3), "(E, 3, 3) with E from 'gate_up'", (torch.float64,))
    check.contiguous("moments", moments)
    if channels is not None:
        rows = gate_up.shape[2 if of_layer["transposed"] else 1]
        shape = (down.shape[0], rows // 2 if of_layer["gated"] else rows)
        check.like("channels", channels, shape, "(E, I) from 'gate_up'", (torch.float64,))
        check.contiguous("channels", channels)
    if pairs is not None:
        check.like("pairs", pairs, (gate_up.shape[0], gate_up.shape[0]), "(E, E) from 'gate_up'", (torch.float64,))
        check.contiguous("pairs", pairs)
    if counted is not None:
        check.like("counted", counted, (x.shape[0],), "(T,) with T from 'x'", (torch.bool,))
    return x.new_empty(x.shape)


@torch.library.register_fake("moe_ext::expert_gram")
def _expert_gram_fake(x: Tensor, gate_up: Tensor, down: Tensor, activation: str, *options: Any, **named: Any) -> Tensor:
    _check_layer("expert_gram", x, gate_up, down, activation, _options(options, named))
    num_experts = gate_up.shape[0]
    return x.new_empty((x.shape[0], num_experts, num_experts), dtype=torch.float64)


@torch.library.register_fake("moe_ext::expert_projection")
def _expert_projection_fake(
    x: Tensor, gate_up: Tensor, down: Tensor, g: Tensor, activation: str, *options: Any, **named: Any
) -> Tensor:
    check = _check_layer("expert_projection", x, gate_up, down, activation, _options(options, named))
    dtypes = (torch.float32,) if x.dtype == torch.float32 else (torch.float32, x.dtype)
    check.like("g", g, tuple(x.shape), "(T, H) like 'x'", dtypes)
    return x.new_empty((x.shape[0], gate_up.shape[0]), dtype=torch.float64)


@torch.library.register_fake("moe_ext::pack_weights")
def _pack_weights_fake(values: Tensor, weight_type: str) -> Tensor:
    check = _Arguments("pack_weights", "values", values)
    _check_weight_type(check, weight_type)
    pairs = weight_type in ("int4", "mxfp4")
    check.dims("values", values, 3, "(E, R, C / 2)" if pairs else "(E, R, C)")
    check.typed("values", values, (_GIVEN_TYPES[weight_type],))
    num_experts, rows, columns = values.shape
    row_bytes = _packed_row_bytes(weight_type, 2 * columns if pairs else columns)
    return values.new_empty((num_experts, rows, row_bytes), dtype=torch.uint8)


@torch.library.register_fake("moe_ext::unpack_weights")
def _unpack_weights_fake(packed: Tensor, weight_type: str, columns: int) -> Tensor:
    check = _Arguments("unpack_weights", "packed", packed)
    _check_weight_type(check, weight_type)
    check.dims("packed", packed, 3, "(E, R, bytes)")
    check.typed("packed", packed, (torch.uint8,))
    check.require(0 <= columns < 2**31, f"'columns' is {columns}; expected the number that were packed")
    num_experts, rows, _ = packed.shape
    expected = (num_experts, rows, _packed_row_bytes(weight_type, columns))
    check.like("packed", packed, expected, "(E, R, bytes of 'columns')", (torch.uint8,))
    given = (columns + 1) // 2 if weight_type in ("int4", "mxfp4") else columns
    return packed.new_empty((num_experts, rows, given), dtype=_GIVEN_TYPES[weight_type])


def _errors_fake(
    op: str, outputs: str, given: Tensor, ranks: Tensor, scores: Tensor, keep: Tensor, top_k: int, thresholds: Any
) -> Tensor:
    check = _Arguments(op, "ranks", ranks)
    check.dims("ranks", ranks, 2, "(T, N)")
    check.dims("keep", keep, 2, "(S, E)")
    (tokens, depth), (subsets, num_experts) = ranks.shape, keep.shape
    check.typed("ranks", ranks, (torch.int64,))
    if outputs == "distances":
        shape, meaning = (tokens, depth * (depth - 1) // 2), "(T, N (N - 1) / 2) with T and N from 'ranks'"
    else:
        shape, meaning = (tokens, depth), "(T, N) from 'ranks'"
    check.like(outputs, given, shape, meaning, (torch.float64,))
    check.like("scores", scores, (tokens, depth), "(T, N) from 'ranks'", (torch.float64,))
    check.like("keep", keep, (subsets, num_experts), "(S, E)", (torch.bool,))
    check.require(
        depth <= num_experts,
        f"'ranks' has N = {depth} ranks a token; expected at most {num_experts}, the number of experts in 'keep'",
    )
    check.top_k(top_k, depth, "the number of ranks in 'ranks'")
    if thresholds is not None:
        check.like("thresholds", thresholds, (top_k - 1,), "(top_k - 1,)", (torch.float32,))
    return scores.new_empty((subsets,))


@torch.library.register_fake("moe_ext::subset_errors")
def _subset_errors_fake(
    distances: Tensor, ranks: Tensor, scores: Tensor, keep: Tensor, top_k: int, thresholds: Tensor | None = None
) -> Tensor:
    return _errors_fake("subset_errors", "distances", distances, ranks, scores, keep, top_k, thresholds)


@torch.library.register_fake("moe_ext::projected_errors")
def _projected_errors_fake(
    projections: Tensor, ranks: Tensor, scores: Tensor, keep: Tensor, top_k: int, thresholds: Tensor | None = None
) -> Tensor:
    return _errors_fake("projected_errors", "projections", projections, ranks, scores, keep, top_k, thresholds)
