"""Which settings a study can be run with: what is refused before any work begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from caa_lens.errors import InputError, MissingError
from caa_lens.experiments.finetuning import CHOICES
from caa_lens.experiments.judge import parse_judge
from caa_lens.experiments.published import result_files
from caa_lens.models.checkpoints import Quantization, as_dtype

if TYPE_CHECKING:
    from caa_lens.experiments.report.study import Study

LEAST = {
    "train": 1,
    "held_out": 4,  # half of them choose a layer and half report it
    "layer": 0,
    "layer_step": 1,
    "controls": 0,
    "shuffles": 1,
    "questions": 0,
    "max_new_tokens": 1,
    "examples": 1,
    "epochs": 1,
    "capability": 1,
    "batch_size": 1,
    "seed": 0,
}
"""The smallest value of each number."""
MOST_SHUFFLES = 3
"""As many as `extract` makes."""
ALLOWED: dict[str, Sequence[str]] = {
    "kind": ("hooked", "bridge"),
    "quantization": get_args(Quantization),
    "method": CHOICES["method"],
}


def check_kind(name: str, value: Any, allowed: Any) -> None:
    """Refuses a value that is not of its annotation's kind.

    Raises:
        InputError: it is not.
    """
    wanted = str(allowed)
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    inner = next(kind for kind in kinds if kind in wanted)

    def fits(each: Any) -> bool:
        return isinstance(each, kinds[inner]) and (inner == "bool" or not isinstance(each, bool))

    fine = (value is None and "None" in wanted) or (
        all(map(fits, value))
        if "tuple" in wanted and isinstance(value, tuple)
        else "tuple" not in wanted and fits(value)
    )
    if not fine:
        many = "a list of " if "tuple" in wanted else ""
        raise InputError(f"{name}: {value!r} is not {many}{inner}; see the presets for the form of a study.")


def check_settings(study: Study) -> None:
    """Refuses settings of the right kind that no study can be run with.

    Raises:
        InputError, MissingError: the first of them, with what is allowed.
    """
    for name, least in LEAST.items():
        value = getattr(study, name)
        if value is not None and value < least:
            raise InputError(f"{name}={value} must be at least {least}.")
    if study.shuffles > MOST_SHUFFLES:
        raise InputError(
            f"shuffles={study.shuffles}: vectors carry {MOST_SHUFFLES} of shuffled labels; give 1 to {MOST_SHUFFLES}."
        )
    for name, allowed in ALLOWED.items():
        value = getattr(study, name)
        if value is not None and value not in allowed:
            raise InputError(f"{name}={value!r}: allowed are {' and '.join(map(repr, allowed))}.")
    as_dtype(study.dtype)
    if study.judge != "local":
        parse_judge(study.judge)
    if not all(map(math.isfinite, study.multipliers)):
        raise InputError(f"multipliers={list(study.multipliers)} must be finite numbers.")
    if not {-1.0, 0.0, 1.0} <= set(map(float, study.multipliers)):
        raise InputError(f"multipliers={list(study.multipliers)} must hold -1, 0 and 1; further ones are welcome.")
    _check_folders(study)


def _check_folders(study: Study) -> None:
    for name in ("data", "published"):
        folder = getattr(study, name)
        if folder is not None and not Path(folder).is_dir():
            raise MissingError(f"{name}={folder!r} is no folder; give the path of the authors' files.")
    if study.published is not None and not result_files(study.published):
        raise InputError(
            f"published={study.published!r} holds no result files (results_layer=..._type=ab_....json); give the authors' "
            "results folder."
        )


def check_layer(study: Study, n_layers: int) -> None:
    """Refuses a layer that the model does not have.

    Raises:
        InputError: it has not.
    """
    if study.layer is not None and study.layer >= n_layers:
        raise InputError(f"layer={study.layer}: the model's layers are 0 to {n_layers - 1}; give one of them, or none.")
