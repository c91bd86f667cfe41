"""Figures of sweeps, projections and learning curves: what the tables say, with intervals, units and controls.

Every function draws on the axis it is given, or makes a figure of its own, and returns the figure, which saves as PNG, SVG or
PDF with `figure.savefig`. Layers grow upwards or to the right; red is positive, blue negative, white zero. An interval shows how
far a mean would move with other items, as in `SweepResult`; it says nothing of other models or training pairs.

A notebook shows a new figure once. On an axis of a pyplot figure, end the line with a semicolon: pyplot shows that figure itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.experiments.result import SweepResult
from caa_lens.figures import (
    DIVERGING,
    MOST_ROWS,
    MOST_TOKENS,
    SEQUENTIAL,
    Axes,
    Figure,
    canvas,
    colormap,
    draw_bars,
    label_ticks,
    layer_bar,
    layer_colors,
    tick_at,
)
from caa_lens.projected import UNITS
from caa_lens.scale import beyond, diverging_limit, largest_size
from caa_lens.sweep_panels import By, Panel, panels_of

MEASURES = {**UNITS, "component": "component along v (units of v)"}


class Projected(Protocol):
    """What `plot_projection` reads of a projection: `[token]` or `[layer, token]` values, and their names."""

    @property
    def values(self) -> Tensor: ...
    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def measure(self) -> str: ...
    @property
    def title(self) -> str: ...


def plot_sweep(
    result: SweepResult, by: By | None = None, *, layer: int | None = None, ax: Axes | None = None
) -> Figure:
    """Effects against the layer, or scores against the multiplier at one layer, the vector beside its controls.

    Controls of a kind (random, shuffled) share a colour, and a band from the lowest to the highest end of their 95% intervals.
    Where system prompts were swept, each has its panel.

    Args:
        result: of `sweep` or `score`.
        by: `"layer"`: mean slope of the items' effect; `"multiplier"`: the score. By default the layer, if there are several.
        layer: of the scores; by default the one with the largest effect (chosen on these items: see `SweepResult.best`).
        ax: where to draw; a new figure by default.

    Raises:
        InputError: another `by`, a single layer with `by="layer"`, effects asked of one multiplier, or one axis for several panels.
        MissingError: a layer that the sweep does not have.
    """
    panels = panels_of(result, by, layer)
    if ax is not None and len(panels) > 1:
        raise InputError(f"an axis holds one system prompt, and {len(panels)} were swept; leave ax out.")
    with canvas(ax, 3.0 * len(panels) + 3.4, 3.6, panels=len(panels)) as (figure, axes):
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel)
            axis.label_outer(remove_inner_ticks=False)
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_panel(ax: Axes, panel: Panel) -> None:
    """A line for each vector and a band for each kind, the vector itself on top."""
    if panel.x == "layer":
        ax.axhline(0, color="black", linewidth=0.6)
    else:
        ax.axvline(0, color="black", linewidth=0.6)
    for series in panel.series:
        style: dict[str, Any] = {"color": series.color, "zorder": 4 if series.own else 2}
        places, low, high = series.band.index, series.band["low"], series.band["high"]
        if len(places) == 1:
            ax.vlines(places, low, high, alpha=0.5, **style)
        else:
            ax.fill_between(places, low, high, alpha=0.25 if series.own else 0.12, linewidth=0, **style)
        label: dict[str, Any] = {"label": series.label}
        for line in series.lines.values():
            width = 1.8 if series.own else 1.0
            ax.plot(line[panel.x], line["value"], marker=series.marker, linewidth=width, **style, **label)
            label = {}
    tick_at(ax, panel.places)
    ax.set(xlabel=panel.x, ylabel=panel.ylabel, title=panel.title)


def plot_heatmap(
    values: Float[Tensor, "row column"] | Float[np.ndarray, "row column"],
    rows: Sequence[int | str],
    columns: Sequence[int | str],
    *,
    row_name: str,
    column_name: str,
    unit: str,
    centred: bool = True,
    limit: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A table of numbers as colours, its first row at the bottom.

    Args:
        values: the numbers; NaN stays grey.
        rows, columns: their labels; text is taken for a token, whose white space is made visible.
        row_name, column_name: of the axes.
        unit: what the colours stand for, with its unit.
        centred: red above zero, blue below, white at zero, both ways equally far; otherwise light is more.
        limit: where the colours of a centred map end; by default at the largest size. What lies beyond has the last colour,
            and the colour bar gets a pointed end.
        title: above.
        ax: where to draw; a new figure by default.

    Raises:
        InputError: labels that do not fit the values, or a limit without a centre or not above zero.
    """
    table = torch.as_tensor(values).detach().cpu().float().numpy()
    if table.shape != (len(rows), len(columns)) or table.size == 0:
        raise InputError(f"{len(rows)} row and {len(columns)} column labels do not fit values of shape {table.shape}.")
    if limit is not None and (not centred or not limit > 0):
        raise InputError(f"limit={limit} must be above 0, and goes with centred=True.")
    largest = largest_size(table)
    end = limit or largest
    low, high = (-end, end) if centred else (None, None)
    height = 1.4 + max(0.18 * len(rows), 0.07 * len(unit))  # the unit stands upright beside the colours
    with canvas(ax, min(2.2 + 0.22 * len(columns), 13), min(height, 7)) as (figure, (axis,)):
        colors = colormap(DIVERGING if centred else SEQUENTIAL)
        image = axis.imshow(table, cmap=colors, vmin=low, vmax=high, aspect="auto", origin="lower")
        extend = "both" if centred and largest > end else "neither"
        figure.colorbar(image, ax=axis, label=unit, pad=0.02, extend=extend)
        label_ticks(axis.yaxis, rows, at_most=MOST_ROWS)
        label_ticks(axis.xaxis, columns, at_most=MOST_TOKENS)
        axis.set(xlabel=column_name, ylabel=row_name, title=title or "")
        axis.spines[:].set_visible(False)
    return figure


