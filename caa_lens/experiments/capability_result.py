"""What was measured of a capability, as tables and in words.

change of an item = its measure under steering - the same unsteered       tested by flipping signs, item by item
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from caa_lens.errors import InputError
from caa_lens.experiments.effects import largest_control
from caa_lens.experiments.statistics import bootstrap_mean, bracket, paired_change, why_undecided

ALPHA = 0.05
"""Largest p-value of a change that counts; the intervals are of 95%."""
BOUNDS = {"accuracy": (0.0, 1.0), "p_correct": (0.0, 1.0), "mass": (0.0, 1.0), "loss": (0.0, math.inf)}
"""The least and the largest value of each measure."""


@dataclass(frozen=True)
class CapabilityResult:
    """A capability before and under steering.

    Attributes:
        items: one row an item (a question, a window of text) and setting: `item`, `vector`, `layer`, `multiplier`, the
            measures, and `category` where the questions have one. Multiplier 0 is the unsteered model.
        measures: columns of `items` that are compared, the principal one first.
        provenance: model, what was measured on, settings, seed, versions.
        seed: of the bootstrap and the permutation test.
    """

    items: pd.DataFrame
    measures: tuple[str, ...]
    provenance: dict[str, Any]
    seed: int = 0

    def to_pandas(self, *, by: Literal["category"] | None = None) -> pd.DataFrame:
        """One row a (vector, layer, multiplier, measure), or a category of each: `value` with its 95% interval `low`, `high`;
        `change` against the unsteered model with `change_low`, `change_high` and the `p_value` of the sign-flip test; `n` items.

        Raises:
            InputError: the items have no category.
        """
        if by is not None and by not in self.items:
            raise InputError(f"by={by!r}: the items of {self.provenance['measured_on']!r} have no such column.")
        axes = [*([by] if by else []), "vector", "layer"]
        rows: list[dict[str, Any]] = []
        for place, group in self.items.groupby(axes, sort=False):
            for measure in self.measures:
                table = group.pivot(index="multiplier", columns="item", values=measure)
                before = table.loc[0.0].to_numpy(float)
                for multiplier, values in zip(table.index, table.to_numpy(float), strict=True):
                    change = paired_change(before, values, seed=self.seed)
                    rows.append(
                        {
                            **dict(zip(axes, place, strict=True)),
                            "multiplier": multiplier,
                            "measure": measure,
                            **bootstrap_mean(values, seed=self.seed, bounds=BOUNDS[measure])._asdict(),
                            "change": change.value,
                            "change_low": change.low,
                            "change_high": change.high,
                            "p_value": change.p_value,
                        }
                    )
        return pd.DataFrame(rows)

    def verdict(self, measure: str | None = None) -> str:
        """In words, a line for each layer and multiplier: whether the measure (the principal one by default) changed, and
        beyond what every control of the same norm does.

        Raises:
            InputError: no such measure.
        """
        measure = self.measures[0] if measure is None else measure
        if measure not in self.measures:
            raise InputError(f"measure={measure!r}: allowed are {', '.join(map(repr, self.measures))}.")
        table = self.to_pandas()
        table = table[table["measure"] == measure]
        own = table[(table["vector"] == "vector") & (table["multiplier"] != 0)]
        # The letter-balanced vector is a variant of the vector, not a null.
        controls = table[~table["vector"].isin(["vector", "letter-balanced"])]
        lines = []
        for row in own.itertuples():
            same = controls[(controls["layer"] == row.layer) & (controls["multiplier"].abs() == abs(row.multiplier))]
            lines.append(f"{self._what(row)} {_judged(row, same)}")
        return "\n".join(lines)

    def _what(self, row: Any) -> str:
        return (
            f"{self.provenance['measured_on']}, layer {row.layer}, multiplier {row.multiplier:+g}: {row.measure} "
            f"{row.value - row.change:.3f} -> {row.value:.3f}, change {row.change:+.3f} "
            f"{bracket(row.change_low, row.change_high)}, p = {row.p_value:.3g}, n = {row.n}."
        )


def _judged(row: Any, controls: pd.DataFrame) -> str:
    """The vector's change beside the changes of the controls at the same layer and size of multiplier."""
    if why := why_undecided(row.change, row.change_low):
        return why
    if row.change_low <= 0 <= row.change_high:
        return "NO CHANGE SHOWN: the interval includes zero."
    if row.p_value >= ALPHA:
        return f"NO CHANGE SHOWN: p is not below {ALPHA}; the items are too few or too unlike to tell."
    if controls.empty:
        return "CHANGED: the interval excludes zero; no controls were run (controls=True)."
    largest = largest_control(controls, "change")
    if why := why_undecided(largest["change"], 0.0):
        return f"{why} This is the control {largest['vector']!r}."
    what = (
        f"{largest['vector']!r} of the same norm at {largest['multiplier']:+g} changes it by {largest['change']:+.3f}"
    )
    if min(abs(row.change_low), abs(row.change_high)) <= abs(largest["change"]):
        return f"CHANGED, but not beyond the controls: {what}."
    return f"CHANGED, beyond every control: {what}, the most of them."
