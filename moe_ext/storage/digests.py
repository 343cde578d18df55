"""Short fingerprints that tell models and texts apart: of statistics that do not add up, of interrupted runs."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def joined_digest(digests: Iterable[str]) -> str:
    """One of several; empty if one of them is."""
    digests = list(digests)
    if not all(digests):
        return ""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def text_digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Of the batches' tensors."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {tuple(batch[name].shape)} {batch[name].dtype}".encode())
            digest.update(tensor_bytes(batch[name]))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's elements in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
