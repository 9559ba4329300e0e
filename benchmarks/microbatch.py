"""What do chunks of a batch save, what do they cost, and do they change a number?

    python -m benchmarks.microbatch [--batch-size 256] [--chunks 64 16] [--data DIR] [--quick] [--help]

The trainer's forward and backward pass with `--microbatch`, against the plain one: memory, time, loss and gradients.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import charts
from benchmarks.command import Common, given, run
from benchmarks.environment import environment, now
from benchmarks.generated import describe, first
from benchmarks.measure import ratios, turns
from benchmarks.microbatch_runs import Taken, take
from benchmarks.progress import Progress
from benchmarks.results import Measurement, Result
from benchmarks.tables import spread
from dali_pipes import DatasetIndex, ViewLoader
from trainer import config as configuration
from trainer.config import Config, ConfigError
from trainer.engine import build_model
from trainer.microbatch import check_microbatch
from trainer.preparation import resolve
from trainer.presets import PRESETS

GROUP, MEMORY, TIME = "microbatch", "peak memory, MB", "ms/step"
WHOLE = "plain step, whole batch"


@dataclass(frozen=True)
class Microbatch:
    """One batch, whole and in chunks."""

    common: Common = field(default_factory=lambda: Common(rounds=3))
    preset: str = "vit-s-300ep"
    """Of train_ddp.py; its backbone has no batch norm."""
    batch_size: int | None = None
    """Images of the step; None: 256, with --quick 8."""
    chunks: tuple[int, ...] | None = None
    """Values of --microbatch to compare with the whole batch; None: 64 and 16, with --quick 4 and 3."""
    image_size: int | None = None
    """Side of the views, in pixels; None: 224 on a GPU, 64 on the CPU, with --quick 32."""
    depth: int | None = None
    """Blocks of the backbone; None: all on a GPU, 4 on the CPU, with --quick 1."""


def measure_microbatch(flags: Microbatch, device: torch.device, progress: Progress) -> Result:
    """Run the benchmark."""
    common, cuda = flags.common, device.type == "cuda"
    batch = given(flags.batch_size, 8 if common.quick else 256)
    chunks = given(flags.chunks, (4, 3) if common.quick else (64, 16))
    config = _config(flags, batch, chunks, device, progress.say)
    started, env = now(), environment(device)
    images = first(common.index(progress), batch)
    views = _views(config, images, common.threads)
    precisions = {"": config}
    if not cuda:
        # Where rounding is at float64's level, the method can be told from it.
        precisions["float64: "] = configuration.replace(config, dtype="float64")
    taken: dict[str, Taken] = {}
    kinds = [(prefix, chunk) for prefix in precisions for chunk in (None, *chunks)]
    progress.expect(common.rounds * len(kinds))
    for turn, (prefix, chunk) in turns(kinds, common.rounds):
        name = prefix + (WHOLE if chunk is None else f"--microbatch {chunk}")
        progress.part(f"{name}: round {turn + 1} of {common.rounds}")
        found = take(precisions[prefix], device, views, chunk)
        if name in taken:  # of later rounds only the time is news
            found = replace(taken[name], milliseconds=taken[name].milliseconds + found.milliseconds)
        taken[name] = found
    return Result(
        benchmark="microbatch",
        subject=f"{config.model.arch} {config.data.image_size}px",
        created=started,
        environment=env,
        configuration={
            "quick": common.quick,
            **{key: value for key, value in config.flags().items() if key not in ("data", "out", "resume")},
            "chunks": list(chunks),
            "rounds": common.rounds,
            "data": "generated" if common.data is None else common.data.name,
            "files": describe(images),
        },
        warm_up="one step of 2 images; memory is that of the first whole step",
        measurements=tuple(_measurements(taken, list(precisions))),
        notes=tuple(_notes(taken)),
    )


def _config(
    flags: Microbatch, batch: int, chunks: tuple[int, ...], device: torch.device, say: Callable[[str], None]
) -> Config:
    if flags.preset not in PRESETS:
        raise ConfigError(f"--preset {flags.preset} is not known; choose from: {', '.join(PRESETS)}")
    if batch < 2:
        raise ConfigError(f"--batch-size {batch} is too small; use 2 or more")
    if not chunks or min(chunks) < 1 or max(chunks) >= batch:
        raise ConfigError(
            f"--chunks {' '.join(map(str, chunks))}: takes numbers from 1 to {batch - 1}, below --batch-size"
        )
    cuda, quick = device.type == "cuda", flags.common.quick
    preset = PRESETS[flags.preset]()
    shortened = None if cuda or not preset.model.arch.startswith("vit_") else 4
    config = configuration.replace(
        preset,
        data=Path("unused"),
        out=Path("unused"),
        device=device.type,
        batch_size=batch,
        microbatch=min(chunks),
        image_size=given(flags.image_size, 32 if quick else 224 if cuda else 64),
        depth=given(flags.depth, 1 if quick else shortened),
        compile="off",
    )
    config.check(world_size=1)
    try:
        with torch.device("meta"):
            model = build_model(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_microbatch(config.run.microbatch, config.model.arch, model)
    return resolve(config, device, say)


def _views(config: Config, index: DatasetIndex, threads: int) -> torch.Tensor:
    """Two views of a batch, made once on the CPU, so that every kind of step has the same."""
    size = config.data.image_size
    loader = ViewLoader(index, batch_size=len(index), image_size=size, num_threads=threads)
    try:
        return torch.stack(next(iter(loader)).views)
    finally:
        loader.close()


def _measurements(taken: dict[str, Taken], prefixes: list[str]) -> Iterator[Measurement]:
    for prefix in prefixes:
        whole = taken[prefix + WHOLE]
        largest = max(gradient.abs().max().item() for gradient in whole.gradients.values())
        for name, each in taken.items():
            if not name.startswith(prefix) or (not prefix and name.startswith("float64")):
                continue
            yield Measurement(GROUP, name, MEMORY, (each.megabytes,), "lower", headline=not prefix)
            yield Measurement(GROUP, name, TIME, tuple(each.milliseconds), "lower")
            loss = abs((each.loss - whole.loss) / whole.loss).item()
            yield Measurement(GROUP, name, "loss: relative difference", (loss,), "lower")
            gradients = max((g - whole.gradients[key]).abs().max().item() for key, g in each.gradients.items())
            yield Measurement(GROUP, name, "gradients: largest difference / largest", (gradients / largest,), "lower")


def _notes(taken: dict[str, Taken]) -> Iterator[str]:
    whole = taken[WHOLE]
    least = min((each for name, each in taken.items() if ":" not in name), key=lambda each: each.megabytes)
    yield (
        f"The step with the least memory needs {least.megabytes / whole.megabytes:.0%} of the plain step's, and "
        f"{spread(ratios(least.milliseconds, whole.milliseconds))} times its time."
    )
    yield "Memory is what a step needs above model and views: activations, gradients and temporaries. One rank, eager."


def draw(result: Result) -> Figure:
    """Memory and time beside each other."""
    rows = [m for m in result.of(GROUP) if m.quantity == MEMORY and not m.name.startswith("float64")]
    times = [m for m in result.of(GROUP) if m.quantity == TIME and not m.name.startswith("float64")]
    batch = result.configuration["batch_size"]
    chart, axes = charts.figure(result, f"A batch of {batch} in chunks, {result.subject}", [len(rows)], columns=2)
    charts.bars(axes[0][0], rows, MEMORY, accent=[WHOLE])
    charts.bars(axes[0][1], times, TIME, accent=[WHOLE])
    return chart


if __name__ == "__main__":
    sys.exit(run(Microbatch, measure_microbatch, draw))
