"""Whether an interval held the next run, and what the command makes of it."""

import re

import numpy as np
import pytest

from benchmarks import coverage
from benchmarks.coverage import covered
from benchmarks.measure import Estimate, estimate


def run(low, median, high):
    return Estimate(median, low, high, 0.93, 7)


def test_each_interval_is_judged_by_the_run_after_it():
    runs = [run(1, 2, 3), run(2.5, 3, 3.5), run(1, 2, 3), run(0, 9, 9)]
    assert covered(runs) == [True, False, False]
    assert covered(runs[:1]) == []


@pytest.mark.parametrize(("misses", "code"), [(1, 0), (4, 1)])
def test_more_misses_than_chance_gives_are_told(misses, code, capsys):
    # A run that jumps away is missed by the interval before it, and its own, which is wide, holds the next.
    runs = [run(1.0, 2, 3) for _ in range(13)]
    for i in range(misses):
        runs[1 + 3 * i] = run(0, 5, 10)
    assert coverage._report({"a": runs}, "") == code
    assert f"{12 - misses} of 12 intervals" in capsys.readouterr().out


@pytest.mark.parametrize(("repeats", "stated"), [(3, 0.6), (7, 0.93)])
def test_a_steady_machine_is_seldom_accused(repeats, stated):
    enough, judged = coverage.least(repeats, 11, 2), 20
    assert 0.4 * stated * judged < enough < stated * judged
    rng = np.random.default_rng(1)
    series = rng.normal(size=(400, 2, 11, repeats))
    hits = [sum(sum(covered([estimate(row.tolist()) for row in each])) for each in trial) for trial in series]
    assert np.mean(hits) / judged == pytest.approx(stated, abs=0.02)
    assert np.mean(np.array(hits) < enough) < 0.04


def test_the_command_measures_and_judges(tree, capsys):
    small = ["--device", "cpu", "--workers", "1", "--batch-size", "2", "--image-size", "32"]
    few = ["--rounds", "1", "--reruns", "1", "--seconds", "0.01", "--data", str(tree)]
    assert coverage.main([*small, *few]) in (0, 1)
    assert re.search(r"\d of 2 intervals .* stated: \d+ %", capsys.readouterr().out)


def test_wrong_use_is_one_line(capsys):
    assert coverage.main(["--reruns", "0", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
