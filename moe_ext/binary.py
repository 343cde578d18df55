"""The compiled half of the package: loads ``moe_ext._C``, which registers ``torch.ops.moe_ext``, or says what to do.

Kept apart so that the two things that can be wrong (a torch that is too old, a binary that is missing or does not fit)
are each one clear ImportError.
"""

import torch
from torch.torch_version import TorchVersion

OLDEST_TORCH = "2.10"


def require_torch(found: str) -> None:
    """Raises ImportError if torch version ``found`` is older than the stable ABI that the binary needs."""
    if TorchVersion(found) < OLDEST_TORCH:
        raise ImportError(
            f"moe_ext needs torch >= {OLDEST_TORCH}, found {found}. Run: pip install --upgrade 'torch>={OLDEST_TORCH}'"
        )


require_torch(torch.__version__)

try:
    from moe_ext import _C
except ImportError as error:
    raise ImportError(
        f"moe_ext's compiled extension cannot be loaded ({error}). "
        "Build it for this Python and torch, from the source folder: pip install --no-build-isolation ."
    ) from error

__all__ = ["OLDEST_TORCH", "_C", "require_torch"]
