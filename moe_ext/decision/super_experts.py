"""Super experts (arXiv 2507.23279): the few whose outputs are outliers, and whose removal can break a model.

Their rule: of all experts' largest output magnitudes, one above the 99.5th percentile and above a tenth of the largest,
in a layer where massive activations form. Statistics hold sums of output norms, neither maxima nor hidden states, so:

- in the place of the largest magnitude stands ``sum ||f||^2 / sum ||f||`` over an expert's routed tokens, the largest
  bound below ``max ||f||`` that the two sums give. Where a few outliers make up most of the sum, as in super experts,
  it is close; and there the norm is close to the one large element;
- in the place of the layers where massive activations form stands a comparison within the layer: above ``OUTLIER``
  times the median of its experts. Without it every model would have super experts, as something is always above the
  99.5th percentile. The factor is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.storage.formats import shortened, shown

QUANTILE = 0.995
OF_LARGEST = 0.1
OUTLIER = 10.0
"""Times the median of its layer's experts, above which an expert's norm is an outlier of the layer."""


@dataclass(frozen=True)
class SuperExpert:
    """An expert whose output is an outlier.

    Attributes:
        layer: index of its layer.
        name: module name of its layer.
        expert: its index.
        norm: what stands for its largest output norm.
        median: the same of its layer's experts that tokens reached, the median.
    """

    layer: int
    name: str
    expert: int
    norm: float
    median: float

    def __str__(self) -> str:
        return (
            f"expert {self.expert} of {shown(self.name)} (output norm {self.norm:.3g}, "
            f"its layer's median {self.median:.3g})"
        )


def peak_norms(stats: ExpertStatistics) -> Tensor:
    """(L, E) float64: ``sum ||f||^2 / sum ||f||``, at most the largest norm of an expert's outputs and at least their
    mean; 0 for an expert that no token reached."""
    norms, squares = stats.moments[:, :, 0, 1], stats.moments[:, :, 0, 2]
    return torch.where(norms > 0, squares / norms.where(norms > 0, 1.0), 0.0)


def super_experts(stats: ExpertStatistics) -> tuple[SuperExpert, ...]:
    """The experts whose outputs are outliers, after arXiv 2507.23279, by layer and index.

    An expert is one if its norm (see this module) is above the 99.5th percentile of all experts that tokens reached,
    above a tenth of the largest, and above ten times the median of its layer. At most one in 200 is, rounded up.

    Args:
        stats: statistics of the unpruned model; of text as long as the windows in which the model will be used: such
            outputs often belong to a sequence's first token.

    Returns:
        Most often none, or a handful.
    """
    peaks = peak_norms(stats)
    reached = peaks > 0
    if not bool(reached.any()):
        return ()
    every = peaks[reached]
    threshold = max(float(torch.quantile(every, QUANTILE)), OF_LARGEST * float(every.max()))
    found = []
    for layer, (name, row) in enumerate(zip(stats.layers, peaks, strict=True)):
        if not bool((row > 0).any()):
            continue
        median = float(row[row > 0].median())
        for expert in ((row > threshold) & (row > OUTLIER * median)).nonzero().flatten().tolist():
            found.append(SuperExpert(layer, name, expert, float(row[expert]), median))
    return tuple(found)


def named(experts: Iterable[SuperExpert]) -> str:
    """Super experts as a message names them, in a few hundred characters."""
    experts = tuple(experts)
    which = "1 super expert" if len(experts) == 1 else f"{len(experts)} super experts"
    return f"{which} (arXiv 2507.23279): {shortened('; '.join(map(str, experts)), 300)}"
