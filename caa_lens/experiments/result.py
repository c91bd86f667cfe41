"""What a sweep shows: summaries with intervals, effects, and a verdict against the controls (see `effects`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from caa_lens.experiments.effects import Finding, Measurement, best_of, effect_table, finding_on
from caa_lens.experiments.scoring import Metric
from caa_lens.experiments.statistics import bootstrap_mean
from caa_lens.experiments.store import save_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SweepResult(Measurement):
    """Scores of a sweep.

    Attributes:
        items: one row an item and setting: `item`, `key`, `system` (where systems were swept), `vector`, `layer`,
            `multiplier`, `value`, `effect`, and the metric's further columns (`mass`; `positive`, `negative`, `preferred`).
        metric: how items were scored.
        provenance: model, template, pairs' hash, settings, seed, versions.
        seed: of the bootstrap.
    """

    metric: Metric
    provenance: dict[str, Any]
    seed: int = 0

    def to_pandas(self) -> pd.DataFrame:
        """One row a (system, vector, layer, multiplier): `value` with its 95% interval `low`, `high`, `n`, means of the rest."""
        rest = [c for c in ("mass", "positive", "negative", "preferred") if c in self.items]
        rows = []
        axes = [*self.axes, "multiplier"]
        for place, group in self.items.groupby(axes, sort=False):
            strata = group["key"].tolist() if self.metric.balanced else None
            values = group["value"].to_numpy(float)
            estimate = bootstrap_mean(values, strata, seed=self.seed, bounds=self.metric.bounds)
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
        strata = "key" if self.metric.balanced else None
        return effect_table(self.items, self.axes, measure="effect", strata=strata, seed=self.seed)

    def best(self) -> dict[str, Any]:
        """The layer at which the vector's effect is largest, as a row of `effects()`.

        The layer was chosen on these items, so its effect is somewhat too large; measure it on others to report it.
        """
        return best_of(self.effects())

    def finding(self) -> Finding:
        """Whether the effect at the best layer is beyond zero and beyond every control, as a word and in words.

        Raises:
            InputError: several systems were swept, each of which has its own finding (`by_system`).
        """
        self.require_one_system()
        return finding_on(self.effects(), self.provenance["pairs"], unit="nats")

    def verdict(self) -> str:
        """The finding in words. Without controls in the sweep it says so. Where systems were swept, one line for each."""
        if systems := self.by_system():
            return "\n".join(f"system {name!r}: {result.verdict()}" for name, result in systems.items())
        return self.finding().words

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
        save_table(self.items, self.provenance, path)
