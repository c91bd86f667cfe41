"""What a figure of a sweep shows, before it is drawn: panels of series with their intervals.

Each vector is a line. Controls of a kind (random, shuffled) are one series: they share a colour, and a band from the lowest to the
highest end of their 95% intervals. Where system prompts were swept, each has its panel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from caa_lens.errors import InputError, MissingError
from caa_lens.experiments.result import SweepResult
from caa_lens.figures import AMBER, BLUE, GREEN, GREY, MARKERS, ORANGE, PURPLE, SKY

By = Literal["layer", "multiplier"]
KNOWN = {"vector": BLUE, "random": GREY, "shuffled": AMBER, "letter": ORANGE, "letter-balanced": SKY}
OTHERS = (GREEN, PURPLE, "#000000")
SCORES = {
    "letter": "p(matching) among the letters offered",
    "letter_published": "p(matching) by the published formula",
    "logprob": "mean log p(positive) \N{MINUS SIGN} log p(negative)",
}


@dataclass(frozen=True)
class Series:
    """The vectors of one kind.

    Attributes:
        label: the kind, with the number of its vectors if they are several.
        color, marker: in matplotlib's names.
        own: whether it is the vector itself, which is drawn on top.
        lines: of each vector its rows, by ascending layer or multiplier: `value`, its interval `low`, `high`, and `n`.
        band: over the same layers or multipliers (the index), the lowest `low` and the highest `high`.
    """

    label: str
    color: str
    marker: str
    own: bool
    lines: Mapping[str, pd.DataFrame]
    band: pd.DataFrame


@dataclass(frozen=True)
class Panel:
    """One system prompt's series.

    Attributes:
        title: what was swept, with the number of items.
        x: the column of the horizontal axis, which is also its name.
        ylabel: what the values are, and their unit below.
        series: the vector and its controls, in the order of the sweep.
    """

    title: str
    x: By
    ylabel: str
    series: tuple[Series, ...]

    @property
    def places(self) -> list[float]:
        """The layers or multipliers, ascending."""
        return sorted({place for series in self.series for place in series.band.index})


def panels_of(result: SweepResult, by: By | None, layer: int | None) -> list[Panel]:
    """The panels of a sweep's effects by layer, or of its scores by multiplier at one layer.

    Args:
        result: of `sweep` or `score`.
        by: `"layer"` or `"multiplier"`; by default the layer, if there are several.
        layer: of the scores; by default the one with the largest effect.

    Raises:
        InputError: another `by`, a single layer with `by="layer"`, or effects asked of one multiplier.
        MissingError: a layer that the sweep does not have.
    """
    layers = sorted(result.items["layer"].unique())
    by = by or ("layer" if len(layers) > 1 and layer is None else "multiplier")
    if by not in ("layer", "multiplier"):
        raise InputError(f"by={by!r}: allowed are 'layer' and 'multiplier'.")
    if by == "layer" and (layer is not None or len(layers) == 1):
        raise InputError("by='layer' compares all layers of a sweep; for one layer use by='multiplier'.")
    parts = result.by_system() or {"": result}
    if by == "multiplier" and layer is None:
        layer = layers[0] if len(layers) == 1 else _best_layer(parts.values())
    if layer is not None and layer not in layers:
        raise MissingError(f"layer {layer} was not swept; there are {', '.join(map(str, layers))}.")
    return [_effects(name, part) if layer is None else _scores(name, part, layer) for name, part in parts.items()]


def _best_layer(results: Iterable[SweepResult]) -> int:
    return int(max((result.best() for result in results), key=lambda best: float(best["effect"]))["layer"])


def _effects(system: str, result: SweepResult) -> Panel:
    table = result.effects().rename(columns={"effect": "value", "effect_low": "low", "effect_high": "high"})
    what = "effect" if result.metric.name == "logprob" else "effect on the log-odds of the matching letter"
    unit = "nats per token" if result.metric.name == "logprob" else "nats"
    title = f"{result.provenance['pairs']}, n = {table['n'].iloc[0]}"
    return Panel(_titled(system, title), "layer", f"{what}\n({unit} per unit of multiplier)", _series(table, "layer"))


def _scores(system: str, result: SweepResult, layer: int) -> Panel:
    table = result.to_pandas()
    table = table[table["layer"] == layer]
    title = f"{result.provenance['pairs']}, layer {layer}, n = {table['n'].iloc[0]}"
    if "mass" in table:
        mass = table.loc[table["vector"] == table["vector"].iloc[0], "mass"]
        title += f"\nprobability of the letters together: {mass.min():.2f} to {mass.max():.2f}"
    ylabel = f"{SCORES[result.metric.name]}\n({result.metric.unit})"
    return Panel(_titled(system, title), "multiplier", ylabel, _series(table, "multiplier"))


def _titled(system: str, title: str) -> str:
    return f"system prompt: {system}\n{title}" if system else title


def _series(table: pd.DataFrame, x: By) -> tuple[Series, ...]:
    kinds = table["vector"].map(lambda name: re.sub(r"^(random|shuffled)-\d+$", r"\1", name))
    others = iter(OTHERS * len(kinds))
    found = []
    for number, kind in enumerate(dict.fromkeys(kinds)):
        rows = table[kinds == kind].sort_values(x)
        lines = {name: rows[rows["vector"] == name] for name in dict.fromkeys(rows["vector"])}
        found.append(
            Series(
                label=kind if len(lines) == 1 else f"{kind} ({len(lines)})",
                color=KNOWN.get(kind) or next(others),
                marker=MARKERS[number % len(MARKERS)],
                own=kind in ("vector", "none"),
                lines=lines,
                band=rows.groupby(x).agg({"low": "min", "high": "max"}),
            )
        )
    return tuple(found)