def plot_projection(projection: Projected, ax: Axes | None = None) -> Figure:
    """Every token's projection on the vector: a bar a token at one layer, a heat map of layers and tokens otherwise.

    The scale is centred on zero and not set by a few outlying tokens (see `caa_lens.scale`); the title says what lies beyond it.

    Args:
        projection: of `project`.
        ax: where to draw; a new figure by default.
    """
    values, limit, title = scaled(projection)
    unit, tokens = MEASURES.get(projection.measure, projection.measure), list(projection.tokens)
    if values.ndim == 2:
        names: dict[str, Any] = {"row_name": "layer", "column_name": "token", "unit": unit, "title": title}
        return plot_heatmap(values, list(projection.layers), tokens, limit=limit, ax=ax, **names)
    with canvas(ax, min(max(1.2 + 0.22 * len(tokens), 4), 13), 2.8) as (figure, (axis,)):
        draw_bars(axis, values)
        axis.axhline(0, color="black", linewidth=0.6)
        if np.abs(values).max() > limit:
            axis.set_ylim(-limit, limit)
        label_ticks(axis.xaxis, tokens, at_most=MOST_TOKENS)
        axis.set(xlabel="token", ylabel=unit, title=title)
    return figure


def scaled(projection: Projected) -> tuple[Float[np.ndarray, "*layer token"], float, str]:
    """The values of a projection, where their scale ends, and the title, which says what lies beyond."""
    values = projection.values.detach().cpu().float().numpy()
    limit = diverging_limit(values)
    return values, limit, "\n".join(filter(None, [projection.title, beyond(values, limit)]))


def plot_learning_curve(frame: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Agreement of the vectors from two halves of the pairs, against the number of pairs, a line a layer.

    Args:
        frame: of `learning_curve`.
        ax: where to draw; a new figure by default.

    Raises:
        InputError: a table without the columns of `learning_curve`.
    """
    if missing := {"layer", "n_pairs", "split_half_cosine"} - set(frame.columns):
        raise InputError(f"this is no table of learning_curve(): it lacks {', '.join(sorted(missing))}.")
    layers = sorted(frame["layer"].unique())
    with canvas(ax, 5.6, 3.6) as (figure, (axis,)):
        colors = layer_colors(layers)
        for layer in layers:
            line = frame[frame["layer"] == layer].sort_values("n_pairs")
            style: dict[str, Any] = {"color": colors.to_rgba(layer), "marker": "o", "label": f"layer {layer}"}
            axis.plot(line["n_pairs"], line["split_half_cosine"], **style)
        sizes = sorted(frame["n_pairs"].unique())
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_ylim(min(0.0, float(frame["split_half_cosine"].min())), 1.02)
        axis.set(xlabel="pairs, half of them in each vector", ylabel="cosine of the two vectors")
        if len(layers) <= 8:
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        else:
            layer_bar(figure, axis, colors)
    return figure
