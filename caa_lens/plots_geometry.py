"""Figures of lenses and geometry: what the tables say, on the axis that is given or a new figure, which is returned.

Layers grow upwards or to the right; red is positive, blue negative, white zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.figures import (
    BLUE,
    DIVERGING,
    GREY,
    MARKERS,
    MOST_ROWS,
    MOST_TOKENS,
    ORANGE,
    SERIES,
    Axes,
    Figure,
    canvas,
    colormap,
    label_ticks,
    tick_at,
    visible,
)

if TYPE_CHECKING:
    from caa_lens.geometry import PCA, Norms, Similarity
    from caa_lens.separation import Separability

SIDES = (("positive", BLUE, "o"), ("negative", ORANGE, "^"))


def plot_lens(
    probabilities: Float[Tensor, "layer position"],
    words: Sequence[Sequence[str]],
    layers: Sequence[int],
    tokens: Sequence[str],
    *,
    ax: Axes | None = None,
) -> Figure:
    """The likeliest next token of every layer (upwards) and position, darker where it is likelier."""
    shown = [[visible(word) for word in row] for row in words]
    width = 0.085 * max(5, *(len(word) for row in shown for word in row)) + 0.1
    with canvas(ax, 1.9 + width * len(tokens), 1.5 + 0.2 * len(layers)) as (figure, (axis,)):
        image = axis.imshow(probabilities.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        figure.colorbar(image, ax=axis, label="probability of the token", pad=0.02)
        for y, row in enumerate(shown):
            for x, word in enumerate(row):
                color = "white" if float(probabilities[y, x]) > 0.55 else "black"
                axis.text(x, y, word, color=color, ha="center", va="center", size=7)
        label_ticks(axis.yaxis, layers, at_most=MOST_ROWS)
        label_ticks(axis.xaxis, tokens, at_most=MOST_TOKENS)
        axis.set(ylabel="layer", xlabel="read at")
    return figure


def plot_similarity(similarity: Similarity, *, ax: Axes | None = None) -> Figure:
    """All cosines as a heat map; lines separate the sets."""
    n, names = len(similarity.names), list(dict.fromkeys(similarity.names))
    with canvas(ax, 6.4, 5.4) as (figure, (axis,)):
        image = axis.imshow(similarity.values.numpy(), cmap=colormap(DIVERGING), vmin=-1, vmax=1, origin="lower")
        figure.colorbar(image, ax=axis, label="cosine similarity", pad=0.02)
        if len(names) == 1:
            for scale in (axis.xaxis, axis.yaxis):
                label_ticks(scale, similarity.layers, at_most=MOST_ROWS)
            axis.set(xlabel="layer", ylabel="layer", title=names[0])
            return figure
        starts = [similarity.names.index(name) for name in names]
        middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], n], strict=True)]
        borders = [start - 0.5 for start in starts[1:]]
        axis.hlines(borders, -0.5, n - 0.5, color="black", linewidth=0.8)
        axis.vlines(borders, -0.5, n - 0.5, color="black", linewidth=0.8)
        axis.set_xticks(middles, names, rotation=30, ha="right", rotation_mode="anchor")
        axis.set_yticks(middles, names)
        axis.tick_params(length=0)
        axis.set(xlabel="within each block: layers, ascending")
    return figure


def plot_pca(pca: PCA, *, layer: int | None = None, ax: Axes | None = None) -> Figure:
    """The pairs along the first two components; all layers as small multiples if no layer is given.

    Raises:
        InputError: a layer that is not there, an axis for several layers, or fewer than two components.
    """
    rows = pca_rows(pca, layer)
    if len(rows) == 1:
        with canvas(ax, 4.6, 3.9) as (figure, (axis,)):
            _scatter(pca, rows[0], axis, size=18)
            _, xlabel, ylabel = pca_names(pca, rows[0])
            axis.set(xlabel=xlabel, ylabel=ylabel)
            axis.legend()
        return figure
    if ax is not None:
        raise InputError("an axis holds one layer; give plot(layer=..., ax=ax).")
    across = min(6, len(rows))
    down = -(-len(rows) // across)
    size = 1.55 * across + 1.2, 1.6 * down + 0.3
    with canvas(None, *size, panels=across, rows=down, share_y=False) as (figure, axes):
        for row, axis in zip(rows, axes, strict=False):
            _scatter(pca, row, axis, size=5, title_size=7)
            axis.set(xticks=[], yticks=[])
        for axis in axes[len(rows) :]:
            axis.remove()
        figure.supxlabel("first component", size="medium")
        figure.supylabel("second component", size="medium")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", markerscale=2)
    return figure


def pca_rows(pca: PCA, layer: int | None) -> list[int]:
    """The row of a layer, or all rows.

    Raises:
        InputError: a layer that is not there, or fewer than two components.
    """
    if pca.explained.shape[1] < 2:
        raise InputError("a plot needs two components; make them with pca(..., n_components=2).")
    if layer is not None and layer not in pca.layers:
        raise InputError(f"layer {layer} is not in this PCA; there are {', '.join(map(str, pca.layers))}.")
    return list(range(len(pca.layers))) if layer is None else [pca.layers.index(layer)]


def pca_names(pca: PCA, row: int) -> tuple[str, str, str]:
    """The title of a layer's scatter and the names of its axes, with the share of variance of each."""
    first, second = pca.explained[row, :2].tolist()
    title = f"layer {pca.layers[row]}: {first + second:.0%} of variance"
    return title, f"PC1 ({first:.0%} of variance)", f"PC2 ({second:.0%} of variance)"


