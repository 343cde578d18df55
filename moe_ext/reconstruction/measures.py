"""What a search's losses measure. All of them add up what a calibration batch's tokens lose."""

from typing import Literal, get_args

from torch import Tensor

Measure = Literal["norms", "squares", "nats"]
MEASURES: tuple[str, ...] = get_args(Measure)
"""- "norms": the sum over calibration batches of ``||F(x) - F_R(x)||_F``, as the paper's published code has it. Norms
  of different layers do not add up to anything.
- "squares": the sum over tokens of ``||F(x) - F_R(x)||^2``, which layers can be compared by.
- "nats": half the mean over tokens of ``(sum_e (w_R[t, e] - w[t, e]) a_t[e])^2``, ``a_t[e]`` the scalar product of
  expert e's output with the loss's gradient: what the model's cross-entropy is predicted to rise by, a token.
"""


def loss_of_batch(measure: Measure, errors: Tensor, tokens: int) -> Tensor:
    """What a batch adds to its subsets' losses.

    Args:
        errors: the sums of its tokens' squared errors. Rounding can leave one of 0 slightly negative. A NaN stays one.
        tokens: tokens of all batches.
    """
    errors = errors.clamp(min=0)
    if measure == "nats":
        return errors / (2 * tokens)
    return errors.sqrt() if measure == "norms" else errors
