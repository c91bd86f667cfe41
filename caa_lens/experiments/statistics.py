"""Uncertainty of means over items: seeded percentile bootstrap, by strata where a score is balanced over them.

An interval speaks of other items of the same kind, not of other models, prompts or training pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

N_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean with its bootstrap interval and the number of items."""

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
) -> Estimate:
    """Mean over items, or the mean over strata of the means within them, with a percentile interval.

    Args:
        values: one number an item.
        strata: each item's stratum (its answer key); resampled within, and weighted equally.
        level: of the interval.
        seed: of the resampling; items in the same order give the same interval.

    Returns:
        The estimate; NaN where there are no items.
    """
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan, 0)
    rng = np.random.default_rng(seed)
    labels = np.asarray(["all"] * len(values) if strata is None else list(strata), dtype=object)
    groups = [values[labels == label] for label in dict.fromkeys(labels.tolist())]
    means = np.mean([group[rng.integers(0, len(group), (N_RESAMPLES, len(group)))].mean(1) for group in groups], axis=0)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(np.mean([group.mean() for group in groups])), float(low), float(high), len(values))


class Change(NamedTuple):
    """A mean paired difference with its bootstrap interval, a two-sided p-value and the number of items."""

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
    the observed pattern as one of the random ones, so that p is never 0.

    Args:
        before, after: the same items in the same order.
        level: of the interval.
        seed: of the resampling and of the signs.
    """
    differences = np.asarray(after, float) - np.asarray(before, float)
    estimate = bootstrap_mean(differences, level=level, seed=seed)
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
