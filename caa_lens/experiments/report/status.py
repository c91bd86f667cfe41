"""The word that a section gives, from intervals and findings; one rule for all claims.

holds       low > |control|        [low, high]: 95% interval of an effect, positive where it goes the claim's way
not shown   0 < low <= |control|   control: the largest effect of a control of the same norm; 0 where the claim has none
null        low <= 0 <= high
opposite    high < 0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from caa_lens.experiments.effects import Finding
from caa_lens.experiments.statistics import bracket

Status = Literal["holds", "not shown", "null", "opposite", "mixed", "cannot tell", "described", "not run"]

MEANINGS: Mapping[Status, str] = {
    "holds": "what stands under the claim as 'Holds where' was found",
    "not shown": "short of 'Holds where', though not null: a control of the same norm does as much, either way, none was run, the "
    "interval is too wide, or the items are too few to have one",
    "null": "no effect was found: the interval includes zero",
    "opposite": "the reverse was found: the interval lies on the other side of zero; in claim 5, harm beyond every control; in "
    "claim 8, logits that differ",
    "mixed": "neither yes nor no as a whole: parts come out differently; the sentences say which",
    "cannot tell": "the judge does not tell the two sides of known pairs apart, so its scores of other texts decide nothing",
    "described": "numbers to read; there is no yes or no",
    "not run": "something was missing; the section says what",
}
"""What the words mean, in every claim."""

OF_FINDING: Mapping[str, Status] = {
    "beyond controls": "holds",
    "no controls": "not shown",
    "not shown": "not shown",
    "null": "null",
    "opposite": "opposite",
    "undecided": "not shown",
}
"""The status of what rests on one finding of a sweep."""

PLACES: Mapping[Status, str] = {
    "holds": "above zero",
    "null": "not told from zero",
    "opposite": "below zero",
    "not shown": "without an interval",
}
"""In words, where an interval lies that was compared with zero alone."""


def of_interval(low: float, high: float, control: float = 0.0) -> Status:
    """The status of one effect; of no number at all it is `not shown`.

    Args:
        low, high: its interval, positive where it goes the claim's way.
        control: the largest effect of a control, of either sign.
    """
    if low > abs(control):
        return "holds"
    if high < 0:
        return "opposite"
    return "null" if low <= 0 <= high else "not shown"


def together(statuses: Iterable[Status]) -> Status:
    """The status of several parts taken together: their common one, else mixed; where none goes beyond `not shown`, that."""
    found = set(statuses)
    if len(found) == 1:
        return found.pop()
    return "not shown" if found == {"not shown", "null"} else "mixed"


def capped(status: Status, finding: Finding) -> Status:
    """What an effect that was compared with zero alone may count as: no more than the vector beside its controls.

    Args:
        status: of the effect.
        finding: of the vector without a system prompt, on the same pairs, beside its controls.
    """
    return "not shown" if status == "holds" and finding.status != "beyond controls" else status


def reservation(finding: Finding) -> str:
    """The same in words."""
    said = f"Beside controls, without a system prompt: {finding.words}"
    own = finding.status == "beyond controls"
    return said if own else f"{said} So an effect above zero here is not shown to be this vector's own doing."


def written(row: Mapping[str, Any], name: str = "effect") -> str:
    """A number of a table with its interval."""
    return f"{row[name]:+.3f} {bracket(row[f'{name}_low'], row[f'{name}_high'])}"
