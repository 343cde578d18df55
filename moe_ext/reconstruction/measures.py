"""What a search's losses measure. All of them add up what a calibration batch's tokens lose."""

from typing import Literal, get_args

from torch import Tensor

Measure = Literal["norms", "squares"]
MEASURES: tuple[str, ...] = get_args(Measure)
"""- "norms": the sum over calibration batches of ``||F(x) - F_R(x)||_F``, as the paper's published code has it. Norms
  of different layers do not add up to anything.
- "squares": the sum over tokens of ``||F(x) - F_R(x)||^2``, which layers can be compared by.
"""


def loss_of_batch(measure: Measure, errors: Tensor) -> Tensor:
    """What a batch adds to its subsets' losses, of the sums of its tokens' squared errors. Rounding can leave an error
    of 0 slightly negative. A NaN stays one."""
    errors = errors.clamp(min=0)
    return errors.sqrt() if measure == "norms" else errors
