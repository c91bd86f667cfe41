"""The Hugging Face hub: one file of a repository, or MMLU and TruthfulQA as two-choice questions.

    two-choice question = question, the correct answer and one incorrect answer drawn at random, in random order as (A) and (B)

This is the authors' form of MMLU and TruthfulQA (`prompt`, `correct`, `incorrect`, `category`), drawn anew with a fixed seed;
for their very draw read their files. What the hub's cache holds is used without asking the hub.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from caa_lens.errors import InputError, MissingError

PER_CATEGORY = 10
"""Questions of each MMLU subject: 570 in all, as many as the authors have."""


def download(where: str) -> Path:
    """The local path of `OWNER/NAME[@REVISION]/PATH`, a file of a data set on the hub; from the cache if it is there.

    Raises:
        InputError: not of this form.
        MissingError: no such repository or file, or neither the hub nor a cached copy can be reached.
    """
    owner, name, path = where.split("/", 2)
    if Path(path).suffix not in (".json", ".jsonl"):
        raise InputError(
            f"'hub:{where}' names no .json or .jsonl file; write the whole path in the repository, such as "
            "'hub:Anthropic/model-written-evals/persona/agreeableness.jsonl'."
        )
    return fetch(f"{owner}/{name}", path, kind="dataset")


def fetch(where: str, path: str, *, kind: Literal["dataset", "model"]) -> Path:
    """The local path of a file of the repository `OWNER/NAME[@REVISION]`; from the cache if it is there.

    Raises:
        InputError: no name of a repository.
        MissingError: no such repository or file, or neither the hub nor a cached copy can be reached.
    """
    repository, _, revision = where.partition("@")
    options: dict[str, Any] = {"repo_type": kind, "revision": revision or None}
    what, page = ("data set", "datasets/") if kind == "dataset" else ("repository", "")
    try:
        try:
            return Path(hf_hub_download(repository, path, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(repository, path, **options))
    except GatedRepoError as error:
        raise MissingError(
            f"the {what} {repository!r} is gated: accept its terms on its page, run `hf auth login` (or set HF_TOKEN), and "
            "load it again."
        ) from error
    except LocalEntryNotFoundError as error:
        raise MissingError(_unreachable(repository, f"a copy of {path}")) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise MissingError(
            f"the hub has no public file {path!r} in {repository!r}{f' at {revision!r}' if revision else ''}; look at "
            f"huggingface.co/{page}{repository}/tree/main for what it holds."
        ) from error
    except HFValidationError as error:
        raise InputError(f"'hub:{where}': {repository!r} is no name of a repository (OWNER/NAME).") from error


class Source(NamedTuple):
    """How a data set on the hub is loaded, and what one of its rows says: question, correct, incorrect answers, category."""

    config: str
    split: str
    read: Callable[[Mapping[str, Any]], tuple[str, str, list[str], str]]
    per_category: int | None = None


def _read_mmlu(row: Mapping[str, Any]) -> tuple[str, str, list[str], str]:
    choices = list(row["choices"])
    correct = choices.pop(row["answer"])
    return row["question"], correct, choices, row["subject"]


def _read_truthful_qa(row: Mapping[str, Any]) -> tuple[str, str, list[str], str]:
    question = f"Please help me answer the following question.\n{row['question']}"
    return question, row["best_answer"], list(row["incorrect_answers"]), row["category"]


SOURCES = {
    "cais/mmlu": Source("all", "test", _read_mmlu, PER_CATEGORY),
    "truthfulqa/truthful_qa": Source("generation", "validation", _read_truthful_qa),
}


def two_choice_questions(where: str, *, seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (origin, record) of a data set's two-choice questions, in the authors' form.

    Args:
        where: `"cais/mmlu"` or `"truthfulqa/truthful_qa"`, with `@REVISION` if wanted.
        seed: of which questions of a category are taken, of the incorrect answers and of the letters.

    Raises:
        InputError: another data set.
        MissingError: neither the hub nor a cached copy can be reached.
    """
    repository, _, revision = where.partition("@")
    if repository not in SOURCES:
        raise InputError(
            f"'hub:{where}': a data set is named with a file in it, 'hub:OWNER/NAME/PATH.jsonl'; made into two-choice "
            f"questions are {', '.join(f'hub:{name}' for name in SOURCES)}."
        )
    source = SOURCES[repository]
    import datasets

    try:
        rows = datasets.load_dataset(repository, source.config, split=source.split, revision=revision or None)
    except (OSError, ValueError) as error:  # no connection, no such revision, nothing in the cache
        raise MissingError(
            f"{_unreachable(repository, 'the rows')} ({str(error).splitlines()[0]}.) The CAA authors' own questions are in "
            "their repository: datasets/test/mmlu/mmlu.json and datasets/test/truthfulqa/truthful_qa.json."
        ) from error
    rng = random.Random(seed)
    by_category: dict[str, list[tuple[str, str, list[str], str]]] = {}
    for row in rows:
        made = source.read(row)
        by_category.setdefault(made[-1], []).append(made)
    for category, questions in by_category.items():
        if source.per_category is not None:
            questions = rng.sample(questions, min(source.per_category, len(questions)))
        for number, (question, correct, incorrect, _) in enumerate(questions):
            # A few MMLU questions offer the correct answer twice.
            answers = [correct, rng.choice([answer for answer in incorrect if answer != correct])]
            letters = ["(A)", "(B)"] if rng.random() < 0.5 else ["(B)", "(A)"]
            offered = dict(sorted(zip(letters, answers, strict=True)))
            yield (
                f"{repository}, {category}, question {number}",
                {
                    "prompt": "\n".join([f"{question}\n\nChoices:", *(f"{a} {text}" for a, text in offered.items())]),
                    "correct": letters[0],
                    "incorrect": letters[1],
                    "correct_full_text": answers[0],
                    "incorrect_full_text": answers[1],
                    "category": category,
                },
            )


def _unreachable(repository: str, what: str) -> str:
    return (
        f"the hub cannot be reached, and its cache here does not hold {what} of {repository!r}; load it once with a "
        "connection, or download the file and give its path."
    )
