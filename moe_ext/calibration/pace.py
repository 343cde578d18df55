"""The progress bar of a calibration: batches or tokens, tokens a second, bad rows, time spent waiting for text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from operator import length_hint
from typing import Any

from tqdm import tqdm


class Pace:
    """Batches, with a bar that says how fast they are gone through; a context manager that closes it.

    Args:
        batches: to be given out.
        source: what they come from: its ``tokens`` or its length say how much there is, if it has one; its ``counts``
            and ``waiting`` (:class:`moe_ext.data.Batches`) are shown.
        show: whether there is a bar.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]], source: object, *, show: bool) -> None:
        self._batches, self._source = batches, source
        budget = getattr(source, "tokens", None)
        self._by_tokens = isinstance(budget, int)
        total = budget if self._by_tokens else length_hint(source, 0) or None
        unit = "token" if self._by_tokens else "batch"
        self._bar = tqdm(total=total, desc="calibrate", unit=unit, unit_scale=self._by_tokens, disable=not show)
        self._tokens, self._begun = 0, time.monotonic()

    def __enter__(self) -> Pace:
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._batches)

    def add(self, tokens: int) -> None:
        """A batch of so many counted tokens is done."""
        self._tokens += tokens
        if self._bar.disable:
            return
        said = [] if self._by_tokens else [f"{self._tokens / (time.monotonic() - self._begun):.0f} tokens/s"]
        counts, waiting = getattr(self._source, "counts", None), getattr(self._source, "waiting", None)
        if bad := getattr(counts, "bad", 0):
            said.append(f"{bad} bad rows")
        if isinstance(waiting, float):
            said.append(f"waiting {waiting:.1%}")
        self._bar.set_postfix_str(", ".join(said), refresh=False)
        self._bar.update(tokens if self._by_tokens else 1)
