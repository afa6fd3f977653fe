"""How pictures are begun and saved here, whatever they show."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of that size, in inches."""
    # The Figure class draws without pyplot, whose backend and state belong to the caller.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def clean(axes: Axes) -> None:
    """Take the frame away above and on the right, and put ticks and grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure to `path`, whose folder is made, and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
