"""Does the fast step learn what the plain one learns? Hundreds of steps of both on the same batches.

    python -m benchmarks.parity [--preset demo] [--steps 500] [--batch-size 32] [--float8] [--help]

The trainer's step as it is fast (bf16, compiled where there is a compiler, channels_last, fused) beside plain eager
float32 steps from the same weights, both once for each of several seeds (`--rounds`). Rounding alone drives two runs
apart; so what counts is whether the one kind ends lower or higher with every seed.
With `--float8` the optimised step runs once more, with float8 linear layers.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import charts
from benchmarks.command import Common, given, run
from benchmarks.environment import environment, now
from benchmarks.float8 import float8_blocks, multiplies_float8
from benchmarks.generated import describe, first
from benchmarks.measure import differences, estimate
from benchmarks.progress import Progress
from benchmarks.reference_step import Changes, ReferenceStep, side_by_side
from benchmarks.results import Better, Measurement, Result
from benchmarks.step import training_config
from benchmarks.tables import number
from dali_pipes import DatasetIndex
from model import MoCoV3
from trainer import config as configuration
from trainer.config import Config, ConfigError
from trainer.distributed import World
from trainer.engine import Engine, build_model

FAST, PLAIN, FLOAT8 = "optimised", "plain eager float32", "optimised, float8 linear layers"
SEEDS = "plain eager float32, two seeds"
COLOURS = {FAST: charts.ACCENT, FLOAT8: "#d9822b", PLAIN: charts.PLAIN}
SMOOTH = 25  # steps of a mean
LAST = 100  # steps that the end of a curve is
WARM_UP_SHARE = 0.1  # of the schedule, which ends with the last step

Curves = Mapping[str, list[list[float]]]  # the losses of each kind of step, a list a seed


@dataclass(frozen=True)
class Parity:
    """Loss curves of the optimised and the plain step on the same batches, from as many seeds as there are `--rounds`;
    all of them are in memory at once."""

    common: Common = field(default_factory=lambda: Common(images=2048, rounds=5))
    preset: str = ""
    """Of train_ddp.py; empty: vit-s-300ep on a GPU, demo on the CPU."""
    batch_size: int | None = None
    """Images a step; None: 256 on a GPU, 32 on the CPU."""
    image_size: int | None = None
    """Side of the views, in pixels; None: the preset's."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "bf16"
    """Of the optimised step."""
    compile: Literal["auto", "on", "off"] = "on"
    """Of the optimised step; off where there is no compiler."""
    float8: bool = False
    """Also the optimised step with the transformer's linear layers in float8, an experiment; needs torchao."""
    steps: int = 500
    """Steps of each run; the schedule is as long."""


