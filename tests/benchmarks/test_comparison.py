"""Comparing two runs: exact counts of the rank-sum statistic, and verdicts on distributions whose ratio is known."""

from dataclasses import replace
from itertools import combinations
from math import comb, inf, nan

import numpy as np
import pytest

from benchmarks.comparison import compare, lost_and_found, rank_sum_counts, ratio, unlike


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
    changes = compare(result(rate=100.0), result(rate=150.0))
    verdicts = {c.new.quantity: c.verdict for c in changes if c.new.name == "ours"}
    assert verdicts == {"images/s": "better", "CPU-ms/image": "no change shown"}
    assert compare(result(rate=150.0), result(rate=100.0))[0].verdict == "worse"


def test_less_is_better_where_it_says_so(result):
    old = result()
    costs = replace(old.measurements[1], values=(1.0, 1.1, 1.2))
    change = compare(old, replace(old, measurements=(costs,)))[0]
    assert change.verdict == "better"
    assert change.ratio is not None
    assert change.ratio.high < 1


def test_single_repeats_and_differences_are_shown_and_not_judged(result):
    made = result()
    single, gap = replace(made.measurements[2], values=(1.0,)), replace(made.measurements[1], values=(-0.1, 0.2, 0.1))
    old, new = (replace(made, measurements=(replace(single, values=(value,)), gap)) for value in (1.0, 9.0))
    by_one, by_difference = compare(old, new)
    assert by_one.verdict == "not judged: one repeat"
    assert by_one.ratio is not None
    assert by_one.ratio.value == pytest.approx(9)
    assert by_difference.verdict == "not judged: no ratio"
    assert by_difference.ratio is None


@pytest.mark.parametrize("astray", [nan, inf])
def test_what_is_not_finite_is_not_judged(astray, result):
    old = result()
    new = replace(old, measurements=(replace(old.measurements[0], values=(1.0, astray, 2.0)),))
    assert [change.verdict for change in compare(old, new)] == ["not judged: no ratio"]


def test_rows_of_one_only_are_named(result):
    made = result()
    assert lost_and_found(made, made) == ([], [])
    without = replace(made, measurements=made.measurements[:2])
    assert lost_and_found(made, without) == (["loader: theirs <&|>"], [])
    assert lost_and_found(without, made) == ([], ["loader: theirs <&|>"])


def test_ratio_refuses_what_has_no_logarithm():
    with pytest.raises(ValueError, match="above 0"):
        ratio([1.0, 0.0], [1.0])


def test_what_is_not_alike_is_said(result):
    assert unlike(result(), result()) == []
    assert unlike(result(), result(quick=True)) == ["quick: False and True"]


@pytest.mark.parametrize(
    ("fact", "value", "said"),
    [
        ("cpu", "Other", "cpu: Some CPU and Other"),
        ("cores", 64, "cores: 2 and 64"),
        ("versions", {"torch": "3"}, "versions: "),
        ("torch_threads", 1, "torch_threads: 2 and 1"),
        ("dirty", True, "new one: the code was not that of its commit"),
        ("busy_cores", 1.5, "new one: The machine was busy"),
    ],
)
def test_so_is_another_machine(fact, value, said, result):
    old, new = result(), result()
    (reason,) = unlike(old, replace(new, environment={**new.environment, fact: value}))
    assert reason.startswith(said)


def test_so_is_a_card_that_was_held_back(result):
    gpu = {"available": True, "mean": {"power_watts": 700.0}, "throttled": ["power cap"], "other_processes": 0}
    (reason,) = unlike(result(), replace(result(), gpu=gpu))
    assert "held back by: power cap" in reason
