"""Figures of comparisons: prompting beside steering, and vectors on test sets that they were not made for.

Every function draws on the axis it is given, or makes a figure of its own, and returns it. Intervals are those of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from caa_lens.errors import InputError
from caa_lens.figures import BLUE, DIVERGING, GREEN, GREY, ORANGE, Axes, Figure, canvas, colormap

if TYPE_CHECKING:
    from caa_lens.experiments.baselines import AdditivityResult, Measure
    from caa_lens.experiments.generalisation import TransferResult

SERIES = {
    "prompting": (BLUE, "o", "prompting alone"),
    "steering": (ORANGE, "s", "vector alone"),
    "both": (GREEN, "D", "both"),
    "expected": (GREY, "_", "sum of the two alone"),
}


def plot_additivity(result: AdditivityResult, measure: Measure = "value", *, ax: Axes | None = None) -> Figure:
    """Changes against the baseline, by way to prompt: prompting alone, the vector alone, both, and the sum to expect of them.

    A panel a multiplier. Both together count as not additive where the interaction's interval excludes zero, which the table
    and the verdict tell; the intervals drawn are of each change, and those of paired changes may overlap all the same.

    Args:
        result: of `additivity`.
        measure: `"value"`, or for letters `"effect"`: the log-odds.
        ax: where to draw; a new figure by default.

    Raises:
        InputError: a measure that the result does not have, or one axis for several multipliers.
    """
    table = result.to_pandas()
    table = table[table["vector"] == "vector"]
    if measure not in set(table["measure"]):
        raise InputError(f"measure={measure!r}: there are {', '.join(map(repr, table['measure'].unique()))}.")
    table = table[table["measure"] == measure]
    panels = {float(multiplier): rows for multiplier, rows in table.groupby("multiplier")}
    if ax is not None and len(panels) > 1:
        raise InputError(f"an axis holds one multiplier, and {len(panels)} were swept; leave ax out.")
    names = list(dict.fromkeys(table["system"]))
    unit = result.metric.unit if measure == "value" else "nats of log-odds"
    with canvas(ax, (0.9 + 0.75 * len(names)) * len(panels) + 1.9, 3.8, panels=len(panels)) as (figure, axes):
        for axis, (multiplier, rows) in zip(axes, panels.items(), strict=True):
            axis.axhline(0, color="black", linewidth=0.6)
            _draw_terms(axis, rows)
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
            axis.set(xlim=(-0.6, len(names) - 0.4), title=f"multiplier {multiplier:+g}")
        axes[0].set_ylabel(f"change against {result.baseline!r}\n({unit})")
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
        n = table["n"].iloc[0]
        title = f"{result.provenance['pairs']}, layer {result.layer}, n = {n}"
        if len(panels) == 1:
            axes[0].set_title(f"{title}\n{axes[0].get_title()}")
        else:
            figure.suptitle(title, fontsize="medium")
    return figure


def _draw_terms(ax: Axes, rows: pd.DataFrame) -> None:
    for number, (term, (color, marker, label)) in enumerate(SERIES.items()):
        x = np.arange(len(rows)) + 0.18 * (number - 1.5)
        y, low, high = (rows[name].to_numpy(float) for name in (term, f"{term}_low", f"{term}_high"))
        style: dict[str, Any] = {"color": color, "marker": marker, "label": label, "linestyle": "none"}
        ax.errorbar(x, y, yerr=(y - low, high - y), markersize=9 if marker == "_" else 5, elinewidth=1.2, **style)


def plot_transfer(result: TransferResult, *, ax: Axes | None = None) -> Figure:
    """Sources downwards, test sets and templates across: each effect as a colour and a number, bold and framed where its interval
    lies beyond every control of the same norm.

    Red is towards the behaviour, blue away from it. Where the columns' units differ, colours are relative to each column's
    largest effect.

    Args:
        result: of `transfer`.
        ax: where to draw; a new figure by default.
    """
    table = result.to_pandas()
    columns = ["test", "template"] if "template" in table else ["test"]
    sources = list(dict.fromkeys(table["source"]))
    places = list(dict.fromkeys(table[columns].itertuples(index=False, name=None)))
    grid = {(row["source"], *(row[c] for c in columns)): row for row in table.to_dict("records")}
    cells = [[grid[(source, *place)] for place in places] for source in sources]
    values = np.array([[cell["effect"] for cell in row] for row in cells])
    units = list(dict.fromkeys(table["unit"]))
    one_unit = len(units) == 1
    largest = np.nan_to_num(np.abs(values)).max(axis=None if one_unit else 0)
    scale = np.where(largest > 0, largest, 1.0)
    unit = units[0] if one_unit else "the unit below each column"
    width, height = 2.4 + 0.95 * len(places), 1.6 + max(0.42 * len(sources), 1.2)
    with canvas(ax, width, height) as (figure, (axis,)):
        image = axis.imshow(values / scale, cmap=colormap(DIVERGING), vmin=-1, vmax=1, aspect="auto")
        bar = figure.colorbar(image, ax=axis, label="effect" if one_unit else "effect / largest", pad=0.02)
        if one_unit:
            bar.set_ticks([-1, 0, 1], labels=[f"{-scale:+.2g}", "0", f"{scale:+.2g}"])
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                _draw_cell(axis, x, y, cell, dark=abs((values / scale)[y, x]) > 0.6)
        names = [
            "\n".join(place) if one_unit else "\n".join((*place, grid[(sources[0], *place)]["unit"]))
            for place in places
        ]
        axis.set_xticks(range(len(places)), names, rotation=30, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(sources)), sources)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set(ylabel="vector from", xlabel="tested on")
        axis.set_title(
            f"layer {result.provenance['layer']}, effect per unit of multiplier, in {unit}\nframed: beyond every control"
        )
    return figure


def _draw_cell(ax: Axes, x: int, y: int, cell: Mapping[str, Any], *, dark: bool) -> None:
    color = "white" if dark else "black"
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": color}
    if cell["beyond"]:
        style |= {"weight": "bold", "bbox": {"boxstyle": "square,pad=0.4", "fill": False, "edgecolor": color}}
    ax.text(x, y, f"{cell['effect']:+.2f}", **style)
