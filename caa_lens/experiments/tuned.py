"""What fine-tuning did: the loss, the score of each pair before and after, and where the tuned model is.

    change = mean over pairs of (after minus before), each pair against itself

The score is that of `score` without a vector: of the positive side, or positive minus negative, whatever was learnt, so that a
model tuned on the negative side goes down. A training pair's change says nothing of other pairs; the held-out ones' does.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from caa_lens.errors import MissingError
from caa_lens.experiments.scoring import METRICS
from caa_lens.experiments.statistics import bootstrap_mean, bracket, why_undecided

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUMMARY = "result.json"


class Accuracy(NamedTuple):
    """The share of pairs whose asked-for completion is the likelier one, before and after."""

    before: float
    after: float


@dataclass(frozen=True)
class FinetuneResult:
    """A finished fine-tuning.

    Attributes:
        path: the tuned model, a Hugging Face directory; its name is the model's.
        method: `"lora"` or `"full"`.
        side: the completions learnt, `"positive"` or `"negative"`.
        log: one row a step: `step` and `epoch` from 1, `loss` in nats a token.
        items: one row a pair, `before` and `after` (`when`), of the `train` and the `held_out` pairs (`pairs`): `item`, `key`, the
            columns of `score`, and `accuracy`, 1 where the asked-for completion is the likelier one (for letters: where
            the letters of its side have more than half of the probability of all that are offered).
        seconds: that the training steps took, measuring aside.
        trainable_parameters, parameters: trained ones; those of the model.
        provenance: the base model, the pairs' hashes, template, settings, versions.
    """

    path: Path
    method: str
    side: str
    log: pd.DataFrame
    items: pd.DataFrame
    seconds: float
    trainable_parameters: int
    parameters: int
    provenance: dict[str, Any]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> FinetuneResult:
        """Reads the result of a finished run from its folder.

        Raises:
            MissingError: the folder holds none, or not the model any more.
        """
        summary = Path(folder) / SUMMARY
        if not summary.exists():
            raise MissingError(f"{summary.parent} holds no finished fine-tuning; finetune(..., folder=...) makes one.")
        found = json.loads(summary.read_text(encoding="utf-8"))
        path = summary.parent / found.pop("name")
        if not path.is_dir():
            raise MissingError(f"the tuned model {path} is gone; delete {summary.parent} and tune again.")
        losses, each, settings = found.pop("losses"), found.pop("steps_an_epoch"), found.pop("settings")
        steps = range(1, len(losses) + 1)
        log = pd.DataFrame({"step": steps, "epoch": [(step - 1) // each + 1 for step in steps], "loss": losses})
        return cls(
            path=path,
            method=settings["method"],
            side=settings["side"],
            log=log,
            items=pd.DataFrame(found.pop("items")),
            provenance={**found.pop("provenance"), **settings},
            **found,
        )

    @property
    def name(self) -> str:
        """The tuned model's name, for `vector.retarget(result.name)`."""
        return self.path.name

    @property
    def train_accuracy(self) -> Accuracy:
        """Of the training pairs."""
        return self._accuracy("train")

    @property
    def held_out_accuracy(self) -> Accuracy | None:
        """Of the held-out pairs; None where none were given."""
        return self._accuracy("held_out") if "held_out" in self.items["pairs"].tolist() else None

    def _accuracy(self, pairs: str) -> Accuracy:
        means = self.items[self.items["pairs"] == pairs].groupby("when")["accuracy"].mean()
        return Accuracy(float(means["before"]), float(means["after"]))

    def to_pandas(self) -> pd.DataFrame:
        """One row a set of pairs and measure (`value`, `accuracy`): `before`, `after` and the `change` of each pair, each with its
        95% interval (`before_low`, `before_high`, ...), and the number `n` of pairs."""
        rows = []
        for name, group in self.items.groupby("pairs", sort=False):
            before, after = (group[group["when"] == when].set_index("item") for when in ("before", "after"))
            for measure in ("value", "accuracy"):
                metric = METRICS[self.provenance["metric"]]
                strata = before["key"].tolist() if measure == "value" and metric.balanced else None
                row: dict[str, Any] = {"pairs": name, "measure": measure}
                both = {"before": before[measure], "after": after[measure], "change": after[measure] - before[measure]}
                limits = (0.0, 1.0) if measure == "accuracy" else metric.bounds
                for what, values in both.items():
                    bounds = (-math.inf, math.inf) if what == "change" else limits
                    found = bootstrap_mean(values.to_numpy(float), strata, seed=self.provenance["seed"], bounds=bounds)
                    row |= {what: found.value, f"{what}_low": found.low, f"{what}_high": found.high}
                rows.append({**row, "n": len(before)})
        return pd.DataFrame(rows)

    def verdict(self) -> str:
        """In words, a line for each set of pairs: whether the score moved in the asked direction."""
        table, asked = self.to_pandas(), 1 if self.side == "positive" else -1
        lines = []
        for row in table[table["measure"] == "value"].itertuples():
            ends = sorted((asked * row.change_low, asked * row.change_high))
            said = "MOVED as asked" if ends[0] > 0 else "MOVED the other way" if ends[1] < 0 else "NO MOVE SHOWN"
            why = why_undecided(row.change, row.change_low)
            lines.append(
                f"{self.provenance['pairs']}, {self.side}, {self.method}, {row.pairs.replace('_', '-')} pairs: {said}: "
                f"{row.before:+.3f} -> {row.after:+.3f}, change {row.change:+.3f} "
                f"{bracket(row.change_low, row.change_high)}, n = {row.n}.{why and ' '}{why}"
            )
        return "\n".join(lines)

    def plot(self, *, ax: Axes | None = None) -> Figure:
        """A figure of the loss by step; see `caa_lens.plots_training.plot_loss`."""
        from caa_lens.plots_training import plot_loss

        return plot_loss(self, ax=ax)
