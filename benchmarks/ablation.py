"""What does each augmentation cost?

    python -m benchmarks.ablation [--data DIR] [--quick] [--help]

The loader with all augmentations, with each one left out, with each one alone, and with the crops only; for both views
and for each view by itself. An augmentation's cost is a difference of two runs of the same round.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from matplotlib.figure import Figure

from benchmarks import charts
from benchmarks.command import Common, run
from benchmarks.dali_sources import Views, without
from benchmarks.environment import environment, now
from benchmarks.generated import describe, first
from benchmarks.measure import Estimate, differences, estimate
from benchmarks.progress import Progress
from benchmarks.results import Measurement, Result
from benchmarks.source import Contender
from benchmarks.tables import number, spread
from benchmarks.throughput import CPU, RATE, measure
from dali_pipes import MOCO_V3, Recipe, ViewSpec
from trainer.config import ConfigError

AUGMENTATIONS = ("jitter", "grayscale", "blur", "solarize", "flip")
WALL = "ms/image"
ALL, NONE = "all on", "crops only"
BOTH = "both views"


@dataclass(frozen=True)
class Ablation:
    """The cost of each augmentation, alone and among the others."""

    common: Common = field(default_factory=Common)
    batch_size: int | None = None
    """Images a batch (default: 256 on a GPU, 32 on the CPU)."""
    image_size: int = 224
    """Side of the views, in pixels."""
    seconds: float = 0.3
    """At least so long does one window last."""
    per_view: bool = True
    """Also each view by itself."""


def measure_ablation(flags: Ablation, device: torch.device, progress: Progress) -> Result:
    """Run the benchmark."""
    common = flags.common
    if flags.image_size < 8 or (flags.batch_size or 1) < 1 or flags.seconds <= 0:
        raise ConfigError("--image-size takes 8 or more, --batch-size 1 or more, --seconds more than 0")
    started, env = now(), environment(device)
    threads = common.workers or min(16, env["cores"])
    batch = flags.batch_size or (256 if device.type == "cuda" else 8 if common.quick else 32)
    rounds, seconds = (2, 0.1) if common.quick else (common.rounds, flags.seconds)
    found = common.index(progress)
    images = first(found, max(len(found), batch))
    recipes = {BOTH: MOCO_V3}
    if flags.per_view and not common.quick:
        recipes |= {f"view {i + 1} alone": Recipe((view,)) for i, view in enumerate(MOCO_V3.views)}

    measurements: list[Measurement] = []
    notes: list[str] = []
    for group, recipe in recipes.items():
        contenders = [
            Contender(group, name, Views(images, variant, batch, flags.image_size, threads, device))
            for name, variant in _variants(recipe, each_alone=group == BOTH).items()
        ]
        taken = measure(contenders, rounds, seconds, device, progress)
        runs = _in_milliseconds(taken)
        costs = list(_costs(group, runs, headline=group == BOTH))
        measurements += [*runs.values(), *costs]
        notes.append(explanation(group, runs, WALL if device.type == "cuda" else CPU))
    return Result(
        benchmark="ablation",
        subject="",
        created=started,
        environment=env,
        configuration={
            "quick": common.quick,
            "batch": batch,
            "image_size": flags.image_size,
            "threads": threads,
            "rounds": rounds,
            "seconds": seconds,
            "back_end": "dali",
            "probability": {name: [getattr(view, name) for view in MOCO_V3.views] for name in AUGMENTATIONS},
            "data": "generated" if common.data is None else common.data.name,
            "files": describe(images),
        },
        warm_up="before each window, as many batches as the loader may hold ready",
        measurements=tuple(measurements),
        notes=tuple(notes),
    )


def off(recipe: Recipe, name: str) -> Recipe:
    """The recipe without one augmentation."""
    return Recipe(tuple(_with(view, name, 0.0) for view in recipe.views))


def alone(recipe: Recipe, name: str) -> Recipe:
    """The recipe's crops and one augmentation, as often as it has it."""
    return Recipe(tuple(_with(without(view), name, getattr(view, name)) for view in recipe.views))


