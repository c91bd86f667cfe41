"""Figures of sweeps, projections and learning curves: what the tables say, with intervals, units and controls.

Every function draws on the axis it is given, or makes a figure of its own, and returns the figure, which saves as PNG, SVG or
PDF with `figure.savefig`. Layers grow upwards or to the right; red is positive, blue negative, white zero. An interval shows how
far a mean would move with other items, as in `SweepResult`; it says nothing of other models or training pairs.

A notebook shows a new figure once. On an axis of a pyplot figure, end the line with a semicolon: pyplot shows that figure itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.errors import InputError, MissingError
from caa_lens.experiments.result import SweepResult
from caa_lens.figures import (
    AMBER,
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    MARKERS,
    MOST_ROWS,
    MOST_TOKENS,
    NEGATIVE,
    ORANGE,
    POSITIVE,
    PURPLE,
    SEQUENTIAL,
    SKY,
    Axes,
    Figure,
    canvas,
    colormap,
    label_ticks,
    layer_bar,
    layer_colors,
    tick_at,
)
from caa_lens.projected import UNITS

By = Literal["layer", "multiplier"]
KNOWN = {"vector": BLUE, "random": GREY, "shuffled": AMBER, "letter": ORANGE, "letter-balanced": SKY}
OTHERS = (GREEN, PURPLE, "#000000")
SCORES = {
    "letter": "p(matching) among the letters offered",
    "letter_published": "p(matching) by the published formula",
    "logprob": "mean log p(positive) \N{MINUS SIGN} log p(negative)",
}
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
    layers = sorted(result.items["layer"].unique())
    by = by or ("layer" if len(layers) > 1 and layer is None else "multiplier")
    if by not in ("layer", "multiplier"):
        raise InputError(f"by={by!r}: allowed are 'layer' and 'multiplier'.")
    if by == "layer" and (layer is not None or len(layers) == 1):
        raise InputError("by='layer' compares all layers of a sweep; for one layer use by='multiplier'.")
    panels = result.by_system() or {"": result}
    if by == "multiplier" and layer is None:
        layer = layers[0] if len(layers) == 1 else _best_layer(panels.values())
    if layer is not None and layer not in layers:
        raise MissingError(f"layer {layer} was not swept; there are {', '.join(map(str, layers))}.")
    if ax is not None and len(panels) > 1:
        raise InputError(f"an axis holds one system prompt, and {len(panels)} were swept; leave ax out.")
    with canvas(ax, 3.0 * len(panels) + 3.4, 3.6, panels=len(panels)) as (figure, axes):
        for axis, (name, part) in zip(axes, panels.items(), strict=True):
            if by == "layer":
                _draw_effects(axis, part)
            else:
                _draw_scores(axis, part, layer)
            if name:
                axis.set_title(f"system prompt: {name}\n{axis.get_title()}")
            axis.label_outer(remove_inner_ticks=False)
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _best_layer(results: Iterable[SweepResult]) -> int:
    return int(max((result.best() for result in results), key=lambda best: float(best["effect"]))["layer"])


def _draw_effects(ax: Axes, result: SweepResult) -> None:
    table = result.effects().rename(columns={"effect": "value", "effect_low": "low", "effect_high": "high"})
    ax.axhline(0, color="black", linewidth=0.6)
    _draw_vectors(ax, table, "layer")
    what = "effect" if result.metric.name == "logprob" else "effect on the log-odds of the matching letter"
    unit = "nats per token" if result.metric.name == "logprob" else "nats"
    ax.set(xlabel="layer", ylabel=f"{what}\n({unit} per unit of multiplier)")
    ax.set_title(f"{result.provenance['pairs']}, n = {table['n'].iloc[0]}")


def _draw_scores(ax: Axes, result: SweepResult, layer: int | None) -> None:
    table = result.to_pandas()
    table = table[table["layer"] == layer]
    ax.axvline(0, color="black", linewidth=0.6)
    _draw_vectors(ax, table, "multiplier")
    ax.set(xlabel="multiplier", ylabel=f"{SCORES[result.metric.name]}\n({result.metric.unit})")
    title = f"{result.provenance['pairs']}, layer {layer}, n = {table['n'].iloc[0]}"
    if "mass" in table:
        mass = table.loc[table["vector"] == table["vector"].iloc[0], "mass"]
        title += f"\nprobability of the letters together: {mass.min():.2f} to {mass.max():.2f}"
    ax.set_title(title)


def _draw_vectors(ax: Axes, table: pd.DataFrame, x: str) -> None:
    """A line for each vector and a band for each kind, the vector itself on top."""
    kinds = table["vector"].map(lambda name: re.sub(r"^(random|shuffled)-\d+$", r"\1", name))
    others = iter(OTHERS * len(kinds))
    for number, kind in enumerate(dict.fromkeys(kinds)):
        color = KNOWN.get(kind) or next(others)
        rows, own = table[kinds == kind].sort_values(x), kind in ("vector", "none")
        names = list(dict.fromkeys(rows["vector"]))
        ends = rows.groupby(x).agg({"low": "min", "high": "max"})
        style: dict[str, Any] = {"color": color, "zorder": 4 if own else 2}
        if len(ends) == 1:
            ax.vlines(ends.index, ends["low"], ends["high"], alpha=0.5, **style)
        else:
            ax.fill_between(ends.index, ends["low"], ends["high"], alpha=0.25 if own else 0.12, linewidth=0, **style)
        for k, name in enumerate(names):
            line = rows[rows["vector"] == name]
            label: dict[str, Any] = {"label": kind if len(names) == 1 else f"{kind} ({len(names)})"} if k == 0 else {}
            width = 1.8 if own else 1.0
            ax.plot(line[x], line["value"], marker=MARKERS[number % len(MARKERS)], linewidth=width, **style, **label)
    tick_at(ax, table[x])


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
    finite = table[np.isfinite(table)]
    largest = float(np.abs(finite).max(initial=0)) or 1.0
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

    Some activations, the first token's above all, are often many times larger than all others. Where the largest size is more than
    three times the 98th percentile, the scale ends at 1.5 times that, and the title says what lies beyond.

    Args:
        projection: of `project`.
        ax: where to draw; a new figure by default.
    """
    values = projection.values.detach().cpu().float().numpy()
    unit, tokens = MEASURES.get(projection.measure, projection.measure), list(projection.tokens)
    limit, title = _limit(values), projection.title
    if limit is not None:
        beyond = values[np.abs(values) > limit]
        title += f"\nbeyond the scale: {len(beyond)} of {values.size}, up to {beyond[np.abs(beyond).argmax()]:+.3g}"
    if values.ndim == 2:
        names: dict[str, Any] = {"row_name": "layer", "column_name": "token", "unit": unit, "title": title}
        return plot_heatmap(values, list(projection.layers), tokens, limit=limit, ax=ax, **names)
    with canvas(ax, min(max(1.2 + 0.22 * len(tokens), 4), 13), 2.8) as (figure, (axis,)):
        axis.bar(range(len(tokens)), values, width=0.85, color=np.where(values < 0, NEGATIVE, POSITIVE))
        axis.axhline(0, color="black", linewidth=0.6)
        axis.margins(x=0.01)
        if limit is not None:
            axis.set_ylim(-limit, limit)
        label_ticks(axis.xaxis, tokens, at_most=MOST_TOKENS)
        axis.set(xlabel="token", ylabel=unit, title=title)
    return figure


def _limit(values: Float[np.ndarray, "*layer token"]) -> float | None:
    """1.5 times the 98th percentile of the sizes, where the largest is more than twice that."""
    end = 1.5 * float(np.quantile(np.abs(values), 0.98, method="lower"))
    return end if 0 < 2 * end < np.abs(values).max() else None


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
