"""Intervals cover what they say, whatever the numbers of items; what cannot be told is not."""

import math

import numpy as np
import pytest

from caa_lens.experiments.statistics import bootstrap_mean, paired_change, slopes


def coverage(counts, draw, truth=0.0, runs=300):
    """The share of intervals, of items with these numbers of each key, that hold the truth."""
    keys = [key for key, count in counts.items() for _ in range(count)]
    found = [bootstrap_mean(draw(keys), keys, seed=seed) for seed in range(runs)]
    return np.mean([estimate.low <= truth <= estimate.high for estimate in found])


@pytest.mark.parametrize(
    "counts",
    [
        {"A": 40},
        {"A": 25, "B": 25},
        {"A": 5, "B": 5},
        {"A": 2, "B": 2},
        {"A": 29, "B": 1},
        {"A": 32, "B": 14, "C": 3, "E": 1},
        {"A": 24, "B": 22, "C": 2, "E": 2},
    ],
    ids=str,
)
def test_intervals_cover_whatever_the_numbers_of_items(counts):
    rng = np.random.default_rng(0)
    assert 0.9 <= coverage(counts, lambda keys: rng.normal(0, 1, len(keys))) <= 0.985


def test_strata_count_equally_and_have_spreads_of_their_own():
    rng = np.random.default_rng(0)

    def draw(keys):
        return np.array([rng.normal(0, 1) if key == "A" else rng.normal(4, 2) for key in keys])

    assert 0.9 <= coverage({"A": 30, "B": 10}, draw, truth=2.0) <= 0.985
    values = np.array([1.0] * 10 + [0.0] * 5)
    assert bootstrap_mean(values, ["A"] * 10 + ["B"] * 5).value == 0.5


def test_small_strata_are_taken_together():
    keys = ["A"] * 8 + ["B"] * 6 + ["C"] * 3 + ["D"] * 2
    values = np.arange(19.0)
    assert bootstrap_mean(values, keys).value == np.mean([values[:8].mean(), values[8:14].mean(), values[14:].mean()])
    assert bootstrap_mean(values[:17], keys[:17]).value == np.mean([values[:8].mean(), values[8:17].mean()])
    assert bootstrap_mean(values[:3], ["A", "B", "B"]).value == 1.0


def test_the_same_items_give_the_same_interval_which_ends_at_its_bounds():
    values = np.array([1.0, 1.0, 1.0, 0.0])
    free = bootstrap_mean(values, seed=1)
    assert free == bootstrap_mean(values, seed=1)
    assert free.high > 1
    assert bootstrap_mean(values, seed=1, bounds=(0.0, 1.0)) == free._replace(low=max(free.low, 0.0), high=1.0)


def test_one_item_has_no_interval():
    one = bootstrap_mean(np.array([2.0]), ["A"])
    assert (one.value, one.n) == (2.0, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    change = paired_change(np.array([1.0]), np.array([2.0]))
    assert (change.value, change.p_value) == (1.0, 1.0)
    assert math.isnan(change.low)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_propagate(broken):
    values = np.array([1.0, broken, 3.0])
    assert all(map(math.isnan, bootstrap_mean(values)[:3]))
    assert bootstrap_mean(values).n == 3
    for before, after in ((values, np.ones(3)), (np.ones(3), values), (values, values)):
        assert all(map(math.isnan, paired_change(before, after)[:4]))


def test_slopes_find_anti_steerable_items():
    multipliers = np.array([-1.0, 0.0, 1.0])
    truth = np.array([0.5, -0.25, 0.0])
    values = 3 + multipliers[:, None] * truth
    np.testing.assert_allclose(slopes(multipliers, values), truth)
