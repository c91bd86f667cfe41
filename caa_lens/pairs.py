"""Contrast pairs: one prompt and two completions, the first of which shows the behaviour.

    pair = (prompt, positive, negative);   direction = positive minus negative, always

This module holds data and knows no model and no tokenizer; `sources` reads pairs from files.

Caveat: a vector contains whatever differs between the two sides. If all positive completions are longer, or end in
another punctuation mark, or have the letter A more often, the vector is partly that.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from caa_lens.errors import InputError
from caa_lens.files import digest


@dataclass(frozen=True)
class ContrastPair:
    """One prompt with a completion that shows the behaviour and one that does not.

    Attributes:
        prompt: what the user says; the template adds everything around it.
        positive, negative: the two completions, as the model would write them (`"(A)"`, or free text).
        extra: further fields of the record, kept as they are.
        origin: where the pair came from, for error messages (`"pairs.jsonl, line 3"`).

    Raises:
        InputError: the prompt or a completion is empty, or the completions are identical.
    """

    prompt: str
    positive: str
    negative: str
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    origin: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        where = self.origin or "contrast pair"
        for key in ("prompt", "positive", "negative"):
            if not getattr(self, key).strip():
                raise InputError(f"{where}: {key!r} is empty; give it a text, or remove the pair.")
        if self.positive == self.negative:
            raise InputError(
                f"{where}: 'positive' and 'negative' are identical ({self.positive!r}); a pair needs two "
                "different completions."
            )

    @property
    def where(self) -> str:
        """How an error names this pair: its origin, or the beginning of its prompt."""
        return self.origin or f"the pair with prompt {self.prompt[:60]!r}"

    @property
    def letters(self) -> tuple[str, str] | None:
        """The letters of the two multiple-choice answers (`("A", "B")` of `"(A)"` and `"(B)"`); None for free text."""
        positive, negative = _ANSWER.fullmatch(self.positive.strip()), _ANSWER.fullmatch(self.negative.strip())
        return (positive[1], negative[1]) if positive and negative else None

    @property
    def key(self) -> str | None:
        """The letter of a multiple-choice answer that shows the behaviour; None for free text."""
        return self.letters[0] if self.letters else None

    @property
    def options(self) -> tuple[str, ...]:
        """The letters that the prompt offers, in its order (see `option_marks`); empty if it offers none."""
        return tuple(mark[1] for mark in option_marks(self.prompt))

    def answer(self, letter: str) -> str:
        """The positive completion with another letter in its place."""
        return self.positive.replace(self.key or "", letter, 1)

    @property
    def digests(self) -> frozenset[str]:
        """What identifies the prompt, and the one that it was rewritten from (`restyle`, `as_free_text`)."""
        return frozenset(map(prompt_digest, {self.prompt, self.extra.get(WRITTEN_FROM, self.prompt)}))


def _interleaved(groups: Sequence[Sequence[ContrastPair]]) -> list[Sequence[ContrastPair]]:
    """The groups in an order of which every beginning holds each answer key in its share of the whole; without keys, as given.

    The i-th of the n groups of a key goes to the place (i - 1/2) / n of the way; groups at one place stay in the order given.
    """
    strata = [frozenset(pair.key for pair in group) for group in groups]
    total, seen = Counter(strata), Counter[frozenset[str | None]]()
    places = []
    for stratum in strata:
        seen[stratum] += 1
        places.append((2 * seen[stratum] - 1) / total[stratum])
    return [groups[index] for index in sorted(range(len(groups)), key=places.__getitem__)]


WRITTEN_FROM = "written_from"
"""The further field of a pair that holds the prompt which it was rewritten from."""

_ANSWER = re.compile(r"\(?([A-Za-z]|\d{1,2})\)?")
_MARK = re.compile(r"^[^\S\n]*\(([A-Za-z]|\d{1,2})\)[^\S\n]*", re.MULTILINE)


def line_marks(prompt: str) -> list[re.Match[str]]:
    """Every mark `(A)`, `(1)` at the start of a line, with the white space around it; group 1 is the letter or number."""
    return list(_MARK.finditer(prompt))


def option_marks(prompt: str) -> list[re.Match[str]]:
    """The marks of the options that a prompt offers: the last of its line marks that follow each other, `(A)`, `(B)`, `(C)`.

    Marks before them, such as those of a numbered list in the question, are no options.
    """
    marks = line_marks(prompt)
    starts = [i for i in range(1, len(marks)) if not _follows(marks[i - 1][1], marks[i][1])]
    return marks[starts[-1] :] if starts else marks


def _follows(one: str, next_one: str) -> bool:
    """Whether the second letter or number is the one after the first."""
    if (one + next_one).isdigit():
        return int(next_one) == int(one) + 1
    return ord(next_one[0]) == ord(one[0]) + 1


def prompt_digest(prompt: str) -> str:
    """Twelve hex digits that identify a prompt, surrounding white space aside."""
    return digest(prompt.strip())[:12]


@dataclass(frozen=True)
class PairSet(Sequence[ContrastPair]):
    """An immutable sequence of `ContrastPair` with a name and a stable hash; slices are `PairSet`s too.

    Attributes:
        pairs: the pairs.
        name: the behaviour's name.
        about: what a built-in behaviour says of itself: `title`, `description`, `positive_label`, `negative_label`,
            `open_prompts`, system prompts, and the parts of a judge's `Rubric`.
    """

    pairs: tuple[ContrastPair, ...]
    name: str = "unnamed"
    about: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> ContrastPair: ...
    @overload
    def __getitem__(self, index: slice) -> PairSet: ...
    def __getitem__(self, index: int | slice) -> ContrastPair | PairSet:
        if isinstance(index, slice):
            return replace(self, pairs=self.pairs[index])
        return self.pairs[index]

    def __iter__(self) -> Iterator[ContrastPair]:
        return iter(self.pairs)

    def __repr__(self) -> str:
        return f"PairSet({self.name!r}, {len(self)} pairs, {self.hash[:12]})"

    @property
    def hash(self) -> str:
        """SHA-256 of the pairs' texts; the same in every order of the pairs and every version of the package."""
        return digest(sorted([pair.prompt, pair.positive, pair.negative] for pair in self.pairs))

    @property
    def open_prompts(self) -> tuple[str, ...]:
        """Prompts to generate from, none of which is a prompt of the pairs; empty for a user's own pairs."""
        return tuple(self.about.get("open_prompts", ()))

    @property
    def system_prompts(self) -> dict[str, str | None]:
        """For `sweep(systems=...)`: none, one that asks for the behaviour (`"positive"`) and one that asks for its opposite.

        Raises:
            InputError: the set brings none; write your own in the same form.
        """
        found = {side: self.about.get(f"{side}_system_prompt") for side in ("positive", "negative")}
        if not all(found.values()):
            raise InputError(
                f"{self.name!r} brings no system prompts; give systems={{'none': None, 'positive': '...', 'negative': '...'}}."
            )
        return {"none": None, **found}

    @property
    def prompt_digests(self) -> tuple[str, ...]:
        """The sorted digests of the distinct prompts, and of those that they were rewritten from: enough to notice a prompt seen in
        training, nothing more."""
        return tuple(sorted({found for pair in self.pairs for found in pair.digests}))

    def split(self, *, held_out: int, seed: int = 0) -> tuple[PairSet, PairSet]:
        """Splits into (training, held-out) pairs; pairs that share a prompt always land on the same side.

        Answer keys are shared out evenly: every key has the same share of both sides, and of every beginning of a side, as far
        as whole prompts allow. An uneven split of balanced pairs would make the vector partly the answer letter.

        Args:
            held_out: number of held-out pairs. With distinct prompts exactly so many are held out; where prompts
                repeat, the largest number not above it that whole prompts can fill in the shuffled order.
            seed: seed of the shuffle; the same seed gives the same split on every machine.

        Raises:
            InputError: `held_out` leaves one of the two sides empty.
        """
        groups: dict[str, list[ContrastPair]] = {}
        for pair in self.pairs:
            groups.setdefault(pair.prompt.strip(), []).append(pair)
        order = list(groups.values())
        random.Random(seed).shuffle(order)
        test: list[ContrastPair] = []
        train: list[ContrastPair] = []
        for group in _interleaved(order):
            (test if len(test) + len(group) <= held_out else train).extend(group)
        if not test or not train:
            raise InputError(
                f"split(held_out={held_out}) of {len(self)} pairs with {len(groups)} distinct prompts leaves "
                f"{len(train)} training and {len(test)} held-out pairs; choose held_out between 1 and {len(self) - 1} "
                "so that both sides get at least one prompt."
            )
        return replace(self, pairs=tuple(train)), replace(self, pairs=tuple(test))

    def require_disjoint(self, trained_on: PairSet | Iterable[str]) -> None:
        """Refuses prompts that were also used for training.

        Args:
            trained_on: the training pairs, or the prompt digests that a vector's provenance carries.

        Raises:
            InputError: names the first prompt found on both sides.
        """
        seen = set(trained_on.prompt_digests if isinstance(trained_on, PairSet) else trained_on)
        both = [pair for pair in self.pairs if not seen.isdisjoint(pair.digests)]
        if both:
            raise InputError(
                f"{len(both)} of {len(self)} prompts are in the training pairs too, the first is {both[0].prompt!r}; "
                "a held-out score on them would be inflated. Use PairSet.split(held_out=..., seed=...), which keeps "
                "a prompt on one side."
            )
