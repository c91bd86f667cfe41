"""Figures of patches, lenses and geometry with matplotlib: every function takes an axis and returns the figure.

Layers grow upwards or to the right. Diverging colours are centred on zero, series use colour-blind-safe colours (Okabe and Ito)
and markers of their own. Figures are not registered with pyplot: a notebook shows each once, and none piles up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Float
from torch import Tensor

from caa_lens.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from caa_lens.geometry import PCA, Norms, Similarity
    from caa_lens.separation import Separability

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8a8a8a"
SERIES = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches.

    Raises:
        MissingError: matplotlib is not installed.
    """
    from caa_lens.figures import NotebookFigure

    return NotebookFigure(figsize=(width, height), layout="constrained")


def axes_of(ax: Axes | None, width: float, height: float) -> tuple[Figure, Any]:
    """The axis's figure and the axis, or those of a new figure."""
    figure = new_figure(width, height) if ax is None else cast("Figure", ax.get_figure(root=True))
    return figure, ax or figure.subplots()


def plot_heatmap(
    values: Float[Tensor, "row column"],
    rows: Sequence[int | str],
    columns: Sequence[int | str],
    *,
    label: str,
    row_label: str = "layer",
    column_label: str = "",
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A table of numbers as colours, zero white, the first row at the bottom.

    Args:
        values: the numbers.
        rows, columns: their labels; tokens are shown with their white space.
        label: of the colour bar, with the unit.
        row_label, column_label, title: of the axes.
        ax: where to draw; a new figure by default.
    """
    figure, ax = axes_of(ax, min(3 + 0.26 * len(columns), 14), min(1.6 + 0.17 * len(rows), 9))
    largest = float(values.abs().max()) or 1.0
    image = ax.pcolormesh(values.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, rasterized=True)
    _colour_bar(figure, image, ax, label)
    _ticks(ax, rows, columns)
    ax.set(ylabel=row_label, xlabel=column_label, title=title)
    return figure


def plot_lens(
    probabilities: Float[Tensor, "layer position"],
    words: Sequence[Sequence[str]],
    layers: Sequence[int],
    tokens: Sequence[str],
    *,
    ax: Axes | None = None,
) -> Figure:
    """The likeliest next token of every layer (upwards) and position, darker where it is likelier."""
    longest = min(max(len(_visible(word)) for row in words for word in row), 12)
    width = 0.085 * max(longest, 5) + 0.1
    figure, ax = axes_of(ax, 1.9 + width * len(tokens), 1.5 + 0.2 * len(layers))
    image = ax.pcolormesh(probabilities.numpy(), cmap="Blues", vmin=0, vmax=1, rasterized=True)
    _colour_bar(figure, image, ax, "probability of the token")
    for y, row in enumerate(words):
        for x, word in enumerate(row):
            text = _visible(word)
            ax.text(
                x + 0.5,
                y + 0.5,
                text if len(text) <= 12 else f"{text[:11]}\N{HORIZONTAL ELLIPSIS}",
                color="white" if float(probabilities[y, x]) > 0.55 else "black",
                ha="center",
                va="center",
                size=7,
                parse_math=False,
            )
    _ticks(ax, layers, tokens)
    ax.set(ylabel="layer", xlabel="read at")
    return figure


def plot_similarity(similarity: Similarity, *, ax: Axes | None = None) -> Figure:
    """All cosines as a heat map; lines separate the sets."""
    n = len(similarity.names)
    figure, ax = axes_of(ax, 6.4, 5.4)
    image = ax.pcolormesh(similarity.values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
    _colour_bar(figure, image, ax, "cosine similarity")
    names = list(dict.fromkeys(similarity.names))
    if len(names) == 1:
        _ticks(ax, similarity.layers, similarity.layers)
        ax.set(xlabel="layer", ylabel="layer", title=names[0])
    else:
        starts = [similarity.names.index(name) for name in names]
        middles = [(a + b) / 2 for a, b in zip(starts, [*starts[1:], n], strict=True)]
        ax.hlines(starts[1:], 0, n, color="black", linewidth=0.8)
        ax.vlines(starts[1:], 0, n, color="black", linewidth=0.8)
        ax.set_xticks(middles, names, rotation=30, ha="right", rotation_mode="anchor")
        ax.set_yticks(middles, names)
        ax.tick_params(length=0)
        ax.set(xlabel="within each block: layers, ascending")
    ax.set_aspect("equal")
    return figure


def plot_pca(pca: PCA, *, layer: int | None = None, ax: Axes | None = None) -> Figure:
    """The pairs along the first two components; all layers as small multiples if no layer is given.

    Raises:
        InputError: a layer that is not there, an axis for several layers, or fewer than two components.
    """
    if pca.explained.shape[1] < 2:
        raise InputError("a plot needs two components; make them with pca(..., n_components=2).")
    if layer is not None and layer not in pca.layers:
        raise InputError(f"layer {layer} is not in this PCA; there are {', '.join(map(str, pca.layers))}.")
    rows = range(len(pca.layers)) if layer is None else [pca.layers.index(layer)]
    if len(rows) == 1:
        figure, ax = axes_of(ax, 4.6, 3.9)
        _scatter(pca, rows[0], ax, size=18)
        share = [f"PC{i + 1} ({float(pca.explained[rows[0], i]):.0%} of variance)" for i in range(2)]
        ax.set(xlabel=share[0], ylabel=share[1])
        ax.legend(frameon=False, fontsize=8)
        return figure
    if ax is not None:
        raise InputError("an axis holds one layer; give plot(layer=..., ax=ax).")
    across = min(6, len(rows))
    down = -(-len(rows) // across)
    figure = new_figure(1.55 * across + 0.3, 1.6 * down + 0.5)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for row, axis in zip(rows, axes, strict=False):
        _scatter(pca, row, axis, size=5)
        axis.set(xticks=[], yticks=[])
        axis.title.set_size(7)
    for axis in axes[len(rows) :]:
        axis.remove()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, markerscale=2)
    return figure


def _scatter(pca: PCA, row: int, ax: Any, *, size: float) -> None:
    sides = (("positive", pca.positive, BLUE, "o"), ("negative", pca.negative, ORANGE, "^"))
    for name, points, color, marker in sides:
        x, y = points[row, :, 0].numpy(), points[row, :, 1].numpy()
        ax.scatter(x, y, s=size, c=color, marker=marker, alpha=0.7, linewidths=0, label=name)
    ax.set_title(f"layer {pca.layers[row]}: {float(pca.explained[row, :2].sum()):.0%} of variance")


def plot_separability(separability: Separability, *, ax: Axes | None = None) -> Figure:
    """AUROC by layer with its interval, over the band of the fits to shuffled labels."""
    figure, ax = axes_of(ax, 6, 3.4)
    table = separability.to_pandas()
    x = table["layer"]
    ax.fill_between(
        x,
        table["shuffled_low"],
        table["shuffled_high"],
        color=GREY,
        alpha=0.25,
        linewidth=0,
        label="shuffled labels, 95%",
    )
    ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    ax.fill_between(x, table["low"], table["high"], color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(x, table["auroc"], color=BLUE, marker="o", markersize=3, label="mean difference, with 95% interval")
    ax.set(xlabel="layer", ylabel="AUROC", ylim=(0, 1.02), title=f"{separability.n} held-out pairs")
    _finish(ax)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def plot_norms(norms: Norms, *, ax: Axes | None = None) -> Figure:
    """|v| / |residual| by layer, over the range in which steering at multiplier 1 is usable."""
    figure, ax = axes_of(ax, 6, 3.4)
    ax.axhspan(0.1, 0.4, color=GREY, alpha=0.18, linewidth=0, label="usable steering")
    for number, (name, group) in enumerate(norms.table.groupby("name", sort=False)):
        color, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
        y = group["relative_norm"].astype(float)
        ax.plot(group["layer"], y, label=str(name), color=color, marker=marker, markersize=3)
    ax.set(xlabel="layer", ylabel="|v| / |residual|")
    ax.set_ylim(bottom=0)
    _finish(ax)
    ax.legend(frameon=False, fontsize=8)
    return figure


def _finish(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.get_major_locator().set_params(integer=True)


def _ticks(ax: Any, rows: Sequence[int | str], columns: Sequence[int | str]) -> None:
    for axis, labels, most in ((ax.yaxis, rows, 32), (ax.xaxis, columns, 64)):
        shown = range(0, len(labels), -(-len(labels) // most))
        axis.set_ticks(np.array(shown) + 0.5, [_visible(str(labels[i])) for i in shown])
        for text in axis.get_ticklabels():
            text.set(parse_math=False, size=7)
    if any(len(str(label)) > 2 for label in columns) or len(columns) > 24:
        ax.tick_params(axis="x", rotation=90)
    ax.tick_params(length=2)


def _visible(token: str) -> str:
    """A token with its white space and control characters shown."""
    shown = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}", " ": "\N{OPEN BOX}"}
    return "".join(shown.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in token)


def _colour_bar(figure: Figure, image: Any, ax: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label(label, size=8)
    bar.ax.tick_params(labelsize=7)
