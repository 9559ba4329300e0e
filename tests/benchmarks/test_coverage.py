"""Whether an interval held the next run, and what the command makes of it."""

import re

import pytest

from benchmarks import coverage
from benchmarks.coverage import covered
from benchmarks.measure import Estimate


def run(low, median, high):
    return Estimate(median, low, high, 0.93, 7)


def test_each_interval_is_judged_by_the_run_after_it():
    runs = [run(1, 2, 3), run(2.5, 3, 3.5), run(1, 2, 3), run(0, 9, 9)]
    assert covered(runs) == [True, False, False]
    assert covered(runs[:1]) == []


@pytest.mark.parametrize(("misses", "code"), [(1, 0), (2, 1)])
def test_nine_of_ten_are_enough(misses, code, capsys):
    # A run that jumps away is missed by the interval before it, and its own, which is wide, holds the next.
    runs = [run(1.0, 2, 3) for _ in range(11)]
    for i in range(misses):
        runs[2 + 3 * i] = run(0, 5, 10)
    assert coverage._report({"a": runs}, "") == code
    assert f"{10 - misses} of 10 intervals" in capsys.readouterr().out


def test_the_command_measures_and_judges(tree, capsys):
    small = ["--device", "cpu", "--workers", "1", "--batch-size", "2", "--image-size", "32"]
    few = ["--rounds", "1", "--reruns", "1", "--seconds", "0.01", "--data", str(tree)]
    assert coverage.main([*small, *few]) in (0, 1)
    assert re.search(r"\d of 2 intervals .* stated: \d+ %", capsys.readouterr().out)


def test_wrong_use_is_one_line(capsys):
    assert coverage.main(["--reruns", "0", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
