"""What judged answers show: mean scores with intervals, effects beside controls, and the judge's agreement with itself.

    score at a setting = mean over questions of the mean over repeats      (0 to 10; intervals are over questions)
    effect             = mean over questions of the slope of that score against the multiplier, points per unit of multiplier

Refused, malformed and failed judgements have no score: they are counted, and a question that lacks a score at some multiplier is
left out of the effect.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from caa_lens.errors import InputError
from caa_lens.experiments.effects import Finding, Measurement, best_of, effect_table, finding_on
from caa_lens.experiments.rubric import HIGHEST, LOWEST, Rubric
from caa_lens.experiments.statistics import bootstrap_mean, interval_alpha
from caa_lens.experiments.store import save_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNSCORED = ("refused", "malformed", "failed")


class Agreement(NamedTuple):
    """How far a judge says the same of the same text.

    Attributes:
        n: texts scored at least twice.
        mean_absolute_difference: between two scores of a text, in points of 10.
        exact: share of pairs of scores that are equal.
        alpha: Krippendorff's alpha for interval data: 1 is full agreement, 0 what chance gives; NaN where all scores are equal.
    """

    n: int
    mean_absolute_difference: float
    exact: float
    alpha: float


@dataclass(frozen=True)
class JudgeResult(Measurement):
    """Judged answers.

    Attributes:
        items: the columns of the `AnswerSet`, a row an answer and repeat, with `repeat`, `score` (NaN where there is none),
            `status` (`scored`, `refused`, `malformed`, `failed`) and the judge's `reply`.
        provenance: that of the answers, with judge, rubric, repeats and seed.
        rubric: how they were scored.
        judge: the judge's name.
        seed: of the bootstrap.
    """

    provenance: dict[str, Any]
    rubric: Rubric
    judge: str
    seed: int = 0

    def to_pandas(self) -> pd.DataFrame:
        """One row a (system, vector, layer, multiplier): the mean score `value` with its 95% interval `low`, `high`, the number `n`
        of questions scored, and the numbers of judgements `n_refused`, `n_malformed`, `n_failed`."""
        rows = []
        axes = [*self.axes, "multiplier"]
        for place, group in self.items.groupby(axes, sort=False):
            scores = group.groupby("item")["score"].mean().dropna().to_numpy(float)
            counts = {f"n_{status}": int((group["status"] == status).sum()) for status in UNSCORED}
            estimate = bootstrap_mean(scores, seed=self.seed, bounds=(LOWEST, HIGHEST))
            rows.append({**dict(zip(axes, place, strict=True)), **estimate._asdict(), **counts})
        return pd.DataFrame(rows)

    def effects(self) -> pd.DataFrame:
        """One row a (system, vector, layer): mean slope of the questions' scores in points per unit of multiplier, and the share of
        anti-steerable questions, each with its interval; see `effects.effect_table`.

        Raises:
            InputError: fewer than two multipliers.
        """
        by = [*self.axes, "item", "multiplier"]
        scores = self.items.groupby(by, sort=False)["score"].mean().reset_index()
        return effect_table(scores, self.axes, measure="score", seed=self.seed, gaps=True)

    def best(self) -> dict[str, Any]:
        """The layer at which the vector's effect is largest, as a row of `effects()`; chosen on these questions, so somewhat too
        large."""
        return best_of(self.effects())

    def finding(self) -> Finding:
        """Whether the effect at the best layer is beyond zero and beyond every control, as a word and in words.

        Raises:
            InputError: several systems were run, each of which has its own finding (`by_system`).
        """
        self.require_one_system()
        return finding_on(self.effects(), f"{self.rubric.title}, judged by {self.judge}", unit="points")

    def verdict(self) -> str:
        """The finding in words, and what was not scored. Under several systems, a line for each."""
        if systems := self.by_system():
            return "\n".join(f"system {name!r}: {result.verdict()}" for name, result in systems.items())
        said = self.finding().words
        counts = {status: int((self.items["status"] == status).sum()) for status in UNSCORED}
        unscored = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"{said} Of {len(self.items)} judgements {unscored}." if unscored else said

    def agreement(self) -> Agreement:
        """The judge against itself over the repeats, each distinct text counted once.

        Raises:
            InputError: no text was scored twice.
        """
        scored = self.items.dropna(subset=["score"]).drop_duplicates(["prompt", "answer", "repeat"])
        groups = scored.groupby(["prompt", "answer"], sort=False)["score"]
        units = [scores for _, group in groups if len(scores := group.to_numpy(float)) > 1]
        if not units:
            raise InputError("agreement needs texts that were scored at least twice; judge with repeats=2 or more.")
        gaps = [np.abs(np.subtract.outer(scores, scores))[np.triu_indices(len(scores), 1)] for scores in units]
        return Agreement(
            len(units),
            float(np.mean([gap.mean() for gap in gaps])),
            float(np.mean([(gap == 0).mean() for gap in gaps])),
            interval_alpha(units),
        )

    def plot(self, *, layer: int | None = None, ax: Axes | None = None) -> Figure:
        """A figure of the scores by multiplier; see `caa_lens.plots_judge.plot_judged`."""
        from caa_lens.plots_judge import plot_judged

        return plot_judged(self, layer=layer, ax=ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the items' table with the provenance: `.parquet`, `.json` or `.csv` by the suffix, whole or not at all.

        Raises:
            InputError: another suffix.
        """
        save_table(self.items, self.provenance, path)
