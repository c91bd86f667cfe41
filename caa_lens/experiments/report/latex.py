"""Tables as LaTeX, whatever stands in their cells."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BREAKS = re.compile(r"\s*[\n\r\x85\u2028\u2029]+\s*")
_ARGUMENT = re.compile(r"^(\s*)([\[*])", re.MULTILINE)


def latex(table: pd.DataFrame) -> str:
    """The table with LaTeX's own signs escaped.

    A cell stays on one line: an empty line would end a paragraph, which no table may hold. Control characters are left out.
    A bracket or a star that begins a row is put in braces: behind the end of a row LaTeX would read it as an argument of that.

    Example:
        >>> print(latex(pd.DataFrame({"token": ["[", "a_b"]})).splitlines()[4])
        {[} \\\\
    """
    plain = table.rename(columns=_plain).apply(lambda column: column.map(_plain))
    return _ARGUMENT.sub(r"\1{\2}", plain.to_latex(index=False, float_format="%.3f", escape=True))


def _plain(value: Any) -> Any:
    return _UNSEEN.sub("", _BREAKS.sub(" ", value)) if isinstance(value, str) else value
