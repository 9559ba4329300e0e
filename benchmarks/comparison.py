"""What changed between two results beyond noise: the ratio of two sets of repeats, with its confidence interval.

The interval is the one that belongs to the rank-sum test of Mann, Whitney and Wilcoxon, on logarithms (Hodges and
Lehmann 1963): no distribution is assumed, and for a handful of repeats it is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, exp, log
from statistics import median
from typing import Literal

from benchmarks.environment import busy
from benchmarks.results import Better, Measurement, Result

CONFIDENCE = 0.95  # asked for; four repeats against four reach it, three against three reach 90 %
Verdict = Literal["better", "worse", "no change shown"]


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
    ratio: Ratio
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
    """Every measurement that both have more than once and whose values are positive, in the new one's order."""
    before = {m.key: m for m in old.measurements}
    changes = []
    for m in new.measurements:
        other = before.get(m.key)
        if other is None or m.better == "neither" or min(len(m.values), len(other.values)) < 2:
            continue
        if min(*m.values, *other.values) > 0:
            r = ratio(other.values, m.values)
            changes.append(Change(other, m, r, _verdict(r, m.better)))
    return changes


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
            ("hardware", old.environment["hardware"], new.environment["hardware"]),
        )
        if a != b
    ]
    keys = sorted(old.configuration.keys() | new.configuration.keys())
    reasons += [
        f"{key}: {old.configuration.get(key)} and {new.configuration.get(key)}"
        for key in keys
        if key not in ("matmul", "gflop_per_image") and old.configuration.get(key) != new.configuration.get(key)
    ]
    reasons += [f"{age} one: {busy(r.environment)}" for age, r in (("old", old), ("new", new)) if busy(r.environment)]
    return reasons
