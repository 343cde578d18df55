"""Which channels every kept expert keeps, compact enough for a plan file: a bit a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptChannels:
    """The channels that the experts of every layer keep; within a layer each expert the same number.

    Attributes:
        intermediate_size: I, channels of every expert before.
        masks: for every layer and each expert that it keeps, ascending, its bits: channel j is bit ``7 - j % 8`` of
            byte ``j // 8``.

    Raises:
        ValueError: a mask has another length or bits beyond I, or experts of a layer keep different numbers or none
            (layer and expert are named by their position).
    """

    intermediate_size: int
    masks: tuple[tuple[bytes, ...], ...]

    def __post_init__(self) -> None:
        length = -(-self.intermediate_size // 8)
        for layer, masks in enumerate(self.masks):
            counts = [int.from_bytes(mask, "big").bit_count() for mask in masks]
            for position, mask in enumerate(masks):
                where = f"channels: layer {layer}, kept expert {position}"
                if len(mask) != length:
                    raise ValueError(f"{where}: has {len(mask)} bytes; expected {length}")
                if length * 8 > self.intermediate_size and mask[-1] & (0xFF >> (self.intermediate_size + 7) % 8 + 1):
                    raise ValueError(f"{where}: keeps a channel beyond the {self.intermediate_size} that there are")
                if counts[position] != counts[0] or counts[position] == 0:
                    raise ValueError(
                        f"{where}: keeps {counts[position]} channels; expected as many as the layer's first expert, "
                        f"{counts[0]}, and at least 1"
                    )

    @classmethod
    def of(cls, kept: Sequence[Tensor], intermediate_size: int) -> KeptChannels:
        """From every layer's (E', I') ascending channel indices.

        Raises:
            ValueError: an index outside 0..I - 1, or one that comes twice.
        """
        masks = []
        for layer, channels in enumerate(kept):
            if channels.numel() and not 0 <= int(channels.min()) <= int(channels.max()) < intermediate_size:
                raise ValueError(
                    f"channels: layer {layer}: expected 0 to {intermediate_size - 1}, got {int(channels.min())} to "
                    f"{int(channels.max())}"
                )
            bits = torch.zeros(channels.shape[0], intermediate_size, dtype=torch.bool)
            bits.scatter_(1, channels.cpu(), True)
            if not bool((bits.sum(1) == channels.shape[1]).all()):
                raise ValueError(f"channels: layer {layer}: an expert keeps a channel twice")
            masks.append(tuple(row.tobytes() for row in numpy.packbits(bits.numpy(), axis=1)))
        return cls(intermediate_size, tuple(masks))

    def width(self, layer: int) -> int:
        """I', the channels that each expert of a layer keeps."""
        return int.from_bytes(self.masks[layer][0], "big").bit_count()

    def indices(self, layer: int) -> Tensor:
        """(E', I') int64, ascending: the channels that a layer's experts keep."""
        packed = numpy.frombuffer(b"".join(self.masks[layer]), dtype=numpy.uint8).reshape(len(self.masks[layer]), -1)
        bits = torch.from_numpy(numpy.unpackbits(packed, axis=1, count=self.intermediate_size))
        return bits.nonzero()[:, 1].view(len(self.masks[layer]), -1)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; masks in hexadecimal digits, channel 0 in the highest bit of the first."""
        return {
            "intermediate_size": self.intermediate_size,
            "kept": [[mask.hex() for mask in masks] for masks in self.masks],
        }

    @classmethod
    def from_json(cls, value: Any) -> KeptChannels:
        """What :meth:`to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        fields = value if isinstance(value, dict) else {}
        size, kept = fields.get("intermediate_size"), fields.get("kept")
        if fields.keys() != {"intermediate_size", "kept"} or type(size) is not int or size < 1:
            raise ValueError("channels: expected an object with 'intermediate_size', 1 or more, and 'kept'")
        if not isinstance(kept, list) or not all(
            isinstance(masks, list) and masks and all(isinstance(mask, str) for mask in masks) for masks in kept
        ):
            raise ValueError("channels: 'kept' is expected to hold a list of hexadecimal masks for every layer")
        try:
            return cls(size, tuple(tuple(bytes.fromhex(mask) for mask in masks) for masks in kept))
        except ValueError as error:
            message = str(error)
            raise ValueError(message if message.startswith("channels") else f"channels: {message}") from None
