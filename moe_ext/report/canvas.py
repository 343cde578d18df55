"""What drawing needs: packages that are an extra, and an empty figure."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def need(*packages: str) -> None:
    """Raises an ImportError that says what to install unless the packages are there."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"figures and reports need {package}: pip install 'moe_ext[report]'") from error


def empty_figure(width: float, height: float) -> Figure:
    """A matplotlib figure, sized in inches, outside pyplot: nothing to close.

    Raises:
        ImportError: matplotlib is missing; says what to install.
    """
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