def measure_parity(flags: Parity, device: torch.device, progress: Progress) -> Result:
    """Run all side by side, on each batch in turn."""
    common, cuda = flags.common, device.type == "cuda"
    steps, seeds = (20, min(common.rounds, 2)) if common.quick else (flags.steps, common.rounds)
    if steps < SMOOTH and not common.quick:
        raise ConfigError(f"--steps {flags.steps} is too small for means of {SMOOTH} steps; use {SMOOTH} or more")
    started, env = now(), environment(device)
    batch = given(flags.batch_size, 256 if cuda else 32)
    config = training_config(
        device,
        progress.say,
        preset=flags.preset,
        batch_size=batch,
        image_size=flags.image_size,
        amp=flags.amp,
        compile="off" if common.quick else flags.compile,
    )
    images = common.index(progress)
    images = first(images, max(len(images), batch))
    epochs = -(-steps // (len(images) // batch))
    warm_up = max(round(WARM_UP_SHARE * epochs), int(epochs > 1))  # whole epochs, and AdamW needs some
    config = configuration.replace(config, epochs=epochs, warmup_epochs=warm_up)
    threads = common.threads
    with side_by_side():
        curves = train(config, device, images, steps, seeds, threads, progress, flags.float8)
    notes = [verdict(curves, name) for name in curves if name != PLAIN]
    if flags.float8 and not multiplies_float8(device):
        notes.append("Float8 is emulated here: values are rounded to it, and the products are those of float32.")
    return Result(
        benchmark="parity",
        subject=config.model.arch,
        created=started,
        environment=env,
        configuration={
            "quick": common.quick,
            **{key: value for key, value in config.flags().items() if key not in ("data", "out", "resume")},
            "float8": flags.float8,
            "steps": steps,
            "rounds": seeds,
            "data": "generated" if common.data is None else common.data.name,
            "files": describe(images),
        },
        warm_up="none: the first step counts",
        measurements=tuple(summary(curves)),
        notes=tuple(notes),
        settings={
            name: {"loss": [[round(value, 5) for value in curve] for curve in runs]} for name, runs in curves.items()
        },
    )


def train(
    config: Config,
    device: torch.device,
    images: DatasetIndex,
    steps: int,
    seeds: int,
    threads: int,
    progress: Progress,
    float8: bool = False,
) -> dict[str, list[list[float]]]:
    """The losses of every step of the runs, on the batches of the first seed."""
    configs = [configuration.replace(config, seed=config.optim.seed + seed) for seed in range(seeds)]

    def engine(config: Config, model: MoCoV3) -> Engine:
        return Engine(config, World(), device, images, model, threads)

    fast = {FAST: [engine(each, build_model(each)) for each in configs]}
    if float8:
        fast[FLOAT8] = [engine(each, float8_blocks(build_model(each), device)) for each in configs]
    plain = [ReferenceStep(each, device, Changes(amp="off", no_host_wait=True)) for each in configs]
    losses: dict[str, list[list[Tensor]]] = {name: [[] for _ in configs] for name in (*fast, PLAIN)}
    leading = fast[FAST][0]
    progress.expect(steps)
    try:
        while leading.step < steps:
            for batch in leading.loader:
                seen = losses[FAST][0]
                progress.part(f"step of each: loss {float(seen[-1]):.3f}" if seen else "step of each")
                for name, engines in fast.items():
                    for curve, each in zip(losses[name], engines, strict=True):
                        curve.append(each.train_step(batch.views))
                for curve, step in zip(losses[PLAIN], plain, strict=True):
                    views = [step.prepared(view) for view in batch.views]
                    loss = step.train_step(views[0], views[1], leading.lr, leading.momentum)
                    curve.append(torch.as_tensor(loss))
                if leading.step == steps:
                    break
    finally:
        leading.loader.close()
    return {name: torch.stack([torch.stack(run) for run in runs]).float().tolist() for name, runs in losses.items()}


def smoothed(curve: Sequence[float]) -> NDArray[np.float64]:
    """Means of `SMOOTH` consecutive steps, as many as fit."""
    width = min(SMOOTH, len(curve))
    return np.convolve(curve, np.ones(width) / width, mode="valid")


def summary(curves: Curves) -> list[Measurement]:
    """Ends of the curves, and how far apart they are: a value a seed, between seeds a value a pair of them."""
    steps = len(curves[PLAIN][0])
    end = f"mean of the last {min(LAST, steps)} steps"
    found = [Measurement("loss", name, end, tuple(ends(runs)), "neither") for name, runs in curves.items()]
    pairs = {name: list(zip(runs, curves[PLAIN], strict=True)) for name, runs in curves.items() if name != PLAIN}
    pairs[SEEDS] = list(combinations(curves[PLAIN], 2))
    for name, both in pairs.items():
        gaps = [np.abs(smoothed(one) - smoothed(other)) for one, other in both]
        if gaps:
            group = f"distance from {PLAIN}, means of {min(SMOOTH, steps)} steps"
            better: Better = "neither" if name == SEEDS else "lower"
            found += [
                Measurement(group, name, "average", tuple(float(gap.mean()) for gap in gaps), better),
                Measurement(group, name, "largest", tuple(float(gap.max()) for gap in gaps), better),
            ]
    return found


def ends(runs: Sequence[Sequence[float]]) -> list[float]:
    """The mean loss of each run's last `LAST` steps."""
    return [float(np.mean(run[-LAST:])) for run in runs]


def verdict(curves: Curves, name: str = FAST) -> str:
    """Whether the runs of that name end lower or higher than the plain ones of the same seeds."""
    gaps = differences(ends(curves[name]), ends(curves[PLAIN]))
    seeds = len(gaps)
    said = f"{name}: at the end the loss minus that of {PLAIN} is {number(estimate(gaps).median)}"
    if seeds == 1:
        return f"{said}, with one seed: not judged."
    said += f" ({number(min(gaps))} to {number(max(gaps))})"
    if min(gaps) <= 0 <= max(gaps):
        return f"{said}, over {seeds} seeds: no difference shown."
    side = "above" if gaps[0] > 0 else "below"
    return f"{said}: {side} 0 with each of {seeds} seeds, as chance alone would have it once in {2 ** (seeds - 1)}."


def draw(result: Result) -> Figure:
    """Above, the smoothed losses, a line a run; below, the differences of each seed, and of plain runs of two seeds."""
    chart, ((losses,), (gaps,)) = charts.figure(
        result,
        f"{result.subject}: amp {result.configuration['amp']}, compile {result.configuration['compile']}, and float32",
        [8, 6],
    )
    runs = {
        name: [smoothed(curve) for curve in result.settings[name]["loss"]]
        for name in COLOURS
        if name in result.settings
    }
    plain = runs[PLAIN]
    steps = len(result.settings[PLAIN]["loss"][0])
    at = np.arange(len(plain[0])) + steps - len(plain[0]) + 1

    def lines(axes: Axes, curves: Sequence[NDArray[np.float64]], colour: str, label: str) -> None:
        for at_seed, curve in enumerate(curves):
            axes.plot(at, curve, color=colour, alpha=0.7, linewidth=1, label=None if at_seed else label)

    for name in reversed(runs):  # ours on top
        lines(losses, runs[name], COLOURS[name], name)
    lines(gaps, [a - b for a, b in combinations(plain, 2)], COLOURS[PLAIN], SEEDS)
    for name in (name for name in reversed(runs) if name != PLAIN):
        lines(
            gaps, [one - other for one, other in zip(runs[name], plain, strict=True)], COLOURS[name], f"{name} - plain"
        )
    gaps.axhline(0, color="#222222", linewidth=0.8)
    losses.set_ylabel("loss")
    gaps.set_ylabel("difference of the loss")
    for axes in (losses, gaps):
        axes.set_xlabel(f"step (mean of the last {min(SMOOTH, steps)})", fontsize=9)
        axes.legend(fontsize=8)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return chart


if __name__ == "__main__":
    sys.exit(run(Parity, measure_parity, draw))
