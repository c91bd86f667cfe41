"""Figures of judged answers: the judge's scores against the multiplier, the vector beside its controls.

Where an error bar ends, the mean would lie with other questions; it says nothing of another judge's opinion.
"""

from __future__ import annotations

import re
import textwrap
from itertools import cycle
from typing import Any

from caa_lens.errors import InputError, MissingError
from caa_lens.experiments.judged import UNSCORED, JudgeResult
from caa_lens.experiments.rubric import HIGHEST, LOWEST
from caa_lens.figures import BLUE, MARKERS, Axes, Figure, canvas, tick_at
from caa_lens.sweep_panels import KNOWN, OTHERS


def plot_judged(result: JudgeResult, *, layer: int | None = None, ax: Axes | None = None) -> Figure:
    """Mean scores with their 95% intervals against the multiplier, at one layer; a panel for each system.

    Args:
        result: of `judge`.
        layer: where there are several; by default the one with the largest effect (chosen on these questions).
        ax: where to draw; a new figure by default.

    Raises:
        InputError: one axis for several panels.
        MissingError: a layer that was not run.
    """
    layers = sorted(result.items["layer"].unique().tolist())
    panels = result.by_system() or {"": result}
    if layer is None:
        best = [part.best() for part in panels.values()] if len(layers) > 1 else [{"effect": 0.0, "layer": layers[0]}]
        layer = int(max(best, key=lambda row: float(row["effect"]))["layer"])
    if layer not in layers:
        raise MissingError(f"layer {layer} was not run; there are {', '.join(map(str, layers))}.")
    if ax is not None and len(panels) > 1:
        raise InputError(f"an axis holds one system, and there are {len(panels)}; leave ax out.")
    with canvas(ax, 3.0 * len(panels) + 2.4, 3.4, panels=len(panels)) as (figure, axes):
        for axis, (name, part) in zip(axes, panels.items(), strict=True):
            _draw_scores(axis, part, layer)
            if name:
                axis.set_title(f"system: {name}\n{axis.get_title()}")
            axis.label_outer(remove_inner_ticks=False)
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_scores(ax: Axes, result: JudgeResult, layer: int) -> None:
    table = result.to_pandas()
    table = table[table["layer"] == layer]
    others, markers = cycle(OTHERS), cycle(MARKERS)
    seen: dict[str, tuple[str, str]] = {}
    ax.axvline(0, color="black", linewidth=0.6)
    for name, line in table.groupby("vector", sort=False):
        own, kind = name in ("vector", "none"), re.sub(r"^(random|shuffled)-\d+$", r"\1", str(name))
        label: dict[str, Any] = {} if kind in seen else {"label": kind}
        if kind not in seen:
            seen[kind] = (BLUE if own else KNOWN.get(kind) or next(others), next(markers))
        color, marker = seen[kind]
        line = line.dropna(subset=["value"]).sort_values("multiplier")
        bars = [(line["value"] - line["low"]).clip(lower=0), (line["high"] - line["value"]).clip(lower=0)]
        ax.errorbar(
            line["multiplier"],
            line["value"],
            yerr=bars,
            color=color,
            marker=marker,
            capsize=2,
            linewidth=1.8 if own else 0.9,
            alpha=1.0 if own else 0.7,
            zorder=4 if own else 2,
            **label,
        )
    tick_at(ax, table["multiplier"])
    ax.set_ylim(LOWEST - 0.3, HIGHEST + 0.3)
    unscored = ", ".join(f"{table[f'n_{s}'].sum()} {s}" for s in UNSCORED if table[f"n_{s}"].sum())
    n = table["n"].agg(["min", "max"]).tolist()
    counted = f"n = {n[0]}" if n[0] == n[1] else f"n = {n[0]} to {n[1]}"
    subject = textwrap.fill(f"{result.rubric.title}, layer {layer}, {counted}", 64)
    title = f"{subject}\njudged by {result.judge}"
    ax.set(xlabel="multiplier", ylabel="mean score (0 to 10)", title=f"{title}; {unscored}" if unscored else title)
