"""How fast do images arrive, where does the time go, and how fast are the others on the same files?

    python -m benchmarks.loader [--data DIR] [--quick] [--help]

Decoding alone, with two crops, and the full two views of ViewLoader (on a GPU by both back ends); beside them a
DataLoader over torchvision's classic transforms (Pillow), one over torchvision v2 on tensors, and the usual color_twist
graph in DALI.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from matplotlib.figure import Figure

from benchmarks import charts, dali_sources, torchvision_sources
from benchmarks.ablation_variants import bare
from benchmarks.command import Common, given, run
from benchmarks.environment import environment, now
from benchmarks.generated import FOLDER, describe, first, generated
from benchmarks.measure import ratios
from benchmarks.progress import Progress
from benchmarks.results import Measurement, Result
from benchmarks.source import Contender, Source
from benchmarks.tables import spread
from benchmarks.throughput import CPU, RATE, measure
from dali_pipes import MOCO_V3, DatasetIndex
from dali_pipes.augment import why_not_fused
from trainer.config import ConfigError

FULL, FUSED = "dali: two views", "fused: two views"
DECODE = "dali: decode only"
LOADERS = "loader"
PEER_BATCH = 32  # of a DataLoader: a worker makes a batch alone, so smaller ones make steadier windows
SWEEP_ROUNDS = 3
# Images of an epoch, the same files over and over: a DataLoader runs dry at an epoch's end, which in training is rare.
EPOCH = 50_000


@dataclass(frozen=True)
class Loader:
    """Images a second and CPU time an image of ways to load two MoCo v3 views."""

    common: Common = field(default_factory=Common)
    batch_size: int | None = None
    """Images a batch; None: 256 on a GPU, 16 on the CPU."""
    image_size: int = 224
    """Side of the views, in pixels."""
    seconds: float = 1.0
    """At least so long does one window last; half as long in sweeps."""
    sweeps: bool = True
    """Also vary batch, threads, view size and JPEG size of the full two views; on a GPU the JPEG engine's share."""


@dataclass(frozen=True)
class Point:
    """What the full two views are measured at."""

    batch: int
    size: int
    threads: int
    scale: float = 1.0  # of generated JPEGs against ImageNet's sizes


def measure_loaders(flags: Loader, device: torch.device, progress: Progress) -> Result:
    """Run the benchmark."""
    common = flags.common
    if (
        flags.image_size < 8
        or (flags.batch_size is not None and flags.batch_size < 1)
        or not 0 < flags.seconds < math.inf
    ):
        raise ConfigError("--image-size takes 8 or more, --batch-size 1 or more, --seconds more than 0")
    started, env = now(), environment(device)
    workers = common.threads
    batch = given(flags.batch_size, 256 if device.type == "cuda" else 8 if common.quick else 16)
    rounds, seconds = (3, 0.2) if common.quick else (common.rounds, flags.seconds)
    images = common.readable_by_all(progress)
    point = Point(batch, flags.image_size, workers)

    no_fused = why_not_fused(device, MOCO_V3)
    contenders = _contenders(first(images, max(len(images), EPOCH)), point, device, fused=no_fused is None)
    measurements = measure(contenders, rounds, seconds, device, progress)
    settings = {c.name: c.source.settings for c in contenders}
    if flags.sweeps and not common.quick:
        measurements += _sweeps(flags, images, point, device, progress)
    notes = _notes(measurements)
    if no_fused and device.type == "cuda":
        notes += (f"Without fused: {no_fused}.",)
    return Result(
        benchmark="loader",
        subject="",
        created=started,
        environment=env,
        configuration={
            "quick": common.quick,
            "sweeps": flags.sweeps and not common.quick,
            **asdict(point),
            "rounds": rounds,
            "seconds": seconds,
            "data": "generated" if common.data is None else common.data.name,
            "files": describe(images),
        },
        warm_up="before each window, as many batches as the loader may hold ready",
        measurements=_with_headlines(measurements),
        notes=notes,
        settings=settings,
    )


