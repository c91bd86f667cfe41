"""Contrast pairs: one prompt and two completions, the first of which shows the behaviour.

    pair = (prompt, positive, negative);   direction = positive minus negative, always

This module holds data and knows no model and no tokenizer. Files may be in the package's own JSON lines
(`prompt`, `positive`, `negative`, any further keys), in the format of the CAA authors (a JSON list with `question`,
`answer_matching_behavior`, `answer_not_matching_behavior`) or of Anthropic's model-written evaluations (JSON lines
with the same three keys).

Caveat: a vector contains whatever differs between the two sides. If all positive completions are longer, or end in
another punctuation mark, or have the letter A more often, the vector is partly that.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, overload

from caa_lens.errors import InputError, MissingError
from caa_lens.files import digest

OWN_KEYS = ("prompt", "positive", "negative")
CAA_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")


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
        for key in OWN_KEYS:
            if not getattr(self, key).strip():
                raise InputError(f"{where}: {key!r} is empty; give it a text, or remove the pair.")
        if self.positive == self.negative:
            raise InputError(
                f"{where}: 'positive' and 'negative' are identical ({self.positive!r}); a pair needs two "
                "different completions."
            )

    @property
    def key(self) -> str | None:
        """The letter of a multiple-choice answer that shows the behaviour (`"A"` of `"(A)"`); None for free text."""
        positive, negative = _ANSWER.fullmatch(self.positive.strip()), _ANSWER.fullmatch(self.negative.strip())
        return positive[1] if positive and negative else None

    @property
    def options(self) -> tuple[str, ...]:
        """The letters that the prompt offers, in its order (`(A) ...` at the start of a line); empty if it offers none."""
        return tuple(dict.fromkeys(_OPTION.findall(self.prompt)))

    def answer(self, letter: str) -> str:
        """The positive completion with another letter in its place."""
        return self.positive.replace(self.key or "", letter, 1)


_ANSWER = re.compile(r"\(?([A-Za-z]|\d{1,2})\)?")
_OPTION = re.compile(r"^\s*\(([A-Za-z]|\d{1,2})\)", re.MULTILINE)


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
            `open_prompts`, system prompts, and for the multiple-choice behaviours a judge's rubric.
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
        """The sorted digests of the distinct prompts: enough to notice a prompt seen in training, nothing more."""
        return tuple(sorted({prompt_digest(pair.prompt) for pair in self.pairs}))

    def split(self, *, held_out: int, seed: int = 0) -> tuple[PairSet, PairSet]:
        """Splits into (training, held-out) pairs; pairs that share a prompt always land on the same side.

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
        for group in order:
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
        both = [pair for pair in self.pairs if prompt_digest(pair.prompt) in seen]
        if both:
            raise InputError(
                f"{len(both)} of {len(self)} prompts are in the training pairs too, the first is {both[0].prompt!r}; "
                "a held-out score on them would be inflated. Use PairSet.split(held_out=..., seed=...), which keeps "
                "a prompt on one side."
            )


