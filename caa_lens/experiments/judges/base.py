"""What a judge sees, what it gives, and what every judge must do.

A judge is blind: a `Case` holds a question and an answer, and nothing of how the answer was made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from caa_lens.experiments.rubric import Rubric

Status = Literal["scored", "refused", "malformed", "failed"]
"""`refused`: the judge declined; `malformed`: its reply is no score, or the service never takes this text; `failed`: the service
gave no reply, so it is asked again by the next call."""


@dataclass(frozen=True)
class Case:
    """An answer to be judged.

    Attributes:
        question, answer: the texts.
        repeat: which judging of them this is, from 0; the judge is not told.
    """

    question: str
    answer: str
    repeat: int = 0


@dataclass(frozen=True)
class Judgement:
    """What a judge gave.

    Attributes:
        status: only `"scored"` has a score.
        score: from 0 to 10.
        reply: its own words, or why there are none.
    """

    status: Status
    score: float | None
    reply: str


@runtime_checkable
class Judge(Protocol):
    """Scores answers by a rubric.

    Attributes:
        name: for tables and figures.
        varies: whether judging the same text again can give another score.
    """

    @property
    def name(self) -> str: ...

    @property
    def varies(self) -> bool: ...

    def about(self, rubric: Rubric) -> dict[str, Any]:
        """Everything but question and answer that determines a score: it identifies stored judgements."""

    def judge(self, rubric: Rubric, cases: Sequence[Case], record: Callable[[int, Judgement], None]) -> None:
        """Judges the cases in the order given, and calls `record(index of the case, judgement)` as soon as each is done.

        `record` may be called from several threads.

        Raises:
            EndpointError: no further case can be judged; what was recorded stays.
        """
