r"""Tokens as text, and as coloured text for notebooks, files and terminals.

    colour of a token = value / limit, cut to [-1, 1], in 8 steps on either side of zero: orange above, blue below; the limit is
                        that of the figures (`caa_lens.scale`)

What is shown is the text itself, character by character: white space is kept and marked, a token that holds only a part of a
character is drawn as a mark in front of the character, and characters that a reader would not see or that reorder text
(control, zero-width, bidirectional) stand as escapes such as `\x1b`. Everything is escaped for HTML.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rich.text import Text

from caa_lens.errors import InputError
from caa_lens.scale import beyond, diverging_limit

STEPS = 8
"""Shades on either side of zero; a class name a token is a tenth of the HTML that a style a token would be."""
WARM, COLD, GREY = (236, 118, 18), (52, 126, 240), (150, 150, 150)
"""Orange and blue are told apart by every kind of colour vision; half transparent, they suit light and dark pages."""
SIGNS = str.maketrans(
    {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
)
"""What stands for white space where a token is a label."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token within its sequence; joined, they are the decoded sequence.

    A character spread over several tokens belongs to the last of them, the others are empty. Tokens decoded one by one would
    give replacement characters there, and lose the leading spaces of SentencePiece.
    """

    def decode(first: int, stop: int) -> str:
        return tokenizer.decode(list(ids[first:stop]), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts = [""] * len(ids)
    # Each token is decoded behind those of the previous piece, so that it has the space that belongs there.
    before, start = 0, 0
    for index in range(len(ids)):
        known, text = decode(before, start), decode(before, index + 1)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or index == len(ids) - 1:
            texts[index] = text[len(known) :]
            before, start = start, index + 1
    return tuple(texts)


def number(value: float) -> str:
    """A value to three digits, without an exponent where it has few digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def check_limit(limit: float | None) -> None:
    """Refuses a limit that no colour scale can have.

    Raises:
        InputError: it is not above zero.
    """
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise InputError(
            f"limit={limit}: the value of full colour is a number above zero; leave it out to have it chosen."
        )


def shade(value: float, limit: float) -> int:
    """The step of a value on the diverging scale, from -STEPS to STEPS; 0 has no colour."""
    if math.isnan(value):
        return 0
    return round(max(-1.0, min(1.0, value / limit)) * STEPS)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _hidden(character: str) -> bool:
    """Whether a character would not be seen, or would change the order of others."""
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    """The text with every unseen character, line breaks and tabs excepted, as an escape."""
    return "".join(_escape(character) if _hidden(character) else character for character in text)


def one_line(token: str) -> str:
    """A token as a label: white space and unseen characters shown, a dot where it has no text."""
    return visible(token).translate(SIGNS) or "\N{MIDDLE DOT}"


@lru_cache(maxsize=16384)  # a text has few distinct tokens, and has them at every layer
def _as_html(token: str) -> tuple[str, tuple[str, ...]]:
    """A token as HTML, and the classes that it has whatever its value."""
    text = html.escape(visible(token)).replace("\n", "<b></b>\n").replace("\t", "<u></u>\t")
    return text, (() if token else ("e",)) + (("h",) if any(map(_hidden, token)) else ())


