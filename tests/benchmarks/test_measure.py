"""Medians and rerun intervals against counting by hand and by drawing."""

from itertools import combinations

import numpy as np
import pytest

from benchmarks.measure import differences, estimate, ratios, rerun_coverage, turns


def counted_coverage(n, first, last):
    """The same probability by going through all orders of n old and n new repeats."""
    k, inside, orders = (n + 1) // 2, 0, 0
    for old in combinations(range(2 * n), n):
        new = [place for place in range(2 * n) if place not in old]
        inside += old[first - 1] < new[k - 1] < old[last - 1]
        orders += 1
    return inside / orders


@pytest.mark.parametrize(("n", "first", "last"), [(1, 1, 1), (3, 1, 3), (4, 1, 4), (5, 1, 5), (5, 2, 4), (7, 1, 7)])
def test_coverage_is_the_share_of_all_orders(n, first, last):
    assert rerun_coverage(n, first, last) == pytest.approx(counted_coverage(n, first, last), abs=1e-12)


def test_the_interval_covers_reruns_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered, stated = [], set()
    for _ in range(2000):
        runs = rng.lognormal(sigma=0.3, size=(2, 7)) + rng.exponential(size=(2, 7))  # skewed, as timings are
        old, new = map(estimate, runs.tolist())
        covered.append(old.low <= new.median <= old.high)
        stated.add(old.coverage)
    (coverage,) = stated
    assert coverage == pytest.approx(1 - 2 * 120 / 3432)  # C(10, 3) of C(14, 7) orders on either side
    assert np.mean(covered) == pytest.approx(coverage, abs=0.02)


def test_the_interval_narrows_where_there_are_enough_repeats():
    e = estimate([5.0, 1.0, 4.0, 2.0, 3.0, 10.0, 7.0, 6.0, 9.0, 8.0])
    assert (e.low, e.median, e.high) == (2.0, 5.0, 9.0)
    assert e.coverage >= 0.9


def test_the_median_is_a_value_that_was_measured():
    assert estimate([1.0, 2.0]).median == 1.0
    assert estimate([3.0, 1.0, 2.0]).median == 2.0
    e = estimate([4.0])
    assert (e.low, e.median, e.high, e.coverage) == (4.0, 4.0, 4.0, 0.0)


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_differences_are_of_the_same_round():
    assert differences([3.0, 5.0], [1.0, 1.0]) == (2.0, 4.0)
    with pytest.raises(ValueError, match="longer"):
        differences([1.0], [1.0, 2.0])


def test_every_other_round_goes_backwards():
    assert list(turns("ab", 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_ratios_are_of_the_same_round():
    found = ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)
