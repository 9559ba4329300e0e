"""From repeats to a number: the median that was measured, and the interval in which a rerun's median falls.

No distribution is assumed. The interval lies between two of the repeats, and its coverage follows from counting: if
nothing about the machine changes, every order of the old and the new repeats is equally likely.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import TypeVar

T = TypeVar("T")
COVERAGE = 0.9  # asked for; five repeats reach 83 %, seven 93 %


@dataclass(frozen=True)
class Estimate:
    """The median of `repeats` values, and the interval that holds the median of as many new ones.

    `coverage` is the probability that it does, exact for a machine whose state does not change between the two runs.
    Another load, a warmer chip or another tenant is outside of it.
    """

    median: float
    low: float
    high: float
    coverage: float
    repeats: int


def estimate(values: Sequence[float]) -> Estimate:
    """Summarise repeats of one measurement.

    The median of an even number is the lower of the two in the middle, so that it is a value that was measured. The
    interval is the narrowest symmetric pair of order statistics that covers `COVERAGE`, or the whole range.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("an estimate needs at least one repeat")
    ordered, n = sorted(values), len(values)
    inner = [i for i in range(1, (n + 1) // 2 + 1) if rerun_coverage(n, i, n + 1 - i) >= COVERAGE]
    first = inner[-1] if inner else 1
    last = n + 1 - first
    return Estimate(
        median=ordered[(n - 1) // 2],
        low=ordered[first - 1],
        high=ordered[last - 1],
        coverage=rerun_coverage(n, first, last),
        repeats=n,
    )


def rerun_coverage(n: int, first: int, last: int) -> float:
    """Probability that the (lower) median of n new repeats lies between the first-th and last-th of n old ones.

    Ranks count from 1. With k the median's rank, exactly s old repeats lie below it in
    C(k - 1 + s, s) C(2 n - k - s, n - s) of the C(2 n, n) equally likely orders.
    """
    k = (n + 1) // 2
    inside = sum(comb(k - 1 + s, s) * comb(2 * n - k - s, n - s) for s in range(first, last))
    return inside / comb(2 * n, n)


def differences(left: Sequence[float], right: Sequence[float]) -> tuple[float, ...]:
    """left - right of each round: what both had in common in that round (the machine's load) cancels."""
    return tuple(a - b for a, b in zip(left, right, strict=True))


def turns(members: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Each of the members once a round, with the round's number from 0: a slow minute meets all alike. Every other
    round goes backwards, so that what one leaves to the next (a warm chip, a full cache) is not always the same one's.
    """
    for turn in range(rounds):
        for member in members if turn % 2 == 0 else reversed(members):
            yield turn, member


def ratios(over: Sequence[float], under: Sequence[float]) -> Estimate:
    """over / under of each round, summarised."""
    return estimate([a / b for a, b in zip(over, under, strict=True)])
