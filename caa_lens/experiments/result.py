"""What a sweep shows: summaries with intervals, effects, and a verdict against the controls.

    effect of a vector at a layer = mean over items of the slope of the item's effect against the multiplier

An item whose slope is negative is anti-steerable: the vector moves it the wrong way. An effect counts as shown when its
interval lies beyond the largest effect of any control of the same norm at the same layer.

Source for slopes and anti-steerability: Tan et al., "Analyzing the generalization and reliability of steering vectors" (2024).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from caa_lens.errors import InputError
from caa_lens.experiments.scoring import Metric
from caa_lens.experiments.statistics import bootstrap_mean, slopes
from caa_lens.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SweepResult:
    """Scores of a sweep.

    Attributes:
        items: one row an item and setting: `item`, `key`, `system` (where system prompts were swept), `vector`, `layer`,
            `multiplier`, `value`, `effect`, and the metric's further columns (`mass`; `positive`, `negative`, `preferred`).
        metric: how items were scored.
        provenance: model, template, pairs' hash, settings, seed, versions.
        seed: of the bootstrap.
    """

    items: pd.DataFrame
    metric: Metric
    provenance: dict[str, Any]
    seed: int = 0

    @property
    def _axes(self) -> list[str]:
        return [axis for axis in ("system", "vector", "layer") if axis in self.items]

    def by_system(self) -> dict[str, SweepResult]:
        """The result under each system prompt; empty where none were swept."""
        if "system" not in self.items:
            return {}
        groups = self.items.groupby("system", sort=False)
        return {str(name): replace(self, items=group.drop(columns="system")) for name, group in groups}

    def to_pandas(self) -> pd.DataFrame:
        """One row a (system, vector, layer, multiplier): `value` with its 95% interval `low`, `high`, `n`, means of the rest."""
        rest = [c for c in ("mass", "positive", "negative", "preferred") if c in self.items]
        rows = []
        axes = [*self._axes, "multiplier"]
        for place, group in self.items.groupby(axes, sort=False):
            strata = group["key"].tolist() if self.metric.balanced else None
            estimate = bootstrap_mean(group["value"].to_numpy(float), strata, seed=self.seed)
            means = {name: float(group[name].mean()) for name in rest}
            rows.append({**dict(zip(axes, place, strict=True)), **estimate._asdict(), **means})
        return pd.DataFrame(rows)

    def effects(self) -> pd.DataFrame:
        """One row a (system, vector, layer): mean slope of the items' effect per unit of multiplier, with its interval, and the
        share of anti-steerable items, with its interval. The effect is in nats: the log-odds of the matching letter, or the
        contrast per token.

        Raises:
            InputError: the sweep has fewer than two multipliers.
        """
        if self.items["multiplier"].nunique() < 2:
            raise InputError("an effect needs at least two multipliers; sweep with multipliers=(-1, 0, 1).")
        rows = []
        for place, group in self.items.groupby(self._axes, sort=False):
            table = group.pivot(index="multiplier", columns="item", values="effect")
            slope = slopes(table.index.to_numpy(float), table.to_numpy(float))
            keys = group.drop_duplicates("item").set_index("item")["key"].loc[table.columns].tolist()
            effect = bootstrap_mean(slope, keys if self.metric.balanced else None, seed=self.seed)
            anti = bootstrap_mean((slope < 0).astype(float), seed=self.seed)
            rows.append(
                {
                    **dict(zip(self._axes, place, strict=True)),
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

    def best(self) -> dict[str, Any]:
        """The layer at which the vector's effect is largest, as a row of `effects()`.

        The layer was chosen on these items, so its effect is somewhat too large; measure it on others to report it.
        """
        effects = self.effects()
        own = effects[effects["vector"] == "vector"]
        return dict(own.loc[own["effect"].idxmax()])

    def verdict(self) -> str:
        """In words: whether the effect at the best layer is beyond zero and beyond every control.

        Without controls in the sweep it says so. Where system prompts were swept, one line for each.
        """
        if systems := self.by_system():
            return "\n".join(f"system prompt {name!r}: {result.verdict()}" for name, result in systems.items())
        best, effects = self.best(), self.effects()
        at_best = effects[(effects["layer"] == best["layer"]) & (effects["vector"] != "vector")]
        others = at_best[at_best["vector"] != "letter-balanced"]  # a variant of the vector, not a null
        what = (
            f"{self.provenance['pairs']}, layer {best['layer']}: effect {best['effect']:+.3f} nats per unit of multiplier "
            f"[{best['effect_low']:+.3f}, {best['effect_high']:+.3f}], n = {best['n']}"
        )
        if best["effect_high"] < 0:
            return f"{what}. OPPOSITE: the interval lies below zero, and no layer does better."
        if best["effect_low"] <= 0:
            return f"{what}. NULL: the interval includes zero."
        if others.empty:
            return f"{what}. The interval excludes zero; no controls were run (controls=True)."
        largest = others.loc[others["effect"].abs().idxmax()]
        bound = abs(float(largest["effect"]))
        if best["effect_low"] <= bound:
            return (
                f"{what}. NOT SHOWN: the control {largest['vector']!r} of the same norm has an effect of "
                f"{largest['effect']:+.3f}, which the interval does not exceed."
            )
        return f"{what}. Beyond every control of the same norm; the largest is {largest['vector']!r} at {largest['effect']:+.3f}."

    def plot(
        self,
        by: Literal["layer", "multiplier"] | None = None,
        *,
        layer: int | None = None,
        ax: Axes | None = None,
        interactive: bool = False,
    ) -> Figure | Any:
        """A figure of the effects by layer, or of the scores by multiplier at one layer; see `caa_lens.plots.plot_sweep`.

        Args:
            by, layer, ax: as there.
            interactive: a plotly figure, with the number and interval where the mouse is, and a legend that hides and shows.
        """
        if interactive:
            from caa_lens import plots_interactive

            plots_interactive.refuse_axis(ax)
            return plots_interactive.plot_sweep(self, by, layer=layer)
        from caa_lens.plots import plot_sweep

        return plot_sweep(self, by, layer=layer, ax=ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the items' table with the provenance: `.parquet`, `.json` or `.csv` by the suffix, whole or not at all.

        Raises:
            InputError: another suffix.
        """
        target = Path(path)
        if target.suffix not in (".parquet", ".json", ".csv"):
            raise InputError(f"{target.name}: allowed suffixes are .parquet, .json and .csv.")
        with atomic_path(target) as temporary:
            if target.suffix == ".parquet":
                table = self.items.copy()
                table.attrs = {"caa_lens": json.dumps(self.provenance)}
                table.to_parquet(temporary)
            elif target.suffix == ".json":
                rows = json.loads(self.items.to_json(orient="records"))
                temporary.write_text(json.dumps({"provenance": self.provenance, "items": rows}), encoding="utf-8")
            else:
                self.items.to_csv(temporary, index=False)
