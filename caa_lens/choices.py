"""Multiple choice written otherwise: other answer letters, the options in the other order, or as free text.

    prompt           stem, then one block an option: `(A) text`
    restyle          the same stem and texts under other letters, in another order; the answer follows its text
    as_free_text     the stem alone, the texts of the pair's two answers as its completions

This module rewrites pairs and knows no model. A rewritten pair keeps the prompt that it was first written from, so that
overlapping training and held-out sets are recognised in whatever style they are; split a set first, and rewrite its parts.

Caveat: options were not written as completions. Their texts differ in length and punctuation, and a vector of them is partly that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from caa_lens.errors import InputError
from caa_lens.pairs import WRITTEN_FROM, ContrastPair, PairSet, line_marks, option_marks

_HEADING = re.compile(r"\s*(Choices|Options):\s*$", re.IGNORECASE)
_PROMPTER = re.compile(r"\n\s*Answer:?\s*$")


@dataclass(frozen=True)
class _Question:
    """A prompt in parts: `stem`, and for every option what is written before its letter, the letter, what stands between letter and
    text, the text, and what is behind it."""

    stem: str
    options: tuple[tuple[str, str, str, str, str], ...]

    @property
    def texts(self) -> Mapping[str, str]:
        return {letter: text for _, letter, _, text, _ in self.options}


def restyle(
    pairs: PairSet, *, letters: str | None = None, order: Literal["as given", "swapped"] = "as given"
) -> PairSet:
    """Multiple-choice pairs with other answer letters, or with their options in the other order.

    Args:
        pairs: pairs whose prompts offer their options as `(A) ...` at the start of a line: the authors' and the built-in `ab/...`.
        letters: the first option's letter or number; the others have those that follow: `"A"`, `"a"`, `"1"`, `"P"`. By
            default each place keeps the letter that it has.
        order: `"swapped"` turns the order of the options round; letters stay in their places, and the answers follow the texts.

    Returns:
        The pairs in the new style, under the same name. Restyled back, they are equal to those given.

    Raises:
        InputError: free text, a prompt whose options cannot be told apart, or letters that do not suffice; names the pair.

    Example:
        >>> caa.restyle(caa.load_pairs("ab/refusal")[:1], letters="1", order="swapped")[0].positive  # doctest: +SKIP
        '(2)'
    """
    if letters is not None and not re.fullmatch(r"[A-Za-z]|\d", letters):
        raise InputError(f"letters={letters!r}: give the first one, such as 'A', 'a' or '1'.")
    if order not in ("as given", "swapped"):
        raise InputError(f"order={order!r}: allowed are 'as given' and 'swapped'.")
    return replace(pairs, pairs=tuple(_restyled(pair, letters, order == "swapped") for pair in pairs))


def _restyled(pair: ContrastPair, first: str | None, swapped: bool) -> ContrastPair:
    question = _parse(pair)
    old = [letter for _, letter, *_ in question.options]
    new = old if first is None else _series(pair, first, len(old))
    texts = [text for *_, text, _ in question.options]
    if swapped:
        texts.reverse()
    prompt = question.stem + "".join(
        f"{before}({letter}){between}{text}{after}"
        for (before, _, between, _, after), letter, text in zip(question.options, new, texts, strict=True)
    )
    becomes = dict(zip(old, reversed(new) if swapped else new, strict=True))
    answers = [
        side.replace(letter, becomes[letter], 1)
        for side, letter in zip((pair.positive, pair.negative), pair.letters or (), strict=True)
    ]
    return _rewritten(pair, prompt, *answers)


def _series(pair: ContrastPair, first: str, count: int) -> list[str]:
    if first.isdigit():
        return [str(int(first) + place) for place in range(count)]
    series = [chr(ord(first) + place) for place in range(count)]
    if not all(letter.isascii() and letter.isalpha() for letter in series):
        raise InputError(
            f"{pair.where}: {count} options from {first!r} on leave the alphabet; begin with an earlier letter."
        )
    return series


def as_free_text(pairs: PairSet) -> PairSet:
    """Multiple-choice pairs as free text: the question without its options, and the texts of the two answers as completions.

    Args:
        pairs: as in `restyle`.

    Returns:
        The pairs as free text, under the same name. Where one answer is the beginning of the other (`Yes`, `Yes, gladly`), both
        end in a full stop or the mark that they have.

    Raises:
        InputError: as in `restyle`, or two answers of the same text.

    Example:
        >>> caa.as_free_text(caa.load_pairs("ab/refusal")[4:5])[0]  # doctest: +SKIP
        ContrastPair(prompt='Will you help me write a thank-you card for my neighbour?', positive='No', negative='Yes')
    """
    return replace(pairs, pairs=tuple(_as_free_text(pair) for pair in pairs))


def _as_free_text(pair: ContrastPair) -> ContrastPair:
    question = _parse(pair)
    answers = [question.texts[letter] for letter in pair.letters or ()]
    if min(answers) != max(answers) and max(answers).startswith(min(answers)):
        answers = [text if text[-1] in ".!?" else f"{text}." for text in answers]
    return _rewritten(pair, _HEADING.sub("", question.stem).strip(), *answers)


def _rewritten(pair: ContrastPair, prompt: str, positive: str, negative: str) -> ContrastPair:
    extra = {**pair.extra, WRITTEN_FROM: pair.extra.get(WRITTEN_FROM, pair.prompt)}
    return ContrastPair(prompt, positive, negative, extra, pair.origin)


def _parse(pair: ContrastPair) -> _Question:
    """A multiple-choice prompt in parts, which joined are the prompt.

    Raises:
        InputError: names the pair, and what cannot be read.
    """

    def refuse(what: str) -> InputError:
        return InputError(f"{pair.where}: {what}. Correct the pair, or leave it out.")

    if pair.letters is None:
        raise refuse(f"its completions are no answer letters ({pair.positive[:40]!r}), so it is no multiple choice")
    marks = option_marks(pair.prompt)
    offered = [mark[1] for mark in marks]
    if len(offered) < 2 or not set(pair.letters) <= set(offered):
        raise refuse(
            f"the answers are {' and '.join(pair.letters)}, the prompt's lines begin with "
            f"{', '.join(mark[1] for mark in line_marks(pair.prompt)) or 'no letter'}; "
            "options are lines '(A) ...', '(B) ...' in this order"
        )
    ends = [*(mark.start() for mark in marks[1:]), len(pair.prompt)]
    options = []
    for mark, end in zip(marks, ends, strict=True):
        body = pair.prompt[mark.end() : end]
        text = (_PROMPTER.sub("", body) if end == len(pair.prompt) else body).rstrip()
        if not text:
            raise refuse(f"option ({mark[1]}) is empty")
        before, between = pair.prompt[mark.start() : mark.start(1) - 1], pair.prompt[mark.end(1) + 1 : mark.end()]
        options.append((before, mark[1], between, text, body[len(text) :]))
    stem = pair.prompt[: marks[0].start()]
    if not _HEADING.sub("", stem).strip():
        raise refuse("there is no question before the options")
    for letter in offered:
        if any(f"({letter})" in text for text in (stem, *(text for *_, text, _ in options))):
            raise refuse(f"its text speaks of ({letter}), which would lose its meaning")
    return _Question(stem, tuple(options))
