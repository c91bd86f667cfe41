"""Claim 5: what the model still knows and predicts under steering.

    harm = -change of an accuracy, or +change of a loss        of the vector, and of each control at the same layer and |multiplier|

A harm is shown where the interval lies above zero and the permutation test agrees. The interval's upper end says how large a harm
is compatible; up to `LIMIT` that is barely touched, shown or not. Where no answer changed, the interval has no width, and the end
is the share 1 - 0.05^(1/n), which leaves n questions untouched with a chance of 5%. A control that helps is no excuse for
a vector that harms: controls count by their harm, not by the size of their change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from caa_lens.experiments.capability import capability, text_loss
from caa_lens.experiments.capability_result import ALPHA
from caa_lens.experiments.report.lab import Lab
from caa_lens.experiments.report.section import Section
from caa_lens.experiments.report.status import Status, of_interval, together, written
from caa_lens.experiments.statistics import why_undecided
from caa_lens.pairs import PairSet
from caa_lens.sources import load_pairs

LIMIT = {"accuracy": 0.05, "loss": 0.1}
"""The largest harm, as a share of answers or in nats per token, that may be compatible where a capability is barely touched."""

WORST: Sequence[Status] = ("opposite", "mixed", "not shown", "holds")


def capabilities(lab: Lab, behaviour: str) -> Section:
    """Accuracy on two-choice questions and loss on plain text at -1 and +1, beside controls of the same norm."""
    results = [
        capability(
            lab.model,
            questions,
            lab.vector(behaviour),
            controls=1,
            seed=lab.study.seed,
            batch_size=lab.study.batch_size,
            store=lab.work("capability", behaviour, questions.name),
            progress=lab.progress,
        )
        for questions in _questions(lab)
    ]
    results.append(
        text_loss(
            lab.model,
            _prose(),
            lab.vector(behaviour),
            controls=1,
            window=64,
            seed=lab.study.seed,
            store=lab.work("loss", behaviour),
            progress=lab.progress,
        )
    )
    tables = {str(result.provenance["measured_on"]): result.to_pandas() for result in results}
    found = [on_capability(name, table) for name, table in tables.items()]
    return Section(
        together(status for status, _ in found),
        "\n".join(words for _, words in found),
        {f"capability_{_plain(name)}": table for name, table in tables.items()},
        notes=(
            "Every change is against the unsteered model, item by item. Where no answer changed, a harm counts as compatible up to "
            "the share that leaves so many questions untouched with a chance of 5%.",
        ),
    )


def on_capability(name: str, table: pd.DataFrame) -> tuple[Status, str]:
    """What steering does to the principal measure of a capability, in a word and in words: the worst of its multipliers.

    Args:
        name: what was measured on.
        table: of `CapabilityResult.to_pandas`.
    """
    table = table[(table["measure"] == table["measure"].iloc[0]) & (table["multiplier"] != 0)]
    # The letter-balanced vector is a variant of the vector, not a null.
    controls = table[~table["vector"].isin(["vector", "letter-balanced"])]
    statuses, lines = [], []
    for row in table[table["vector"] == "vector"].to_dict("records"):
        status, said = _harm(row, controls[controls["multiplier"].abs() == abs(row["multiplier"])])
        statuses.append(status)
        before, after = row["value"] - row["change"], row["value"]
        lines.append(
            f"{name}, layer {row['layer']}, multiplier {row['multiplier']:+g}: {row['measure']} {before:.3f} -> {after:.3f}, "
            f"change {written(row, 'change')}, p = {row['p_value']:.3g}, n = {row['n']}. {said}"
        )
    return min(statuses, key=WORST.index), "\n".join(lines)


def _harm(row: Mapping[str, Any], controls: pd.DataFrame) -> tuple[Status, str]:
    """What one change says of the claim that there is no harm."""
    if why := why_undecided(row["change"], row["change_low"]):
        return "not shown", why
    sign = 1 if row["measure"] == "loss" else -1
    low, high = sorted((sign * row["change_low"], sign * row["change_high"]))
    limit, shown = LIMIT[row["measure"]], of_interval(low, high) == "holds" and row["p_value"] < ALPHA
    if shown and high <= limit:
        return "holds", f"A slight harm, of up to {high:.3f}, within the limit of {limit:g}."
    if shown:
        harms = sign * controls["change"]
        if harms.empty or low > max(0.0, harms.max()):
            beyond = (
                "none was run" if harms.empty else f"the most harm is done by {_named(controls.loc[harms.idxmax()])}"
            )
            return "opposite", f"HARM, beyond every control: {beyond}."
        return "mixed", f"HARM, but a control of the same norm does as much: {_named(controls.loc[harms.idxmax()])}."
    if row["measure"] == "accuracy" and low == high:
        high = 1 - 0.05 ** (1 / row["n"])
    if high > limit:
        return "not shown", f"No harm shown, but one of up to {high:.3f} is compatible, above the limit of {limit:g}."
    return "holds", f"No harm shown; one of up to {max(0.0, high):.3f} is compatible, within the limit of {limit:g}."


def _named(control: pd.Series) -> str:
    return f"{control['vector']!r} at {control['multiplier']:+g}, with a change of {control['change']:+.3f}"


def _plain(name: str) -> str:
    return name.rsplit("/", 1)[-1].removesuffix(".txt").replace("-", "_")


def _questions(lab: Lab) -> list[PairSet]:
    """The authors' MMLU and TruthfulQA where their data are given, else the built-in questions."""
    if lab.study.data is None:
        found = [load_pairs("questions/general-knowledge")]
    else:
        folder = Path(lab.study.data) / "test"
        found = [load_pairs(folder / name) for name in ("mmlu/mmlu.json", "truthfulqa/truthful_qa.json")]
    limit = lab.study.capability
    # Evenly spread: the authors' questions are ordered by category.
    return [pairs if limit is None else pairs[:: max(1, len(pairs) // limit)][:limit] for pairs in found]


def _prose() -> Path:
    with resources.as_file(resources.files("caa_lens") / "behaviours" / "questions" / "prose.txt") as path:
        return path
