"""The picture of a measurement: milliseconds by number of tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_ext.bench.measure import Measured
from moe_ext.report.canvas import empty_figure
from moe_ext.storage.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def speed_figure(rows: Sequence[Measured], title: str) -> Figure:
    """Milliseconds by number of tokens: ours, the peers, and the machine's limit."""
    figure = empty_figure(6.0, 4.0)
    axes = figure.subplots()
    for name in dict.fromkeys(name for row in rows for name in row.peers):
        ran = [row for row in rows if name in row.peers]
        axes.plot([row.tokens for row in ran], [row.peers[name] for row in ran], "o-", markersize=3, label=name)
    tokens = [row.tokens for row in rows]
    axes.plot(tokens, [row.ours for row in rows], "ko-", linewidth=2, label="moe_ext")
    axes.plot(tokens, [row.limit for row in rows], color="gray", linestyle="--", label="limit of the machine")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds a layer")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")
    return figure


def write_speed_figure(rows: Sequence[Measured], title: str, path: str | os.PathLike[str]) -> None:
    """:func:`speed_figure` as a PNG file, whole or not at all.

    Raises:
        ImportError: matplotlib is missing; says what to install.
        OSError: the file cannot be written.
    """
    figure = speed_figure(rows, title)
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
