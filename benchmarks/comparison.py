"""What changed between two results beyond noise: the ratio of two sets of repeats, with its confidence interval.

The interval is the one that belongs to the rank-sum test of Mann, Whitney and Wilcoxon, on logarithms (Hodges and
Lehmann 1963): no distribution is assumed, and for a handful of repeats it is exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, exp, inf, log
from statistics import median
from typing import Any, Literal

from benchmarks import gpu
from benchmarks.environment import busy
from benchmarks.results import Better, Measurement, Result

CONFIDENCE = 0.95  # asked for; four repeats against four reach it, three against three reach 90 %
Verdict = Literal["better", "worse", "no change shown", "not judged: one repeat", "not judged: no ratio"]
# Of the environment, what speed depends on; the commit is what a comparison is about.
ALIKE = ("cpu", "cores", "memory_gb", "gpu", "driver", "cuda", "os", "python", "versions", "torch_threads")


@dataclass(frozen=True)
class Ratio:
    """New over old: the Hodges-Lehmann estimate, and an interval that holds the true ratio with `confidence`."""

    value: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Change:
    """One measurement in two results."""

    old: Measurement
    new: Measurement
    ratio: Ratio | None  # None: a value is not above 0, or not finite
    verdict: Verdict


def ratio(old: Sequence[float], new: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """Ratio of two independent sets of positive repeats.

    Raises:
        ValueError: a set is empty, or a value is not above 0.
    """
    if not old or not new or min(*old, *new) <= 0:
        raise ValueError("a ratio needs repeats that are above 0")
    logs = sorted(log(b) - log(a) for a in old for b in new)
    rank, reached = _rank(len(old), len(new), confidence)
    return Ratio(exp(median(logs)), exp(logs[rank - 1]), exp(logs[-rank]), reached)


def _rank(m: int, n: int, confidence: float) -> tuple[int, float]:
    """Which of the m x n sorted differences bounds the interval from below, from 1, and the confidence that it reaches.

    With the smallest sets even the outermost differences reach less than was asked for.
    """
    total, counts = comb(m + n, m), rank_sum_counts(m, n)
    rank, below = 1, counts[0]
    while rank < len(counts) // 2 and 1 - 2 * (below + counts[rank]) / total >= confidence:
        below += counts[rank]
        rank += 1
    return rank, 1 - 2 * below / total


def rank_sum_counts(m: int, n: int) -> list[int]:
    """In how many of the C(m + n, m) orders of m old and n new values exactly u pairs are inverted, for u = 0 … m n.

    The coefficients of the Gaussian binomial, built factor by factor.
    """
    counts = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(n + i, m * n + 1)[::-1]:
            counts[u] -= counts[u - n - i]
        for u in range(i, m * n + 1):
            counts[u] += counts[u - i]
    return counts


def compare(old: Result, new: Result) -> list[Change]:
    """Every measurement that both have and that can be better or worse, in the new one's order."""
    before = {m.key: m for m in old.measurements}
    return [_change(before[m.key], m) for m in new.measurements if m.key in before and m.better != "neither"]


def lost_and_found(old: Result, new: Result) -> tuple[list[str], list[str]]:
    """What only the old and what only the new one has measured: a row of a table each."""
    rows = [list(dict.fromkeys(f"{m.group}: {m.name}" for m in result.measurements)) for result in (old, new)]
    return [row for row in rows[0] if row not in rows[1]], [row for row in rows[1] if row not in rows[0]]


def _change(old: Measurement, new: Measurement) -> Change:
    if not all(0 < value < inf for value in (*old.values, *new.values)):  # a difference of two runs, or gone astray
        return Change(old, new, None, "not judged: no ratio")
    r = ratio(old.values, new.values)
    single = min(len(old.values), len(new.values)) < 2
    return Change(old, new, r, "not judged: one repeat" if single else _verdict(r, new.better))


def _verdict(r: Ratio, better: Better) -> Verdict:
    if r.low <= 1 <= r.high:
        return "no change shown"
    return "better" if (r.value > 1) == (better == "higher") else "worse"


def unlike(old: Result, new: Result) -> list[str]:
    """What else differs between the two, and makes a comparison say less."""
    reasons = [
        f"{what}: {a} and {b}"
        for what, a, b in (
            ("benchmark", old.benchmark, new.benchmark),
            ("subject", old.subject, new.subject),
        )
        if a != b
    ]
    reasons += _differing(old.environment, new.environment, ALIKE)
    reasons += _differing(old.choices, new.choices, sorted(old.choices.keys() | new.choices.keys()))
    for age, r in (("old", old), ("new", new)):
        if busy(r.environment):
            reasons.append(f"{age} one: {busy(r.environment)}")
        if r.environment["dirty"]:
            reasons.append(f"{age} one: the code was not that of its commit")
        if r.gpu.get("throttled") or r.gpu.get("other_processes"):
            reasons.append(f"{age} one: {gpu.sentence(r.gpu)}")
    return reasons


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"{key}: {old.get(key)} and {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
