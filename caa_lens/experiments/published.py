"""The authors' published results, scored by their own formula, without a model.

Their files are `results/<behaviour>/results_<key>=<value>_..._.json`, a list of items with `a_prob` and `b_prob` (multiple
choice) or `model_output` and, once judged, `score` (open-ended).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from caa_lens.errors import InputError
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

_FIELD = re.compile(rf"_({'|'.join(KEYS)})=(.*?)(?=_(?:{'|'.join(KEYS)})=|$)")


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
    settings["use_base_model"] = found.get("use_base_model") == "True"
    return settings


def read_published(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """One row a multiple-choice result file below `folder`: its settings, the published score, and what that score hides.

    Columns: those of the file's name; `value` with its 95% interval `low`, `high`, and `n` (the authors' formula); `letter`
    (items keyed A or B only, keys weighted equally); `mass` (mean p(A) + p(B)); `other_keys` (items keyed otherwise).

    Raises:
        InputError: no result file, or one that cannot be read.
    """
    files = sorted(Path(folder).rglob("results_*type=ab*.json"))
    if not files:
        raise InputError(f"{folder} holds no files results_*type=ab*.json; give the authors' results directory.")
    return pd.DataFrame([{**parse_result_name(file.name), **_score(file)} for file in files])


def _score(file: Path) -> Mapping[str, Any]:
    pairs = load_pairs(file)
    try:
        a, b = (np.array([float(pair.extra[key]) for pair in pairs]) for key in ("a_prob", "b_prob"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: every item needs the numbers a_prob and b_prob ({error}).") from error
    keys = [pair.key for pair in pairs]
    values = np.array([float(published_item(key, *both)) for key, *both in zip(keys, a, b, strict=True)])
    lettered = np.array([key in ("A", "B") for key in keys])
    letter = (
        bootstrap_mean(values[lettered], [key for key in keys if key in ("A", "B")]).value if lettered.any() else None
    )
    return {
        **bootstrap_mean(values)._asdict(),
        "letter": letter,
        "mass": float((a + b).mean()),
        "other_keys": int((~lettered).sum()),
    }