@dataclass(frozen=True)
class TokenLine:
    """One coloured text.

    Attributes:
        title: what is shown.
        tokens, values, special: of each token its text, its value, and whether it is one of the tokenizer's special ones.
        limit: value of full colour; that of `caa_lens.scale` if None.
    """

    title: str
    tokens: Sequence[str]
    values: Sequence[float]
    special: Sequence[bool]
    limit: float | None = None

    @property
    def scale(self) -> float:
        """The value of full colour."""
        return self.limit or diverging_limit(self.values)

    @property
    def outside(self) -> str:
        """What lies beyond the scale, in words; empty where nothing does."""
        return beyond(self.values, self.scale)

    @property
    def html(self) -> str:
        """One `<span>` a token, whose text is the token's; marks are drawn by the style sheet and are not part of the text."""
        limit, spans = self.scale, []
        for index, (token, value, special) in enumerate(zip(self.tokens, self.values, self.special, strict=True)):
            step = shade(value, limit)
            names = [f"{'p' if step > 0 else 'n'}{abs(step)}"] if step else []
            names += ["s"] if special else []
            text, own = _as_html(token)
            names += own
            kind = f' class="{" ".join(names)}"' if names else ""
            spans.append(f'<span{kind} title="{index}: {number(value)}">{text}</span>')
        return f"<pre>{''.join(spans)}</pre>"

    @property
    def legend(self) -> str:
        """The scale, as HTML."""
        limit = number(self.scale)
        outside = f" <small>{self.outside}</small>" if self.outside else ""
        return f'<span class="caa-scale">&minus;{limit}<i></i>+{limit}</span>{outside}'

    @property
    def rich(self) -> Text:
        """The same for a terminal, on opaque shades in which black text is readable whatever the background."""
        limit, line = self.scale, Text()
        for token, value, special in zip(self.tokens, self.values, self.special, strict=True):
            step = shade(value, limit)
            colour = ""
            if step:
                share = abs(step) / STEPS
                mixed = (
                    round(grey + share * (full - grey))
                    for grey, full in zip(GREY, WARM if step > 0 else COLD, strict=True)
                )
                colour = f"black on rgb({','.join(map(str, mixed))})"
            shown = visible(token).replace("\n", "↵\n").replace("\t", "→\t") or "·"
            line.append(shown, style=f"{colour} {'italic' if special else ''}".strip())
        return line


def fragment(lines: Sequence[TokenLine], *, opened: int = 0) -> str:
    """HTML of one coloured text, or of several that open and close, with its style sheet; for a notebook's output."""
    blocks = [f"<header>{html.escape(line.title)} {line.legend}</header>{line.html}" for line in lines]
    if len(lines) > 1:
        blocks = [
            f"<details{' open' if number == opened else ''}><summary>{html.escape(line.title)} {line.legend}</summary>"
            f"{line.html}</details>"
            for number, line in enumerate(lines)
        ]
    return f'<div class="caa-tokens"><style>{_STYLE}</style>{"".join(blocks)}</div>'


def page(lines: Sequence[TokenLine], *, opened: int = 0) -> str:
    """A whole HTML document, in the reader's light or dark scheme."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(lines[opened].title)}</title><style>body{{max-width:60rem;margin:2rem auto;padding:0 1rem}}"
        f"</style></head><body>{fragment(lines, opened=opened)}</body></html>\n"
    )


def _rgba(colour: tuple[int, int, int], share: float) -> str:
    return f"rgba({','.join(map(str, colour))},{share:.3g})"


def _style() -> str:
    deepest = 0.72
    shades = [
        f".caa-tokens .{name}{step}{{background:{_rgba(colour, deepest * step / STEPS)}}}"
        for name, colour in (("p", WARM), ("n", COLD))
        for step in range(1, STEPS + 1)
    ]
    ends = f"{_rgba(COLD, deepest)},transparent,{_rgba(WARM, deepest)}"
    return "".join(
        [
            ".caa-tokens{color:inherit}",
            ".caa-tokens header,.caa-tokens summary{font:13px/1.5 system-ui,sans-serif}",
            ".caa-tokens summary{cursor:pointer}",
            ".caa-tokens pre{font:14px/1.75 ui-monospace,Menlo,Consolas,monospace;white-space:break-spaces;"
            "overflow-wrap:anywhere;margin:.4em 0;padding:0;background:none;color:inherit;border:0}",
            ".caa-tokens pre span{padding:.18em 0;border-radius:2px;box-shadow:inset 1px 0 rgba(128,128,128,.28)}",
            ".caa-tokens .s{font-style:italic;outline:1px dotted rgba(128,128,128,.9);outline-offset:-1px}",
            ".caa-tokens .h{outline:1px dashed rgba(128,128,128,.9);outline-offset:-1px;unicode-bidi:isolate}",
            '.caa-tokens b::before{content:"\\21B5";opacity:.55;font-weight:400}',
            '.caa-tokens u{text-decoration:none}.caa-tokens u::before{content:"\\2192";opacity:.55}',
            '.caa-tokens .e::before{content:"\\00B7";opacity:.55}',
            ".caa-tokens .caa-scale{white-space:nowrap;margin-left:.8em}",
            ".caa-tokens .caa-scale i{display:inline-block;width:7em;height:.8em;margin:0 .4em;vertical-align:-.05em;"
            f"border-radius:2px;background:linear-gradient(90deg,{ends})}}",
            *shades,
        ]
    )


_STYLE = _style()
