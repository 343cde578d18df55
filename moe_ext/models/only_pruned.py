"""Experts that a plan removes and that nothing else here is for: their family's code computes them from a form that is
not the operators', so that they are not patched, and what single experts give is not seen, so that nothing is
calibrated or searched.

Which of their tensors count experts, how many rows each has, and the config's field are measured
(:mod:`moe_ext.models.counted`): what is said here of a family is the name of its class.
"""

from torch import nn

# DbrxExperts: three matrices of a module inside it, each with all experts' rows above one another.
_CLASSES = {"DbrxExperts"}


def is_only_pruned(experts: nn.Module) -> bool:
    """Whether a module holds experts that are pruned, and neither run nor observed."""
    return type(experts).__name__ in _CLASSES
