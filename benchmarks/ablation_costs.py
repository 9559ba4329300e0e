"""From runs of variants to what each augmentation costs, and whether the parts make the whole."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from benchmarks.ablation_variants import ALL, NONE
from benchmarks.measure import Estimate, differences, estimate
from benchmarks.results import Measurement
from benchmarks.tables import number, spread
from benchmarks.throughput import RATE

WALL = "ms/image"
LEFT_OUT, ALONE = "saved by leaving it out", "added to the crops"
Runs = Mapping[tuple[str, str], Measurement]  # by variant and quantity


def in_milliseconds(taken: Sequence[Measurement]) -> dict[tuple[str, str], Measurement]:
    """By variant and quantity, with times instead of rates, since times of parts add up."""
    runs = {}
    for m in taken:
        if m.quantity == RATE:
            m = Measurement(m.group, m.name, WALL, tuple(1000 / rate for rate in m.values), "lower")
        runs[m.name, m.quantity] = replace(m, detail=m.name not in (ALL, NONE))
    return runs


def costs(group: str, runs: Runs, quantities: Sequence[str], step: float | None, headline: bool) -> list[Measurement]:
    """Rows by augmentation: differences within each round, of each quantity both ways, and shares of a step.

    Args:
        group: of the runs; the costs are the group "`group`: costs".
        runs: what was measured.
        quantities: whose differences are wanted; the first one is that of `step`.
        step: milliseconds an image of a training step, which the shares are of.
        headline: whether the first quantity belongs into the README.
    """
    found: list[Measurement] = []
    for quantity in quantities:
        for how, augmentation, cost in _differences(runs, quantity):
            show = headline and quantity == quantities[0] and how == LEFT_OUT
            found.append(Measurement(f"{group}: costs", augmentation, f"{quantity} {how}", cost, "lower", show))
            if step and quantity == quantities[0] and how == LEFT_OUT:
                share = tuple(100 * value / step for value in cost)
                found.append(Measurement(f"{group}: costs", augmentation, "% of a step", share, "neither"))
    return found


def _differences(runs: Runs, quantity: str) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    for (name, q), m in runs.items():
        kind, _, augmentation = name.partition(" ")
        if q == quantity and kind == "without":
            yield LEFT_OUT, augmentation, differences(runs[ALL, q].values, m.values)
        elif q == quantity and kind == "only":
            yield ALONE, augmentation, differences(m.values, runs[NONE, q].values)


def explanation(group: str, runs: Runs, quantity: str) -> str:
    """Whether the crops and the parts make the whole, counted both ways, and which parts do not agree with themselves.

    What the parts leave of the whole is taken round by round, and so has an interval. Where it is not nothing, the
    augmentations whose cost among the others is not their cost alone are named, with both.
    """
    whole, crops = runs[ALL, quantity].values, runs[NONE, quantity].values
    parts: dict[str, dict[str, tuple[float, ...]]] = {LEFT_OUT: {}, ALONE: {}}
    for how, augmentation, cost in _differences(runs, quantity):
        parts[how][augmentation] = cost
    base = number(estimate(crops).median)
    sentences = [f"{group}: all on is {number(estimate(whole).median)} {quantity}, the crops are {base}."]
    exact = True
    for how, members in parts.items():
        rest = estimate([a - c - sum(p) for a, c, *p in zip(whole, crops, *members.values(), strict=True)])
        exact &= rest.low <= 0 <= rest.high
        sentences.append(f"The crops and what each is {how} leave {spread(rest)} of all on: {_verdict(rest)}.")
    if not exact:
        sentences.append(_where(parts))
    return " ".join(sentences)


def _verdict(rest: Estimate) -> str:
    if rest.low <= 0 <= rest.high:
        return "nothing, within the spread"
    return f"together they cost {'more' if rest.median > 0 else 'less'} than by this count"


def _where(parts: Mapping[str, Mapping[str, tuple[float, ...]]]) -> str:
    """The augmentations whose two costs differ beyond the spread: there the rest comes from."""
    named = []
    for augmentation, among in parts[LEFT_OUT].items():
        by_itself = parts[ALONE][augmentation]
        gap = estimate(differences(among, by_itself))
        if not gap.low <= 0 <= gap.high:
            medians = number(estimate(among).median), number(estimate(by_itself).median)
            named.append(f"{augmentation} ({medians[0]} among the others, {medians[1]} alone)")
    if not named:
        return "No single augmentation explains it: each costs among the others what it costs alone, within the spread."
    return f"What differs is {', '.join(named)}."
