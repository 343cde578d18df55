"""Short fingerprints that tell models and texts apart: of statistics that do not add up, of interrupted runs."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def joined_digest(digests: Iterable[str]) -> str:
    """One of several; empty if one of them is."""
    digests = list(digests)
    if not all(digests):
        return ""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def text_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Of the batches' tensors, and what else they say, such as their domain."""
    digest = TextDigest()
    for batch in batches:
        digest.add(batch)
    return digest.hexdigest()


class TextDigest:
    """:func:`text_digest` of batches as they come."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, batch: Mapping[str, Any]) -> None:
        """The next one."""
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, Tensor):
                self._digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                self._digest.update(tensor_bytes(value))
            else:
                self._digest.update(f"{name} {value!r}".encode())

    def hexdigest(self) -> str:
        """Of all so far."""
        return self._digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's elements in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


_SAMPLES = 8  # along each of a matrix's dimensions, or up to twice as many


def sampled_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of named tensors' types, shapes and some of their elements, the same in every process: of vectors and matrices,
    and of every matrix where several stand in one tensor, as experts do. Elements that are not in memory, or are
    shared among processes, do not count."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter):
            continue
        steps = [1 if size < _SAMPLES else size // _SAMPLES for size in tensor.shape[-2:]]
        whole = [slice(None)] * (tensor.dim() - len(steps))
        digest.update(tensor_bytes(tensor[(*whole, *(slice(None, None, step) for step in steps))]))
    return digest.hexdigest()
