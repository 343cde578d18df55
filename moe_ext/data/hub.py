"""Rows of a data set on the Hugging Face Hub, streamed through the package ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_ext.data.rows import Row
from moe_ext.storage.formats import shortened


def hub_rows(name: str, split: str | None) -> Iterator[Row]:
    """The rows of a data set's split, which is not downloaded as a whole.

    Args:
        split: ``train`` if None; ``config/split`` for one of several configs.

    Raises:
        OSError: it cannot be opened, or a row cannot be fetched; says after which.
    """
    config, _, part = (split or "train").rpartition("/")
    number = 0
    try:
        for row in _streamed(name, config or None, part):
            number += 1
            yield Row(row, name, "row", number)
    except Exception as error:  # whatever datasets, fsspec and the network raise
        after = f"stopped after row {number}" if number else "cannot be opened"
        reason = f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 200)}"
        raise OSError(
            f"data {name} (no file here: a data set on the Hub), split {shortened(split or 'train', 60)}: {after} "
            f"({reason}); files on this machine take no network"
        ) from error


def _streamed(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    yield from datasets.load_dataset(name, config, split=split, streaming=True)
