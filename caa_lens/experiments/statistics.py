"""Uncertainty of means over items: seeded percentile bootstrap, by strata where a score is balanced over them.

    estimate    = mean over strata g of mean(x_g)
    resample    = estimate + mean over g of d_g sqrt(n_g / (n_g - 1)) / sqrt(c_g),    c_g ~ chi2(n_g - 1) / (n_g - 1)
    interval    = quantiles of the resamples

d_g is the mean of n_g items drawn with replacement from the n_g of stratum g, minus their own mean: its variance is too small by
(n_g - 1) / n_g, and is itself an estimate, of which c_g is the uncertainty. For normal items that is Student's interval in one
stratum, and Behrens and Fisher's in several; for many items both factors are 1. Strata of fewer than five items are not left alone
(see `bootstrap_mean`).

An interval speaks of other items of the same kind, not of other models, prompts or training pairs. One item has none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

N_RESAMPLES = 2000
SMALLEST_STRATUM = 5
"""Items that a stratum needs to be weighted by itself."""


class Estimate(NamedTuple):
    """A mean with its bootstrap interval (NaN where there is none) and the number of items."""

    value: float
    low: float
    high: float
    n: int


def bootstrap_mean(
    values: Float[np.ndarray, " item"],
    strata: Sequence[Any] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Mean over items, or the mean over strata of the means within them, with a percentile interval.

    Args:
        values: one number an item.
        strata: each item's stratum (its answer key); resampled within, and weighted equally. Strata of fewer than five items
            are taken together as one; if that still has fewer, together with the smallest of the others.
        level: of the interval.
        seed: of the resampling; items in the same order give the same interval.
        bounds: the least and the largest value that there can be; the interval ends there.

    Returns:
        The estimate; NaN where there are no items, or one that is not finite. Its bounds are NaN for a single item.
    """
    if not len(values) or not np.isfinite(values).all():
        return Estimate(np.nan, np.nan, np.nan, len(values))
    groups = [values[places] for places in _places(["all"] * len(values) if strata is None else strata)]
    value = float(np.mean([group.mean() for group in groups]))
    if len(values) < 2:
        return Estimate(value, np.nan, np.nan, len(values))
    rng = np.random.default_rng(seed)
    resampled = value + np.mean([_deviations(group, rng) for group in groups], axis=0)
    tail = (1 - level) / 2
    low, high = np.clip(np.quantile(resampled, [tail, 1 - tail]), *bounds)
    return Estimate(value, float(low), float(high), len(values))


def _places(strata: Sequence[Any]) -> list[list[int]]:
    """The places of each stratum's items, small strata taken together."""
    sizes = Counter(strata)
    small = {label for label, size in sizes.items() if size < SMALLEST_STRATUM}
    large = [label for label in sizes if label not in small]
    if large and 0 < sum(sizes[label] for label in small) < SMALLEST_STRATUM:
        small.add(min(large, key=sizes.__getitem__))
    found: dict[Any, list[int]] = {}
    for place, label in enumerate(strata):
        found.setdefault(("small",) if label in small else label, []).append(place)
    return list(found.values())


def _deviations(group: Float[np.ndarray, " item"], rng: np.random.Generator) -> Float[np.ndarray, " resample"]:
    """Resampled means of a stratum minus its mean, at the size that so few items call for."""
    n = len(group)
    deviations = group[rng.integers(0, n, (N_RESAMPLES, n))].mean(1) - group.mean()
    return deviations * np.sqrt(n / (n - 1)) / np.sqrt(rng.chisquare(n - 1, N_RESAMPLES) / (n - 1))


def where_defined(holds: Bool[np.ndarray, " item"], value: Float[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
    """1 or 0 for whether something holds of each value, NaN where the value is."""
    return np.where(np.isnan(value), np.nan, holds)


def why_undecided(value: float, low: float) -> str:
    """Why an estimate with this interval decides nothing, in words; empty where it may."""
    if not math.isfinite(value):
        return "NOT MEASURABLE: the model gave values that are not finite."
    return "" if math.isfinite(low) else "TOO FEW: one item cannot tell."


def bracket(low: float, high: float) -> str:
    """An interval as text, to three decimals."""
    return f"[{low:+.3f}, {high:+.3f}]" if math.isfinite(low) else "[no interval]"


class Change(NamedTuple):
    """A mean paired difference with its bootstrap interval, a two-sided p-value and the number of items; see `Estimate`."""

    value: float
    low: float
    high: float
    p_value: float
    n: int


def paired_change(
    before: Float[np.ndarray, " item"], after: Float[np.ndarray, " item"], *, level: float = 0.95, seed: int = 0
) -> Change:
    """Mean over items of after minus before, with a paired bootstrap interval and a sign-flip permutation test.

        p = share of random sign patterns s with |sum s_i d_i| >= |sum d_i|,   d = after - before

    The test is exact under the hypothesis that each item's difference is as likely to be the other way round, and counts
    the observed pattern as one of the random ones, so that p is never 0. It is NaN where a value is not finite.

    Args:
        before, after: the same items in the same order.
        level: of the interval.
        seed: of the resampling and of the signs.
    """
    with np.errstate(invalid="ignore"):
        differences = np.asarray(after, float) - np.asarray(before, float)
    estimate = bootstrap_mean(differences, level=level, seed=seed)
    if not math.isfinite(estimate.value):
        return Change(np.nan, np.nan, np.nan, np.nan, estimate.n)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (N_RESAMPLES, len(differences)))
    # Differences that are equal up to rounding are ties, which count.
    observed = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    as_large = int((np.abs(signs @ differences) >= observed).sum())
    return Change(estimate.value, estimate.low, estimate.high, (1 + as_large) / (1 + N_RESAMPLES), len(differences))


def slopes(
    multipliers: Float[np.ndarray, " multiplier"], values: Float[np.ndarray, "multiplier item"]
) -> Float[np.ndarray, " item"]:
    """Least-squares slope of each item's value against the multiplier; a negative one is anti-steerable."""
    centred = multipliers - multipliers.mean()
    with np.errstate(invalid="ignore"):
        return (centred[:, None] * values).sum(0) / (centred**2).sum()


def interval_alpha(units: Sequence[Float[np.ndarray, " _"]]) -> float:
    """Krippendorff's alpha for interval data: how far ratings of the same unit agree, beyond chance.

        alpha = 1 - D_o / D_e
        D_o = 1/n sum over units of m_u Var(ratings of u),   D_e = Var(all ratings)      (variances with m - 1)

    Args:
        units: the ratings of each unit, m_u of them; units with fewer than two do not count.

    Returns:
        1 for full agreement, 0 for what chance gives; NaN where all ratings are equal, or there are none.

    Source: Krippendorff, "Computing Krippendorff's alpha-reliability" (2011).
    """
    paired = [np.asarray(unit, float) for unit in units if len(unit) > 1]
    ratings = np.concatenate(paired) if paired else np.zeros(0)
    if not len(ratings) or not (expected := ratings.var(ddof=1)):
        return float("nan")
    observed = sum(len(unit) * unit.var(ddof=1) for unit in paired) / len(ratings)
    return float(1 - observed / expected)
