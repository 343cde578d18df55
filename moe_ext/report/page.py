"""The report as one HTML page or as PNG files.

The page needs nothing but itself: figures are inline SVG in the page's own colours, light or dark, every figure has a
text alternative, and a content security policy keeps it from loading anything. Figures are drawn by matplotlib, the
page is a jinja2 template; ``pip install 'moe_ext[report]'`` brings both.
"""

from __future__ import annotations

import io
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from moe_ext.report.canvas import need
from moe_ext.report.sections import Picture, Report
from moe_ext.report.slider import slider
from moe_ext.storage.files import replace_file, replace_folder
from moe_ext.version import __version__

# Drawn in this colour, replaced by the page's text colour.
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moe_ext",  # the same page from the same input
    "font.size": 9.0,
    **dict.fromkeys(
        ["text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"], _INK
    ),
    "legend.framealpha": 0.0,
}


def write_page(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report as one HTML page, whole or not at all.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        OSError: the file cannot be written.
    """
    page = render(report)
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def write_figures(report: Report, folder: str | os.PathLike[str]) -> list[str]:
    """Write every figure as a PNG file into a folder, which appears when it is complete.

    Returns:
        The files' names.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the folder holds something, or cannot be written.
    """
    need("matplotlib")
    names = []
    with replace_folder(folder) as temporary:
        for section in report.sections():
            for picture in section.pictures:
                names.append(f"{picture.name}.png")
                picture.draw().savefig(Path(temporary) / names[-1], format="png", dpi=150)
    return names


def render(report: Report) -> str:
    """The page as text.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    need("matplotlib", "jinja2")
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        resources.files("moe_ext.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    sections = report.sections()
    drawn = {picture.name: _inline_svg(picture) for section in sections for picture in section.pictures}
    return template.render(
        stats=report.stats,
        tokens=int(report.stats.tokens.max()),
        sections=sections,
        drawn=drawn,
        slider=slider(report.stats) if "gate-ratios" in drawn else None,
        version=__version__,
    )


def _inline_svg(picture: Picture) -> str:
    """A figure as an SVG element in the page's colours, whose names do not clash with another figure's."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = picture.draw()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    width = figure.get_figwidth()
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Tags alone: between them are names, which may read like anything.
    svg = re.sub(r"<[^>]*>", lambda tag: _in_page(tag[0], picture.name), svg)
    # The page says what the figure shows; its size follows the column, within reason.
    size = f'style="max-width: {width * 110:.0f}px; min-width: {min(width, 2.9) * 100:.0f}px"'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 aria-hidden="true" {size}>', svg, count=1)


def _in_page(tag: str, figure: str) -> str:
    """A tag of a figure's SVG in the page's colours and font, with names of its own."""
    tag = re.sub(r"; font-family: [^;\"]*", "", tag.replace(_INK, "currentColor"))
    return re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{figure}-", tag)
