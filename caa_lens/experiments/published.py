"""The authors' published results, scored by their own formula, without a model.

Their files are `results/<behaviour>/results_<key>=<value>_..._.json`, a list of items with `a_prob` and `b_prob` (multiple
choice; MMLU's and TruthfulQA's with `correct` and `category`) or `question` and `model_output` (open-ended); judged ones, with
`score`, are in `results/open_ended_scores/<behaviour>/`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from caa_lens.errors import InputError
from caa_lens.experiments.rubric import HIGHEST, LOWEST
from caa_lens.experiments.scoring import published_item
from caa_lens.experiments.statistics import bootstrap_mean
from caa_lens.sources import load_pairs

KEYS = (
    "layer",
    "multiplier",
    "behavior",
    "type",
    "system_prompt",
    "override_vector_model",
    "override_vector",
    "use_base_model",
    "model_size",
    "override_weights",
)
"""What a file name may say; the optional ones are left out of it when unset."""

TWO_CHOICE = ("mmlu", "truthful_qa")
"""Types whose items have the keys of the authors' two-choice questions."""
_OLDER = "override_model_weights_path"
"""What the files of fine-tuned models call `override_weights`."""
_NAMES = "|".join((*KEYS, _OLDER))
_FIELD = re.compile(rf"_({_NAMES})=(.*?)(?=_(?:{_NAMES})=|$)")


def result_files(folder: str | os.PathLike[str], kind: str = "") -> list[Path]:
    """The authors' result files below a folder, in order; of one `type` (`ab`, `open_ended`), or of any."""
    return sorted(file for file in Path(folder).rglob("results_*.json") if f"_type={kind}" in file.name)


def parse_result_name(name: str) -> dict[str, Any]:
    """The settings that a result file's name records, typed; keys that it leaves out are None.

    Raises:
        InputError: the name is not of this form.

    Example:
        >>> parse_result_name("results_layer=13_multiplier=-1.0_behavior=refusal_type=ab_use_base_model=False_model_size=7b.json")[
        ...     "multiplier"
        ... ]
        -1.0
    """
    found = dict(_FIELD.findall(name.removesuffix(".json").removeprefix("results")))
    if not {"layer", "multiplier", "behavior", "type"} <= set(found):
        raise InputError(
            f"{name}: not a result file of the authors; expected results_layer=13_multiplier=1.0_behavior=..._type=ab_... .json"
        )
    settings: dict[str, Any] = {key: found.get(key) for key in KEYS}
    settings["layer"] = int(found["layer"])
    settings["multiplier"] = float(found["multiplier"])
    settings["override_weights"] = found.get("override_weights", found.get(_OLDER))
    settings["use_base_model"] = found.get("use_base_model") == "True"
    return settings


def read_published(folder: str | os.PathLike[str], kind: Literal["ab", "mmlu", "truthful_qa"] = "ab") -> pd.DataFrame:
    """One row a result file of this `type` below `folder`: its settings, the published score, and what that score hides.

    Columns: those of the file's name; `value` with its 95% interval `low`, `high`, and `n` (the authors' formula); `letter`
    (items keyed A or B only, keys weighted equally); `mass` (mean p(A) + p(B)); `other_keys` (items keyed otherwise). Of MMLU and
    TruthfulQA the key is the correct answer's, and `by_category` is the mean of the categories' means, the authors' "Average".

    Raises:
        InputError: no result file, or one that cannot be read.
    """
    files = result_files(folder, kind)
    if not files:
        raise InputError(f"{folder} holds no files results_*type={kind}*.json; give the authors' results directory.")
    return score_files(files)


def score_files(files: Sequence[Path]) -> pd.DataFrame:
    """The rows of `read_published` for these files."""
    named = [(file, parse_result_name(file.name)) for file in files]
    return pd.DataFrame([{**settings, **_score(file, settings["type"])} for file, settings in named])


def _score(file: Path, kind: str) -> Mapping[str, Any]:
    items = _two_choice(file) if kind in TWO_CHOICE else [(pair.key, pair.extra) for pair in load_pairs(file)]
    try:
        a, b = (np.array([float(extra[key]) for _, extra in items]) for key in ("a_prob", "b_prob"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: every item needs the numbers a_prob and b_prob ({error}).") from error
    keys = [key for key, _ in items]
    values = np.array([float(published_item(key, *both)) for key, *both in zip(keys, a, b, strict=True)])
    lettered = np.array([key in ("A", "B") for key in keys])
    letter = (
        bootstrap_mean(values[lettered], [str(key) for key in keys if key in ("A", "B")]).value
        if lettered.any()
        else None
    )
    found = {
        **bootstrap_mean(values, bounds=(0.0, 1.0))._asdict(),
        "letter": letter,
        "mass": float((a + b).mean()),
        "other_keys": int((~lettered).sum()),
    }
    if kind in TWO_CHOICE:
        categories = [str(extra.get("category")) for _, extra in items]
        found["by_category"] = float(pd.Series(values).groupby(categories).mean().mean())
    return found


def _two_choice(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The correct letter and the item, of every item."""
    try:
        items = json.loads(file.read_text(encoding="utf-8"))
        found = [(str(item["correct"]).strip(" ()"), item) for item in items]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: every item needs question, correct, a_prob and b_prob ({error!r}).") from error
    if not found:
        raise InputError(f"{file} holds no items.")
    return found


def read_published_answers(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """One row an open-ended answer below `folder`: the settings in its file's name, `item`, `prompt`, `answer`, `score`.

    `score` is their judge's, from 0 to 10, NaN where it gave none. Of a file that is there judged and unjudged, the judged one is
    read. `AnswerSet.of(table.to_dict("records"))` makes answers of (a part of) it, to be judged again.

    Raises:
        InputError: no result file, or one that cannot be read.
    """
    files = result_files(folder, "open_ended")
    if not files:
        raise InputError(
            f"{folder} holds no files results_*type=open_ended*.json; give the authors' results directory."
        )
    return answers_in(files)


def answers_in(files: Sequence[Path]) -> pd.DataFrame:
    """The rows of `read_published_answers` for these files."""
    files = sorted(files, key=lambda file: "open_ended_scores" in file.parts)
    rows = []
    for name, file in sorted({file.name: file for file in files}.items()):
        try:
            for number, item in enumerate(json.loads(file.read_text(encoding="utf-8"))):
                texts = {"prompt": item["question"], "answer": item["model_output"].removesuffix("</s>").strip()}
                rows.append(
                    {**parse_result_name(name), "item": number, **texts, "score": float(item.get("score", "nan"))}
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{file}: every item needs the texts question and model_output, and a number as its score if it has one ({error})."
            ) from error
    return pd.DataFrame(rows)


def read_published_judged(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """One row an open-ended result file below `folder`: its settings, their judge's mean score `value` (0 to 10) with its 95%
    interval `low`, `high`, the number `n` of answers scored, and that of the others, `unscored`.

    Raises:
        InputError: as in `read_published_answers`.
    """
    return judged_by_file(read_published_answers(folder))


def judged_by_file(answers: pd.DataFrame) -> pd.DataFrame:
    """The rows of `read_published_judged` for these answers."""
    rows = []
    for place, group in answers.groupby(list(KEYS), sort=False, dropna=False):
        estimate = bootstrap_mean(group["score"].dropna().to_numpy(float), bounds=(LOWEST, HIGHEST))
        rows.append({**dict(zip(KEYS, place, strict=True)), **estimate._asdict(), "unscored": len(group) - estimate.n})
    return pd.DataFrame(rows)
