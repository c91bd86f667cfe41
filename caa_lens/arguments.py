"""What a user may give for numbers, counts, pairs and options; anything else is refused before a model runs."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.pairs import PairSet

Multipliers = float | Iterable[float] | np.ndarray | Tensor
"""One strength or several: a number, a list, an array, a tensor."""

Layers = int | Iterable[int] | np.ndarray | Tensor
"""One layer or several, 0-based; negative ones count from the end."""


def as_numbers(name: str, given: Any) -> list[float]:
    """One number, or several in a row, as floats.

    Raises:
        InputError: none, or something that is no finite number.
    """
    plain = given.tolist() if hasattr(given, "tolist") else given  # arrays and tensors
    several = [plain] if isinstance(plain, Real) else plain
    if isinstance(several, (str, Mapping)) or not isinstance(several, Iterable):
        raise InputError(f"{name}={given!r}: give a number, or a list of numbers.")
    numbers = list(several)
    if not numbers:
        raise InputError(f"{name}={given!r} is an empty grid: give at least one.")
    for number in numbers:
        if not isinstance(number, Real) or isinstance(number, bool) or not math.isfinite(number):
            raise InputError(f"{name}={given!r}: {number!r} is no finite number; give a number, or a list of numbers.")
    return [float(number) for number in numbers]


def as_integers(name: str, given: Any) -> list[int]:
    """One whole number, or several in a row.

    Raises:
        InputError: something that is no whole number.
    """
    plain = given.tolist() if hasattr(given, "tolist") else given
    try:
        return [operator.index(number) for number in (plain if isinstance(plain, Iterable) else [plain])]
    except TypeError as error:
        raise InputError(f"{name}={given!r}: give a whole number, or a list of them.") from error


def require_count(name: str, given: Any, *, least: int = 1) -> int:
    """A whole number that is not too small.

    Raises:
        InputError: it is too small, or no whole number.
    """
    count = as_integers(name, given)
    if len(count) != 1 or count[0] < least:
        raise InputError(f"{name}={given!r} must be at least {least}.")
    return count[0]


def require_pairs(what: str, given: Any) -> PairSet:
    """The pairs that a function takes; at least one.

    Args:
        what: the function, for the message.

    Raises:
        InputError: another kind of object (the arguments may be swapped), or no pair.
    """
    if not isinstance(given, PairSet):
        raise InputError(
            f"{what} takes a PairSet, got {type(given).__name__}; load_pairs(...) makes one from a list or a file."
        )
    if not given:
        raise InputError(f"{given.name!r} holds no pairs; {what} needs at least one.")
    return given


def require_options(what: str, given: Iterable[str], *takers: Callable[..., Any], but: Iterable[str] = ()) -> None:
    """Refuses names of options that none of the functions takes which they are handed on to.

    Args:
        what: the function that was called, for the message.
        given: the names.
        takers: functions whose keyword arguments are allowed.
        but: keyword arguments of theirs that are not the user's to give.

    Raises:
        InputError: names the option and the one that is nearest in spelling.
    """
    known = {
        name
        for taker in takers
        for name, parameter in inspect.signature(taker).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in but
    }
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}=?" if near else f"allowed are {', '.join(sorted(known))}."
            raise InputError(f"{what} has no option {name}=; {hint}")