def _contenders(images: DatasetIndex, point: Point, device: torch.device, fused: bool) -> list[Contender]:
    """All ways to load, in the order of the table."""
    batch, size, threads = point.batch, point.size, point.threads
    peer = min(PEER_BATCH, batch)
    makers: dict[str, Callable[[torch.device], Source]] = {
        "torchvision on Pillow, DataLoader": partial(torchvision_sources.pillow, images, MOCO_V3, peer, size, threads),
        "torchvision v2 on tensors, DataLoader": partial(
            torchvision_sources.tensors, images, MOCO_V3, peer, size, threads
        ),
        DECODE: partial(dali_sources.decode_only, images, batch, threads),
        "dali: decode, two crops": partial(dali_sources.Views, images, bare(MOCO_V3), batch, size, threads),
        FULL: partial(dali_sources.Views, images, MOCO_V3, batch, size, threads),
        "dali: usual color_twist graph": partial(dali_sources.color_twist, images, MOCO_V3, batch, size, threads),
    }
    if fused:
        makers[FUSED] = partial(dali_sources.Views, images, MOCO_V3, batch, size, threads, augment="fused")
    contenders: list[Contender] = []
    for name, make in makers.items():
        contenders.append(Contender(LOADERS, name, make(device)))
        # Workers are forked at the first batch: before DALI has threads, which a fork would not take along.
        next(contenders[-1].stream)
    return contenders


def _sweeps(
    flags: Loader, images: DatasetIndex, base: Point, device: torch.device, progress: Progress
) -> tuple[Measurement, ...]:
    """The full two views with one thing varied at a time; the base point is measured again within each sweep."""
    rounds = min(flags.common.rounds, SWEEP_ROUNDS)
    quarter, half = max(1, base.batch // 4), max(1, base.threads // 2)
    batches = sorted({quarter, base.batch, 2 * base.batch})
    threads = sorted({1, half, base.threads})
    sizes = sorted({96, 160, base.size})
    sweeps: dict[str, list[tuple[str, Point]]] = {
        "batch size": [(f"{b}", Point(b, base.size, base.threads)) for b in batches],
        "threads": [(f"{t}", Point(base.batch, base.size, t)) for t in threads],
        "view size": [(f"{s} px", Point(base.batch, s, base.threads)) for s in sizes],
    }
    if flags.common.data is None:
        sweeps["JPEG size"] = [
            (f"{round(500 * scale)} x {round(375 * scale)}", Point(base.batch, base.size, base.threads, scale))
            for scale in (0.5, 1.0, 2.0)
        ]
    measurements: tuple[Measurement, ...] = ()
    for name, points in sweeps.items():
        contenders = []
        for label, p in points:
            files = images if p.scale == 1.0 else generated(FOLDER, len(images), p.scale)
            files = first(files, max(len(files), p.batch))
            source = dali_sources.Views(files, MOCO_V3, p.batch, p.size, p.threads, device)
            contenders.append(Contender(f"{FULL}, by {name}", label, source))
        measurements += measure(contenders, rounds, flags.seconds / 2, device, progress)
    if device.type == "cuda":
        contenders = [
            Contender(
                f"{DECODE}, by hw_decoder_load",
                f"{share:g}",
                dali_sources.decode_only(images, base.batch, base.threads, device, share),
            )
            for share in (0.0, 0.5, 0.65, 1.0)
        ]
        measurements += measure(contenders, rounds, flags.seconds / 2, device, progress)
    return measurements


def _with_headlines(measurements: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
    """The README shows the rate of every loader."""
    return tuple(replace(m, headline=m.group == LOADERS and m.quantity == RATE) for m in measurements)


def _notes(measurements: tuple[Measurement, ...]) -> tuple[str, ...]:
    """What the numbers do not say by themselves."""
    rates = {m.name: m for m in measurements if m.group == LOADERS and m.quantity == RATE}
    best = max((m for name, m in rates.items() if "DataLoader" in name), key=lambda m: m.estimate.median)
    ours = max((rates[name] for name in (FULL, FUSED) if name in rates), key=lambda m: m.estimate.median)
    return (
        f"{ours.name}: {spread(ratios(ours.values, best.values))} times the rate of {best.name}.",
        "Ours are uint8 views, which the model normalises; the others normalise here, as their users do.",
        "The color_twist graph gives other pictures than Pillow's: another hue, another contrast, one fixed order.",
    )


def draw(result: Result) -> Figure:
    """The loaders, and below them the sweeps."""
    groups = result.groups()
    chart, axes = charts.figure(
        result, "Two MoCo v3 views from JPEG files", [len({m.name for m in result.of(g)}) for g in groups], columns=2
    )
    for row, group in zip(axes, groups, strict=True):
        for cell, quantity in zip(row, (RATE, CPU), strict=True):
            members = [m for m in result.of(group) if m.quantity == quantity]
            better = "more is better" if quantity == RATE else "less is better"
            charts.bars(cell, members, f"{quantity} ({better})", accent=[FULL, FUSED])
            cell.set_title(group, fontsize=10, loc="left")
        row[1].set_yticklabels([])
    return chart


if __name__ == "__main__":
    sys.exit(run(Loader, measure_loaders, draw))