def _with(view: ViewSpec, name: str, probability: float) -> ViewSpec:
    return replace(view, **{name: probability})  # type: ignore[arg-type]


def used(recipe: Recipe) -> list[str]:
    """The augmentations that some view applies."""
    return [name for name in AUGMENTATIONS if any(getattr(view, name) > 0 for view in recipe.views)]


def _variants(recipe: Recipe, each_alone: bool) -> dict[str, Recipe]:
    variants = {ALL: recipe, NONE: Recipe(tuple(without(view) for view in recipe.views))}
    for name in used(recipe):
        variants[f"without {name}"] = off(recipe, name)
        if each_alone:
            variants[f"only {name}"] = alone(recipe, name)
    return variants


def _in_milliseconds(taken: Sequence[Measurement]) -> dict[tuple[str, str], Measurement]:
    """By (variant, quantity), with times instead of rates, since times of parts add up."""
    runs = {}
    for m in taken:
        if m.quantity == RATE:
            m = Measurement(m.group, m.name, WALL, tuple(1000 / rate for rate in m.values), "lower")
        runs[m.name, m.quantity] = m
    return runs


def _costs(group: str, runs: Mapping[tuple[str, str], Measurement], headline: bool) -> Iterator[Measurement]:
    """Differences within each round: without it against all, alone against the crops."""
    for (name, quantity), m in runs.items():
        kind, _, augmentation = name.partition(" ")
        if kind == "without":
            cost = differences(runs[ALL, quantity].values, m.values)
            show = headline and quantity == CPU
            yield Measurement(f"{group}: saved by leaving out", augmentation, quantity, cost, "lower", show)
        elif kind == "only":
            cost = differences(m.values, runs[NONE, quantity].values)
            yield Measurement(f"{group}: added to the crops", augmentation, quantity, cost, "lower")


def explanation(group: str, runs: Mapping[tuple[str, str], Measurement], quantity: str) -> str:
    """Whether the crops and the parts make the whole: what they leave of each round, with its interval."""
    times = {name: m.values for (name, q), m in runs.items() if q == quantity}
    whole, crops = times[ALL], times[NONE]
    counts = {
        "what leaving each one out saves": [
            differences(whole, v) for n, v in times.items() if n.startswith("without ")
        ],
        "what each one adds alone": [differences(v, crops) for n, v in times.items() if n.startswith("only ")],
    }
    sentences = [f"{group}: all on is {number(estimate(whole).median)} {quantity}."]
    for count, parts in counts.items():
        if parts:
            rest = estimate([a - c - sum(p) for a, c, *p in zip(whole, crops, *parts, strict=True)])
            base = number(estimate(crops).median)
            sentences.append(f"The crops ({base}) and {count} leave {spread(rest)} of it: {_verdict(rest)}.")
    return " ".join(sentences)


def _verdict(rest: Estimate) -> str:
    """What a rest means. Its causes are not measured here, so none is named."""
    if rest.low <= 0 <= rest.high:
        return "nothing, within the spread"
    return f"together they cost {'more' if rest.median > 0 else 'less'} than by this count"


def draw(result: Result) -> Figure:
    """Costs among the others and alone for both views; below, each view by itself."""
    groups = [g for g in result.groups() if ":" in g]
    chart, axes = charts.figure(
        result, "What each augmentation costs (DALI)", [len(result.of(g)) // 2 for g in groups], columns=2
    )
    for row, group in zip(axes, groups, strict=True):
        for cell, quantity in zip(row, (CPU, WALL), strict=True):
            members = [m for m in result.of(group) if m.quantity == quantity]
            charts.bars(cell, members, quantity)
            cell.set_title(group, fontsize=10, loc="left")
        row[1].set_yticklabels([])
    return chart


if __name__ == "__main__":
    sys.exit(run(Ablation, measure_ablation, draw))
