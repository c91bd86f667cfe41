"""The look of every figure, and figures that a notebook shows exactly once.

Colours are safe for colour-blind readers (Okabe and Ito; red and blue around zero), and the style holds for what is drawn here
only. A pyplot figure that ends a cell is shown twice, as the cell's value and as an open figure, and stays in memory; a figure made
without pyplot is shown as text unless the notebook's inline backend happens to be loaded. `NotebookFigure` needs neither.

Source for the colours: Okabe and Ito, "Color universal design" (2008).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from caa_lens.errors import InputError
from caa_lens.token_text import SIGNS

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise InputError("plots need matplotlib; install it with pip install 'caa-lens[plot]'.") from error

BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
)
SERIES = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, "#000000")
MARKERS = "osD^vPX"
POSITIVE, NEGATIVE, DIVERGING, SEQUENTIAL = "#B2182B", "#2166AC", "RdBu_r", "viridis"
LONGEST_LABEL, MOST_ROWS, MOST_TOKENS = 16, 32, 60
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "text.parse_math": False,  # a token may hold dollar signs
}


class NotebookFigure(Figure):
    """A figure that is no pyplot figure and that a notebook shows as a picture, whatever backend is loaded."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The picture at two pixels a point of screen, and the size to show it at."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=2 * self.dpi)
        width, height = (round(side * self.dpi) for side in self.get_size_inches())
        return buffer.getvalue(), {"width": width, "height": height}


@contextmanager
def canvas(
    ax: Axes | None, width: float, height: float, *, panels: int = 1, rows: int = 1, share_y: bool = True
) -> Iterator[tuple[Figure, list[Axes]]]:
    """The style, while drawing, with the axis's figure and the axis, or a new figure with its axes, row by row.

    Args:
        ax: where to draw; None makes a figure.
        width, height: of the new figure, in inches.
        panels, rows: axes side by side and above each other in the new figure.
        share_y: whether they have one scale upwards.
    """
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # the stubs list keys, and want literals
        if ax is not None:
            yield ax.figure.figure, [ax]
        else:
            figure = NotebookFigure(figsize=(width, height), layout="constrained")
            yield figure, list(figure.subplots(rows, panels, sharey=share_y, squeeze=False).flat)


def colormap(name: str) -> Any:
    """A colour map by name, grey where there is no number."""
    return matplotlib.colormaps[name].with_extremes(bad="#DDDDDD")


def layer_colors(layers: Sequence[int]) -> ScalarMappable:
    """A colour for each layer, from dark to light."""
    return ScalarMappable(Normalize(min(layers), max(layers)), colormap(SEQUENTIAL))


def layer_bar(figure: Figure, ax: Axes, colors: ScalarMappable) -> None:
    """The key to `layer_colors` beside the axis."""
    figure.colorbar(colors, ax=ax, label="layer", pad=0.02, ticks=MaxNLocator(integer=True))


def visible(token: str) -> str:
    """A token in one line: its white space shown, what cannot be printed or is not in the font escaped, long ones cut."""
    drawn = token.translate(SIGNS)
    shown = "".join(c if _drawable(c) else c.encode("unicode_escape").decode() for c in drawn)
    return shown if len(shown) <= LONGEST_LABEL else f"{shown[: LONGEST_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"


@lru_cache(maxsize=4096)
def _drawable(character: str) -> bool:
    return character.isprintable() and get_font(findfont(FontProperties())).get_char_index(ord(character)) > 0


def draw_bars(ax: Axes, values: Float[np.ndarray, " place"]) -> None:
    """A bar a value, all of them one artist: thousands of `Axes.bar`'s rectangles take seconds to lay out and draw.

    Of many, no bar is rounded away where it is narrower than a pixel, and none is set apart from the next.
    """
    many = len(values) > 5 * MOST_TOKENS
    half, places, ground = 0.5 if many else 0.425, np.arange(len(values)), np.zeros_like(values)
    left, right = places - half, places + half
    corners = np.stack([left, ground, left, values, right, values, right, ground], axis=1).reshape(-1, 4, 2)
    colors = np.where(values < 0, NEGATIVE, POSITIVE).tolist()
    bars = PolyCollection(list(corners), facecolors=colors, linewidths=0, snap=False if many else None)
    bars.sticky_edges.y.append(0)
    ax.add_collection(bars)
    ax.margins(x=0.01)
    ax.autoscale_view()


def tick_at(ax: Axes, places: Iterable[float]) -> None:
    """Ticks where the data are, at most 16 of them."""
    distinct = sorted(set(places))
    ax.set_xticks(distinct[:: -(-len(distinct) // 16)])


def label_ticks(axis: Any, labels: Sequence[int | str], *, at_most: int) -> None:
    """Names the places 0, 1, ... of an axis; of too many, every k-th is named, tokens then with their position."""
    step = -(-len(labels) // at_most)
    places = range(0, len(labels), step)
    texts = [labels[i] for i in places]
    names = [visible(text) if isinstance(text, str) else str(text) for text in texts]
    if step > 1:
        names = [f"{i} {name}" if isinstance(labels[i], str) else name for i, name in zip(places, names, strict=True)]
    axis.set_ticks(list(places), names)
    upright = axis.axis_name == "x" and (len(names) > 24 or any(len(name) > 2 for name in names))
    for text in axis.get_ticklabels():
        text.set(parse_math=False, size=7, rotation=90 if upright else 0)
    axis.set_tick_params(length=2)
