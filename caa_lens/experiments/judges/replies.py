"""What a judge's replies say: its words, and how long it asks to wait.

A reply counts as a score only if it is a number from 0 to 10 and nothing else (`7`, `7.5`, `Score: 7`, `7/10`); a refusal or
anything else is recorded as such.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from caa_lens.experiments.judges.base import Judgement
from caa_lens.experiments.rubric import HIGHEST

_MARKS = r"[\s*_`\"'()\[\]]*"
_SCORE = re.compile(
    rf"{_MARKS}(?:(?:the\s+|my\s+)?(?:score|rating){_MARKS}(?:is|of)?{_MARKS}[:=]?{_MARKS})?"
    rf"([0-9]{{1,2}}(?:\.[0-9]+)?)(?:\s*(?:/|out\s+of)\s*10)?\.?{_MARKS}",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\W*(?:(?:i\W?m|i am) (?:sorry|unable|not able)|i (?:can ?not|can\W?t|won\W?t|will not|must decline|decline)"
    r"|sorry|unfortunately|as an ai)\b",
    re.IGNORECASE,
)
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


def read_reply(reply: str) -> Judgement:
    """The judgement that a judge's words hold.

    Example:
        >>> read_reply("Score: 7/10").score, read_reply("I cannot rate this.").status, read_reply("7 or 8").status
        (7.0, 'refused', 'malformed')
    """
    said = _THOUGHTS.sub("", reply)
    found = _SCORE.fullmatch(said)
    if found and float(found[1]) <= HIGHEST:
        return Judgement("scored", float(found[1]), reply)
    return Judgement("refused" if _REFUSAL.match(said) else "malformed", None, reply)


def retry_after(header: str | None) -> float:
    """Seconds to wait, from a number or a date; 0 where there is neither."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, (when.astimezone(timezone.utc) - datetime.now(timezone.utc)).total_seconds())
