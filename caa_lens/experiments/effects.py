"""Effects of vectors, and what may be said of them beside controls of the same norm.

    effect of a vector at a layer = mean over items of the slope of the item's measure against the multiplier

An item whose slope is negative is anti-steerable: the vector moves it the wrong way. An effect counts as shown when its
interval lies beyond the largest effect of any control of the same norm: at the same layer, or, where the layer was chosen as the
best of several, at any of these, so that the controls have the same choice.

Source for slopes and anti-steerability: Tan et al., "Analyzing the generalization and reliability of steering vectors" (2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from caa_lens.errors import InputError
from caa_lens.experiments.statistics import bootstrap_mean, bracket, slopes, where_defined, why_undecided


class Finding(NamedTuple):
    """What a measurement shows: one of a few words, and the sentence that gives the numbers."""

    status: Literal["beyond controls", "no controls", "not shown", "null", "opposite", "undecided"]
    words: str


Measured = TypeVar("Measured", bound="Measurement")


@dataclass(frozen=True)
class Measurement:
    """Items measured at settings, which may have been run under several systems (a system prompt, a template)."""

    items: pd.DataFrame

    @property
    def axes(self) -> list[str]:
        """The columns that tell settings apart, without the multiplier."""
        return [axis for axis in ("system", "vector", "layer") if axis in self.items]

    def by_system(self: Measured) -> dict[str, Measured]:
        """The result under each system; empty where none were given."""
        if "system" not in self.items:
            return {}
        groups = self.items.groupby("system", sort=False)
        return {str(name): replace(self, items=group.drop(columns="system")) for name, group in groups}

    def require_one_system(self) -> None:
        """Refuses a finding over several systems.

        Raises:
            InputError: several were run, each of which has its own.
        """
        if "system" in self.items:
            raise InputError("each system has its own finding; use by_system()[name].finding() or verdict().")


def effect_table(
    items: pd.DataFrame,
    axes: Sequence[str],
    *,
    measure: str,
    strata: str | None = None,
    seed: int = 0,
    gaps: bool = False,
) -> pd.DataFrame:
    """One row a group of `axes`: `effect` and the share of `anti_steerable` items, each with its 95% interval, and `n`.

    Args:
        items: one row an item and setting, with `item`, `multiplier` and the measure.
        axes: columns that tell the groups apart (`vector`, `layer`, ...).
        measure: column whose slope is taken; a group with a value that is not finite has the effect NaN.
        strata: column of the strata that are weighted equally (see `bootstrap_mean`).
        seed: of the bootstrap.
        gaps: NaN stands for what was not measured (an answer without a score), and leaves the item out of the group.

    Raises:
        InputError: fewer than two multipliers.
    """
    if items["multiplier"].nunique() < 2:
        raise InputError("an effect needs at least two multipliers; run multipliers=(-1, 0, 1).")
    rows = []
    for place, group in items.groupby(list(axes), sort=False):
        table = group.pivot(index="multiplier", columns="item", values=measure)
        table = table.dropna(axis="columns") if gaps else table
        slope = slopes(table.index.to_numpy(float), table.to_numpy(float))
        keys = group.drop_duplicates("item").set_index("item")[strata].loc[table.columns].tolist() if strata else None
        effect = bootstrap_mean(slope, keys, seed=seed)
        anti = bootstrap_mean(where_defined(slope < 0, slope), seed=seed, bounds=(0.0, 1.0))
        rows.append(
            {
                **dict(zip(axes, place, strict=True)),
                "effect": effect.value,
                "effect_low": effect.low,
                "effect_high": effect.high,
                "anti_steerable": anti.value,
                "anti_low": anti.low,
                "anti_high": anti.high,
                "n": effect.n,
            }
        )
    return pd.DataFrame(rows)


def best_of(effects: pd.DataFrame) -> dict[str, Any]:
    """The row of the layer at which the vector's effect is largest; where none is finite, of the first layer.

    Raises:
        InputError: no vector was run, or none of its items was measured.
    """
    own = effects[(effects["vector"] == "vector") & (effects["n"] > 0)]
    if own.empty:
        raise InputError(
            "there is no effect of a vector here: none was run, or no item has a value at every multiplier."
        )
    return dict(own.loc[own["effect"].fillna(-np.inf).idxmax()])


def largest_control(controls: pd.DataFrame, measure: str = "effect") -> Any:
    """The row of the largest change either way; one that is not finite is larger than any."""
    return controls.loc[controls[measure].abs().fillna(np.inf).idxmax()]


def finding_on(effects: pd.DataFrame, subject: str, *, unit: str) -> Finding:
    """Whether the effect at the best layer is beyond zero and beyond every control, either way, as a word and in words.

    The controls count at every layer that the best one was chosen from.

    Args:
        effects: of `effect_table`.
        subject: whose effect it is.
        unit: of the measure.
    """
    best, n_layers = best_of(effects), effects["layer"].nunique()
    what = (
        f"{subject}, layer {best['layer']}: effect {best['effect']:+.3f} {unit} per unit of multiplier "
        f"{bracket(best['effect_low'], best['effect_high'])}, n = {best['n']}"
    )
    if why := why_undecided(best["effect"], best["effect_low"]):
        return Finding("undecided", f"{what}. {why}")
    if best["effect_low"] <= 0 <= best["effect_high"]:
        return Finding("null", f"{what}. NULL: the interval includes zero.")
    if best["effect_high"] < 0:
        what = f"{what}. The interval lies below zero, and no layer does better"
    # The letter-balanced vector is a variant of the vector, not a null.
    controls = effects[~effects["vector"].isin(["vector", "letter-balanced"]) & (effects["n"] > 0)]
    if not controls.empty:
        return _beside(controls, what, best, n_layers)
    if best["effect_high"] < 0:
        return Finding("opposite", f"{what}. OPPOSITE; no controls were run (controls=True).")
    return Finding("no controls", f"{what}. The interval excludes zero; no controls were run (controls=True).")


def _beside(controls: pd.DataFrame, what: str, best: Mapping[str, Any], n_layers: int) -> Finding:
    """The finding of an effect that is not zero, the best of `n_layers`, beside the largest of its controls at these."""
    reach = min(abs(best["effect_low"]), abs(best["effect_high"]))
    largest = largest_control(controls)
    control, size = repr(largest["vector"]), float(largest["effect"])
    at, anywhere = "", ""
    if n_layers > 1:
        at = f" at layer {largest['layer']}"
        anywhere = f" at any of the {n_layers} layers that this one was chosen from"
    if why := why_undecided(size, 0.0):
        return Finding("undecided", f"{what}. {why} This is the control {control}{at}.")
    if reach <= abs(size):
        most = f"{at}, the largest{anywhere}," if n_layers > 1 else ","
        return Finding(
            "not shown",
            f"{what}. NOT SHOWN: the control {control} of the same norm has an effect of {size:+.3f}{most} which the interval "
            "does not exceed.",
        )
    said = "OPPOSITE, beyond" if best["effect_high"] < 0 else "Beyond"
    where = f", at layer {largest['layer']}," if n_layers > 1 else ""
    return Finding(
        "opposite" if best["effect_high"] < 0 else "beyond controls",
        f"{what}. {said} every control of the same norm{anywhere}; the largest is {control}{where} at {size:+.3f}.",
    )