def behaviours() -> tuple[str, ...]:
    """Names of the built-in pair sets, for `load_pairs`."""
    root = resources.files("caa_lens") / "behaviours"
    names = [entry.name for entry in root.iterdir()] + [f"ab/{entry.name}" for entry in (root / "ab").iterdir()]
    return tuple(sorted(name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")))


def load_pairs(
    source: str | os.PathLike[str] | Iterable[Sequence[str] | Mapping[str, Any] | ContrastPair],
    *,
    name: str | None = None,
) -> PairSet:
    """Loads contrast pairs from a built-in behaviour, a file, or a list.

    Args:
        source: the name of a built-in behaviour (`behaviours()` lists them); the path of a `.json` or `.jsonl` file in
            one of the formats in the module's docstring; or a list of `(prompt, positive, negative)` tuples,
            of mappings with those keys, or of `ContrastPair`s.
        name: the behaviour's name; by default the file's stem, or its folder for the CAA authors' files.

    Raises:
        InputError: a record that cannot be used; the message names the file, the line, the key and the remedy.
        MissingError: no built-in behaviour and no file has this name.

    Example:
        >>> load_pairs([("Say hello.", "Good morning to you.", "Hey there you.")], name="greeting")[0].positive
        'Good morning to you.'
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if str(source) in behaviours():
            return _load_builtin(str(source))
        if not path.is_file():
            raise MissingError(
                f"no pairs called {str(source)!r}: it is neither a file nor a built-in behaviour "
                f"({', '.join(behaviours())}); check the path."
            )
        stem = path.parent.name if path.stem in ("generate_dataset", "test_dataset_ab") else path.stem
        return _pair_set(_read_records(path), name or stem, {})
    items = list(source)
    return _pair_set(((f"item {number}", item) for number, item in enumerate(items)), name or "unnamed", {})


def _load_builtin(name: str) -> PairSet:
    folder = resources.files("caa_lens") / "behaviours"
    about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    with resources.as_file(folder / f"{name}.jsonl") as path:
        return _pair_set(_read_records(path), name, about)


def _pair_set(records: Iterable[tuple[str, Any]], name: str, about: Mapping[str, Any]) -> PairSet:
    pairs = tuple(_to_pair(record, origin) for origin, record in records)
    if not pairs:
        raise InputError(f"{name!r} holds no pairs; a vector needs at least one pair (about 80 saturate it).")
    return PairSet(pairs, name, about)


def _read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (origin, record) from a JSON list or JSON lines, decided by the first character."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}); check the file.") from error
    listed = text.lstrip().startswith("[")
    number = 1
    try:
        if listed:
            for item, record in enumerate(json.loads(text)):
                yield f"{path}, item {item}", record
        else:
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno if listed else number}: not valid JSON ({error.msg}, column {error.colno}); the "
            "file may be cut short. Give a JSON list, or one JSON object a line."
        ) from error


def _to_pair(record: Any, origin: str) -> ContrastPair:
    if isinstance(record, ContrastPair):
        return record
    if isinstance(record, Mapping):
        return _pair_from_mapping(record, origin)
    if isinstance(record, Sequence) and not isinstance(record, str) and len(record) == 3:
        return _make_pair(dict(zip(OWN_KEYS, record, strict=True)), {}, origin)
    raise InputError(
        f"{origin}: a pair is a mapping with the keys {', '.join(OWN_KEYS)}, or a tuple (prompt, positive, negative); "
        f"got {type(record).__name__} {str(record)[:60]!r}."
    )


def _pair_from_mapping(record: Mapping[str, Any], origin: str) -> ContrastPair:
    keys = next((keys for keys in (OWN_KEYS, CAA_KEYS) if keys[0] in record), OWN_KEYS)
    missing = [key for key in keys if key not in record]
    if missing:
        raise InputError(
            f"{origin}: key {missing[0]!r} is missing (found: {', '.join(map(str, record)) or 'none'}); a pair needs "
            f"{', '.join(OWN_KEYS)}, or {', '.join(CAA_KEYS)}."
        )
    values = dict(zip(OWN_KEYS, (record[key] for key in keys), strict=True))
    if keys is CAA_KEYS:
        values |= {key: _published_answer(values[key]) for key in OWN_KEYS[1:]}
    extra = {key: value for key, value in record.items() if key not in keys or isinstance(value, list)}
    return _make_pair(values, extra, origin)


def _make_pair(values: Mapping[str, Any], extra: Mapping[str, Any], origin: str) -> ContrastPair:
    for key, value in values.items():
        if not isinstance(value, str):
            raise InputError(f"{origin}: {key!r} is {type(value).__name__}, it must be text; write it as a string.")
    return ContrastPair(**values, extra=extra, origin=origin)


def _published_answer(value: Any) -> Any:
    """Their answers carry a leading space in some files; several non-matching options are listed, the first is the pair's."""
    first = value[0] if isinstance(value, list) and value else value
    return first.strip() if isinstance(first, str) else first
