"""Comparing two runs: exact counts of the rank-sum statistic, and verdicts on distributions whose ratio is known."""

from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest

from benchmarks.comparison import compare, rank_sum_counts, ratio, unlike


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3), (3, 3), (4, 5), (3, 7)])
def test_rank_sum_counts_are_those_of_all_orders(m, n):
    counts = [0] * (m * n + 1)
    for old in combinations(range(m + n), m):
        new = [place for place in range(m + n) if place not in old]
        counts[sum(a > b for a in old for b in new)] += 1
    assert rank_sum_counts(m, n) == counts
    assert sum(counts) == comb(m + n, m)


def test_small_sets_say_which_confidence_they_reach():
    three = ratio([1.0, 1.1, 1.2], [2.0, 2.1, 2.2])
    assert three.confidence == pytest.approx(1 - 2 / 20)
    assert three.low == pytest.approx(2.0 / 1.2)
    assert three.high == pytest.approx(2.2 / 1.0)
    # Seven against seven: critical value 8 of the two-sided test at 5 %, in every table.
    assert ratio(range(1, 8), range(1, 8)).confidence == pytest.approx(1 - 2 * sum(rank_sum_counts(7, 7)[:9]) / 3432)


@pytest.mark.parametrize("true", [1.0, 1.3])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(true):
    rng = np.random.default_rng(1)
    held, found = [], []
    for _ in range(600):
        old, new = rng.gamma(20, 1 / 20, 7), true * rng.gamma(20, 1 / 20, 7)
        r = ratio(old.tolist(), new.tolist())
        held.append(r.low <= true <= r.high)
        found.append(r.value)
    assert np.mean(held) == pytest.approx(r.confidence, abs=0.03)
    assert np.median(found) == pytest.approx(true, rel=0.03)


def test_a_faster_loader_is_better_and_a_slower_one_worse(result):
    verdicts = {c.new.quantity: c.verdict for c in compare(result(rate=100.0), result(rate=150.0))}
    assert verdicts == {"images/s": "better", "CPU-ms/image": "no change shown"}
    assert compare(result(rate=150.0), result(rate=100.0))[0].verdict == "worse"


def test_less_is_better_where_it_says_so(result):
    old = result()
    costs = replace(old.measurements[1], values=(1.0, 1.1, 1.2))
    change = compare(old, replace(old, measurements=(costs,)))[0]
    assert change.verdict == "better"
    assert change.ratio.high < 1


def test_single_repeats_and_differences_are_not_compared(result):
    assert [c.new.name for c in compare(result(), result())] == ["ours", "ours"]


def test_ratio_refuses_what_has_no_logarithm():
    with pytest.raises(ValueError, match="above 0"):
        ratio([1.0, 0.0], [1.0])


def test_what_is_not_alike_is_said(result):
    assert unlike(result(), result()) == []
    assert unlike(result(), result(hardware="H200")) == ["hardware: cpu 2 cores and H200"]
    assert unlike(result(), result(quick=True)) == ["quick: False and True"]
