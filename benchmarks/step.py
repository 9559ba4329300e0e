"""Where does a training step spend its time, and how far is it from what the device could do?

    python -m benchmarks.step [--preset vit-s-300ep] [--batch-size 256] [--data DIR] [--trace FILE] [--quick] [--help]

The trainer's own step, on images through its loader and on a batch that stays on the device; the loader alone; and the
same model stepped in the manner of the reference release.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from matplotlib.figure import Figure

from benchmarks import charts
from benchmarks.command import Common, given, run
from benchmarks.environment import environment, now
from benchmarks.generated import describe, first
from benchmarks.intervals import INTERVALS
from benchmarks.measure import ratios
from benchmarks.progress import Progress
from benchmarks.results import Measurement, Result
from benchmarks.step_runs import CACHED, LOADER, REAL, REFERENCE, Runs
from benchmarks.tables import spread
from benchmarks.throughput import ENERGY
from benchmarks.trace import Beside
from trainer import config as configuration
from trainer.advice import data_advice
from trainer.config import Config, ConfigError
from trainer.engine import build_model
from trainer.preparation import resolve
from trainer.presets import PRESETS

RATES, SHARES, TIMES = "step", "step on JPEGs: intervals", "step on a cached batch: intervals"
BESIDE = "step on JPEGs: beside the training stream"


@dataclass(frozen=True)
class Step:
    """The training step as consecutive intervals."""

    common: Common = field(default_factory=Common)
    preset: str = ""
    """Of train_ddp.py; empty: vit-s-300ep on a GPU, demo on the CPU."""
    batch_size: int | None = None
    """Images a step; None: 256 on a GPU, 32 on the CPU."""
    image_size: int | None = None
    """Side of the views, in pixels; None: the preset's."""
    amp: Literal["auto", "bf16", "fp16", "tf32", "off"] = "auto"
    """As in train_ddp.py."""
    compile: Literal["auto", "on", "off"] = "auto"
    """As in train_ddp.py."""
    steps: int | None = None
    """Steps a round; None: 20 on a GPU, 5 on the CPU."""
    reference: bool = True
    """Also the step in the manner of the reference release."""
    trace: Path | None = None
    """Write a trace of a few steps here, for Perfetto or TensorBoard."""


def measure_step(flags: Step, device: torch.device, progress: Progress) -> Result:
    """Run the benchmark."""
    common, cuda = flags.common, device.type == "cuda"
    started, env = now(), environment(device)
    if flags.steps is not None and flags.steps < 1:
        raise ConfigError(f"--steps {flags.steps} is too small; use 1 or more")
    config = training_config(
        device,
        progress.say,
        preset=flags.preset,
        batch_size=given(flags.batch_size, 256 if cuda else 16 if common.quick else 32),
        image_size=flags.image_size,
        amp=flags.amp,
        compile=flags.compile,
    )
    batch = config.optim.batch_size
    on_gpu, on_cpu = (5, 2) if common.quick else (20, 5)
    steps = given(flags.steps, on_gpu if cuda else on_cpu)
    rounds = 3 if common.quick else common.rounds
    images = common.index(progress)
    if flags.trace is not None:
        flags.trace.parent.mkdir(parents=True, exist_ok=True)
        flags.trace.open("ab").close()  # or raise now: the profiler would only log it, after all the work
    threads = common.threads

    progress.say(f"building and warming up {config.model.arch}, batch {batch}, amp {config.run.amp} …")
    runs = Runs(config, device, first(images, 8 * batch), threads, flags.reference)
    try:
        bound = runs.matmul_rate()
        runs.warm_up(3)
        runs.measure(rounds, steps, progress)
        # Before and after: others on the machine, or a warm card, can only lower it.
        bound = max(bound, runs.matmul_rate())
        others = runs.beside()
        if flags.trace is not None:
            runs.trace(flags.trace)
            progress.say(f"trace: {flags.trace}")
    finally:
        runs.close()
    flops = runs.flops()
    return Result(
        benchmark="step",
        subject=config.model.arch if flags.image_size is None else f"{config.model.arch} {flags.image_size}px",
        created=started,
        environment=env,
        configuration={
            "quick": common.quick,
            "preset": flags.preset or default_preset(device),
            **{key: value for key, value in config.flags().items() if key not in ("data", "out", "resume")},
            "rounds": rounds,
            "steps": steps,
            "reference": flags.reference,
            "workers": threads,
            "data": "generated" if common.data is None else common.data.name,
            "files": describe(images),
            "gflop_per_image": round(flops / batch / 1e9, 3),
            "matmul": {"dtype": runs.multiplies_in, "tflops": round(bound / 1e12, 3)},
        },
        warm_up="3 steps of each kind, compilation included",
        measurements=(*_measurements(runs, batch, flops, bound), *_beside(others)),
        notes=tuple(_notes(runs, threads, env["cores"], bool(others))),
        settings={REFERENCE: runs.reference_settings} if runs.reference is not None else {},
    )


