"""Where contrast pairs come from: built-in behaviours, files, lists, the hub.

    own JSON lines                        prompt, positive, negative
    CAA authors, model-written evals      question, answer_matching_behavior, answer_not_matching_behavior
    CAA authors' MMLU and TruthfulQA      prompt, correct, incorrect

A file is a JSON list or JSON lines, whatever its format; further keys (`category`, ...) stay with the pair.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from caa_lens.errors import InputError, MissingError
from caa_lens.hub import download, two_choice_questions
from caa_lens.pairs import ContrastPair, PairSet

OWN_KEYS = ("prompt", "positive", "negative")
FORMATS = (
    OWN_KEYS,
    ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
    ("prompt", "correct", "incorrect"),
)
HUB = "hub:"


def behaviours() -> tuple[str, ...]:
    """Names of the built-in behaviours, for `load_pairs`."""
    return tuple(name for name in _built_in() if not name.startswith("questions/"))


def _built_in() -> tuple[str, ...]:
    """Names of all pair sets that come with the package: behaviours, and questions for `capability`."""
    root = resources.files("caa_lens") / "behaviours"
    folders = [("", root), *((f"{name}/", root / name) for name in ("ab", "questions"))]
    names = [prefix + entry.name for prefix, folder in folders for entry in folder.iterdir()]
    return tuple(sorted(name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")))


def load_pairs(
    source: str | os.PathLike[str] | Iterable[Sequence[str] | Mapping[str, Any] | ContrastPair],
    *,
    name: str | None = None,
) -> PairSet:
    """Loads contrast pairs from a built-in behaviour, a file, or a list.

    Args:
        source: the name of a built-in behaviour (`behaviours()` lists them), or `"questions/general-knowledge"`; the path of a
            `.json` or `.jsonl` file in one of the formats in the module's docstring; such a file of a data set on the hub, as
            `"hub:Anthropic/model-written-evals/persona/agreeableness.jsonl"` (`OWNER/NAME@REVISION/...` pins a version);
            `"hub:cais/mmlu"` or `"hub:truthfulqa/truthful_qa"`, made into two-choice questions for `capability`; or a list
            of `(prompt, positive, negative)` tuples, of mappings with those keys, or of `ContrastPair`s.
        name: the behaviour's name; by default the file's stem, or its folder for the CAA authors' files.

    Raises:
        InputError: a record that cannot be used; the message names the file, the line, the key and the remedy.
        MissingError: no built-in behaviour and no file has this name, or the hub cannot be reached.

    Example:
        >>> load_pairs([("Say hello.", "Good morning to you.", "Hey there you.")], name="greeting")[0].positive
        'Good morning to you.'
    """
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if text in _built_in():
            return _load_builtin(text)
        if text.startswith(HUB):
            where = text.removeprefix(HUB)
            if where.count("/") < 2:
                return _pair_set(two_choice_questions(where), name or where.rsplit("/", 1)[-1], {})
            return load_pairs(download(where), name=name)
        path = Path(source)
        if not path.is_file():
            raise MissingError(
                f"no pairs called {str(source)!r}: it is neither a file nor a built-in behaviour "
                f"({', '.join(_built_in())}); check the path."
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
            for number, line in enumerate(text.split("\n"), 1):
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
    keys = max(FORMATS, key=lambda keys: sum(key in record for key in keys))
    missing = [key for key in keys if key not in record]
    if missing:
        raise InputError(
            f"{origin}: key {missing[0]!r} is missing (found: {', '.join(map(str, record)) or 'none'}); a pair needs "
            f"{'; or '.join(', '.join(keys) for keys in FORMATS)}."
        )
    values = dict(zip(OWN_KEYS, (record[key] for key in keys), strict=True))
    if keys is not OWN_KEYS:
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
