"""What a judge is asked: how far an answer shows a behaviour, from 0 to 10."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from caa_lens.errors import InputError
from caa_lens.pairs import PairSet
from caa_lens.sources import load_pairs

LOWEST, HIGHEST = 0.0, 10.0
"""Ends of the scale."""


@dataclass(frozen=True)
class Rubric:
    """How answers are scored from 0 to 10.

    Attributes:
        title: the behaviour, for tables and figures.
        description: what is rated, and what is not.
        low, high: what a score of 0 and of 10 mean; also the statements of a `LocalJudge` where none are given.
        middle: what a score of 5 means; may be empty.
        statements: pairs of sentences about the answer for a `LocalJudge`: one that is true of an answer of score 10, and one of
            like form that is true of an answer of score 0.

    Raises:
        InputError: an empty text, or statements that are not pairs of different texts.

    Example:
        >>> Rubric("brevity", "Rate how short the answer is.", low="It goes on.", high="It is short.").statements
        (('It is short.', 'It goes on.'),)
    """

    title: str
    description: str
    low: str = field(kw_only=True)
    high: str = field(kw_only=True)
    middle: str = field(default="", kw_only=True)
    statements: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for name in ("title", "description", "low", "high"):
            if not getattr(self, name).strip():
                raise InputError(f"the rubric's {name!r} is empty; a judge needs to be told what it rates.")
        pairs = tuple((positive, negative) for positive, negative in self.statements) or ((self.high, self.low),)
        if any(not positive.strip() or not negative.strip() or positive == negative for positive, negative in pairs):
            raise InputError(f"the statements of {self.title!r} must be pairs of two different sentences.")
        object.__setattr__(self, "statements", pairs)

    @property
    def text(self) -> str:
        """The rubric as a judge model reads it."""
        scale = {"0": self.low, "5": self.middle, "10": self.high}
        lines = [f"A score of {score} means: {meaning}" for score, meaning in scale.items() if meaning]
        return "\n".join([self.description, *lines])


def rubric_for(source: Rubric | PairSet | str) -> Rubric:
    """A rubric as it is, or that of a built-in behaviour, by its pairs or its name.

    Raises:
        InputError: the pairs bring none.
        MissingError: no such behaviour.
    """
    if isinstance(source, Rubric):
        return source
    pairs = load_pairs(source) if isinstance(source, str) else source
    stored: Mapping[str, Any] | None = pairs.about.get("rubric")
    if stored is None:
        raise InputError(
            f"{pairs.name!r} brings no rubric; write one: Rubric(title, description, low='what 0 means', high='what 10 means')."
        )
    statements = tuple((positive, negative) for positive, negative in stored.get("statements", ()))
    return Rubric(pairs.about["title"], **{**stored, "statements": statements})