def default_preset(device: torch.device) -> str:
    """What fits the device."""
    return "vit-s-300ep" if device.type == "cuda" else "demo"


def training_config(
    device: torch.device,
    say: Callable[[str], None],
    *,
    preset: str,
    batch_size: int,
    image_size: int | None = None,
    amp: Literal["auto", "bf16", "fp16", "tf32", "off"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
) -> Config:
    """The trainer's configuration that is measured, with nothing left at `auto`.

    Args:
        device: where it will run.
        say: told of what this machine cannot do.
        preset: of train_ddp.py, or "" for what fits the device.
        batch_size: images a step.
        image_size: side of the views, by default the preset's.
        amp: as in train_ddp.py.
        compile: as in train_ddp.py.

    Raises:
        ConfigError: the preset is not known, or a value cannot work.
    """
    name = preset or default_preset(device)
    if name not in PRESETS:
        raise ConfigError(f"--preset {name} is not known; choose from: {', '.join(PRESETS)}")
    config = configuration.replace(
        PRESETS[name](),
        data=Path("unused"),
        out=Path("unused"),
        device=device.type,
        batch_size=batch_size,
        # The schedule's length is no part of the measurement, and its end must not come.
        epochs=1_000_000,
        amp=amp,
        compile=compile,
    )
    if image_size is not None:
        config = configuration.replace(config, image_size=image_size)
    config.check(world_size=1)
    try:
        with torch.device("meta"):
            build_model(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return resolve(config, device, say)


def _measurements(runs: Runs, batch: int, flops: float, bound: float) -> Iterator[Measurement]:
    for kind in runs.kinds:
        milliseconds = runs.milliseconds[kind]
        rate = tuple(1000 * batch / ms for ms in milliseconds)
        headline = kind != LOADER
        yield Measurement(RATES, kind, "images/s", rate, "higher", headline)
        yield Measurement(RATES, kind, "ms/step", tuple(milliseconds), "lower")
        if kind != LOADER and (kind != REFERENCE or runs.reference_multiplies_alike):
            share = tuple(100 * flops / (ms / 1000) / bound for ms in milliseconds)
            yield Measurement(RATES, kind, "% of measured matmul rate (MFU)", share, "higher")
        if kind in runs.images_per_joule:
            yield Measurement(RATES, kind, ENERGY, tuple(runs.images_per_joule[kind]), "higher")
        if kind in runs.peak_gb:
            yield Measurement(RATES, kind, "peak memory of torch, GB", (runs.peak_gb[kind],), "lower")
    for group, kind in ((SHARES, REAL), (TIMES, CACHED)):
        for name in INTERVALS:
            values = tuple(fmean(step[name] for step in turn) for turn in runs.intervals[kind])
            total = [sum(fmean(step[each] for step in turn) for each in INTERVALS) for turn in runs.intervals[kind]]
            shares = tuple(100 * value / whole for value, whole in zip(values, total, strict=True))
            yield Measurement(group, name, "ms", values, "lower")
            yield Measurement(group, name, "% of step", shares, "neither")


def _beside(others: Mapping[str, Beside]) -> Iterator[Measurement]:
    """What other streams did meanwhile, from a trace of its own: the profiler slows the host, not the kernels."""
    for kind, work in others.items():
        yield Measurement(BESIDE, kind, "ms/step", (work.milliseconds,), "lower")
        yield Measurement(BESIDE, kind, "% hidden", (100 * work.hidden,), "neither")


def _notes(runs: Runs, threads: int, cores: int, saw_streams: bool) -> Iterator[str]:
    """What follows from the medians."""
    real, cached, loader = (runs.median(kind) for kind in (REAL, CACHED, LOADER))
    longer = ratios(runs.milliseconds[REAL], runs.milliseconds[CACHED])
    yield f"On JPEGs a step takes {spread(longer)} times as long as on a cached batch."
    hidden = min(1.0, max(0.0, (loader + cached - real) / loader))
    yield (
        f"The loader alone needs {loader:.1f} ms a batch; {hidden:.0%} of it is hidden behind the step."
        + ("" if runs.device.type == "cuda" else " Here both use the same cores.")
    )
    waits = [sum(step["data wait"] for step in turn) for turn in runs.intervals[REAL]]
    wholes = [sum(sum(step.values()) for step in turn) for turn in runs.intervals[REAL]]
    if advice := data_advice(sum(waits) / sum(wholes), threads, cores):
        yield advice
    if REFERENCE in runs.kinds:
        faster = ratios(runs.milliseconds[REFERENCE], runs.milliseconds[CACHED])
        precise = (
            "" if runs.reference_multiplies_alike else f", which multiplies in float16, ours in {runs.multiplies_in}"
        )
        yield f"On a cached batch our step is {spread(faster)} times as fast as the reference-style step{precise}."
    if runs.left_out:
        yield runs.left_out
    if runs.device.type == "cpu":
        yield "Peak memory and what runs beside the training stream are told on GPUs only."
    else:
        yield "Peak memory is that of torch: what DALI and its decoder hold comes on top."
        yield (
            "Beside the training stream are kernels and copies; the JPEG engine's work is in no trace."
            if saw_streams
            else "What ran beside the training stream is not known: torch.profiler saw no work of the GPU."
        )
    yield "One rank: gather is a no-op, and nothing is averaged between ranks."


def draw(result: Result) -> Figure:
    """Rates above; below, the intervals of both steps."""
    chart, axes = charts.figure(
        result,
        f"Training step, {result.subject}, batch {result.configuration['batch_size']}, "
        f"{result.configuration['image_size']} px",
        [len({m.name for m in result.of(RATES)}), len(INTERVALS)],
        columns=2,
    )
    rates = [m for m in result.of(RATES) if m.quantity == "images/s"]
    mfu = [m for m in result.of(RATES) if "MFU" in m.quantity]
    charts.bars(axes[0][0], rates, "source images/s (more is better)", accent=[REAL, CACHED])
    matmul = result.configuration["matmul"]
    charts.bars(axes[0][1], mfu, f"% of the {matmul['tflops']:.3g} TFLOP/s of a {matmul['dtype']} matmul, measured")
    axes[0][1].set_title("model FLOPs utilisation", fontsize=10, loc="left")
    for cell, group in zip(axes[1], (SHARES, TIMES), strict=True):
        members = [m for m in result.of(group) if m.quantity == "ms"]
        charts.bars(cell, members, "ms a step", accent=["data wait"])
        cell.set_title(group, fontsize=10, loc="left")
    return chart


if __name__ == "__main__":
    sys.exit(run(Step, measure_step, draw))