def _scatter(pca: PCA, row: int, ax: Axes, *, size: float, title_size: float = 9) -> None:
    for side, color, marker in SIDES:
        x, y = getattr(pca, side)[row, :, :2].T.numpy()
        ax.scatter(x, y, s=size, c=color, marker=marker, alpha=0.7, linewidths=0, label=side)
    ax.set_title(pca_names(pca, row)[0], size=title_size)


def plot_separability(separability: Separability, *, ax: Axes | None = None) -> Figure:
    """AUROC by layer with its interval, over the band of the fits to shuffled labels."""
    table = separability.to_pandas()
    layers, title = table["layer"], f"{separability.n} held-out pairs"
    with canvas(ax, 6, 3.4) as (figure, (axis,)):
        low, high, label = table["shuffled_low"], table["shuffled_high"], "shuffled labels, 95%"
        axis.fill_between(layers, low, high, color=GREY, alpha=0.25, linewidth=0, label=label)
        axis.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        axis.fill_between(layers, table["low"], table["high"], color=BLUE, alpha=0.25, linewidth=0)
        axis.plot(layers, table["auroc"], color=BLUE, marker="o", label="mean difference, with 95% interval")
        axis.set(xlabel="layer", ylabel="AUROC", ylim=(0, 1.02), title=title)
        tick_at(axis, layers)
        axis.legend(loc="lower right")
    return figure


def plot_norms(norms: Norms, *, ax: Axes | None = None) -> Figure:
    """|v| / |residual| by layer, over the range in which steering at multiplier 1 is usable."""
    with canvas(ax, 6, 3.4) as (figure, (axis,)):
        axis.axhspan(0.1, 0.4, color=GREY, alpha=0.18, linewidth=0, label="usable steering")
        for number, (name, group) in enumerate(norms.table.groupby("name", sort=False)):
            color, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            y = group["relative_norm"].astype(float)
            axis.plot(group["layer"], y, label=str(name), color=color, marker=marker)
        axis.set(xlabel="layer", ylabel="|v| / |residual|")
        axis.set_ylim(bottom=0)
        tick_at(axis, norms.table["layer"])
        axis.legend()
    return figure
