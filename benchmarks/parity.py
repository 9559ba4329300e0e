"""Does the fast step learn what the plain one learns? Hundreds of steps of both on the same batches.

    python -m benchmarks.parity [--preset demo] [--steps 500] [--batch-size 32] [--float8] [--help]

The trainer's step as it is fast (bf16, compiled where there is a compiler, channels_last, fused) beside plain eager
float32 steps from the same weights. The yardstick is a third run, plain again, from the weights of another seed: what
separates the two must be no more than what separates two seeds. With `--float8` the optimised step runs once more, with
float8 linear layers.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks import charts
from benchmarks.command import Common, given, run
from benchmarks.environment import environment, now
from benchmarks.float8 import float8_blocks, multiplies_float8
from benchmarks.generated import describe, first
from benchmarks.progress import Progress
from benchmarks.reference_step import Changes, ReferenceStep, side_by_side
from benchmarks.results import Measurement, Result
from benchmarks.step import training_config
from benchmarks.tables import number
from dali_pipes import DatasetIndex
from trainer import config as configuration
from trainer.config import Config, ConfigError
from trainer.distributed import World
from trainer.engine import Engine, build_model

FAST, PLAIN, OTHER_SEED = "optimised", "plain eager float32", "plain eager float32, another seed"
FLOAT8 = "optimised, float8 linear layers"
COLOURS = {FAST: charts.ACCENT, FLOAT8: "#d9822b", PLAIN: "#222222", OTHER_SEED: charts.PLAIN}
SMOOTH = 25  # steps of a mean
LAST = 100  # steps that the end of a curve is
WARM_UP_SHARE = 0.1  # of the schedule, which ends with the last step


@dataclass(frozen=True)
class Parity:
    """Loss curves of the optimised and the plain step on the same batches."""

    common: Common = field(default_factory=lambda: Common(images=2048, rounds=1))
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
    steps = 20 if common.quick else flags.steps
    if common.rounds != 1:
        raise ConfigError(f"--rounds {common.rounds}: every curve is run once")
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
        curves = train(config, device, images, steps, threads, progress, flags.float8)
    notes = [verdict(curves, name) for name in (FAST, FLOAT8) if name in curves]
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
            "rounds": common.rounds,
            "data": "generated" if common.data is None else common.data.name,
            "files": describe(images),
        },
        warm_up="none: the first step counts",
        measurements=tuple(summary(curves)),
        notes=tuple(notes),
        settings={name: {"loss": [round(value, 5) for value in curve]} for name, curve in curves.items()},
    )


def train(
    config: Config,
    device: torch.device,
    images: DatasetIndex,
    steps: int,
    threads: int,
    progress: Progress,
    float8: bool = False,
) -> dict[str, list[float]]:
    """The losses of every step of the runs."""
    models = {FAST: build_model(config)}
    if float8:
        models[FLOAT8] = float8_blocks(build_model(config), device)
    fast = {name: Engine(config, World(), device, images, model, threads) for name, model in models.items()}
    plain = {
        name: ReferenceStep(configuration.replace(config, seed=seed), device, Changes(amp="off", no_host_wait=True))
        for name, seed in {PLAIN: config.optim.seed, OTHER_SEED: config.optim.seed + 1}.items()
    }
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in (*fast, *plain)}
    engine = fast[FAST]
    progress.expect(steps)
    try:
        while engine.step < steps:
            for batch in engine.loader:
                progress.part(f"step of each: loss {float(losses[FAST][-1]):.3f}" if losses[FAST] else "step of each")
                for name, each in fast.items():
                    losses[name].append(each.train_step(batch.views))
                for name, step in plain.items():
                    views = [step.prepared(view) for view in batch.views]
                    loss = step.train_step(views[0], views[1], engine.lr, engine.momentum)
                    losses[name].append(torch.as_tensor(loss))
                if engine.step == steps:
                    break
    finally:
        engine.loader.close()
    return {name: torch.stack(values).float().tolist() for name, values in losses.items()}


def smoothed(curve: Sequence[float]) -> NDArray[np.float64]:
    """Means of `SMOOTH` consecutive steps, as many as fit."""
    width = min(SMOOTH, len(curve))
    return np.convolve(curve, np.ones(width) / width, mode="valid")


def summary(curves: dict[str, list[float]]) -> list[Measurement]:
    """Ends of the curves, and their distance from the plain one's."""
    found = [
        Measurement(
            "loss", name, f"mean of the last {len(curve[-LAST:])} steps", (float(np.mean(curve[-LAST:])),), "neither"
        )
        for name, curve in curves.items()
    ]
    for name in (name for name in curves if name != PLAIN):
        gap = np.abs(smoothed(curves[name]) - smoothed(curves[PLAIN]))
        group = f"distance from {PLAIN}, means of {min(SMOOTH, len(curves[name]))} steps"
        found += [
            Measurement(group, name, "average", (float(gap.mean()),), "lower"),
            Measurement(group, name, "largest", (float(gap.max()),), "lower"),
        ]
    return found


def verdict(curves: dict[str, list[float]], name: str = FAST) -> str:
    """Whether that curve is nearer to the plain one than that of one other seed, which begins with other weights."""
    ours, seeds = (np.abs(smoothed(curves[curve]) - smoothed(curves[PLAIN])).mean() for curve in (name, OTHER_SEED))
    within = "within" if ours <= seeds else "beyond"
    return (
        f"{name}: over {len(curves[PLAIN])} steps the loss is {number(ours)} from the plain one on average, "
        f"that of another seed is {number(seeds)}: {within} what separates two seeds."
    )


def draw(result: Result) -> Figure:
    """Smoothed losses above, what separates them from the plain one below."""
    chart, ((losses,), (gaps,)) = charts.figure(
        result,
        f"{result.subject}: amp {result.configuration['amp']}, compile {result.configuration['compile']}, and float32",
        [8, 6],
    )
    curves = {name: result.settings[name]["loss"] for name in COLOURS if name in result.settings}
    for name, curve in curves.items():
        mean = smoothed(curve)
        at = np.arange(len(mean)) + len(curve) - len(mean) + 1
        losses.plot(range(1, len(curve) + 1), curve, color=COLOURS[name], alpha=0.15, linewidth=0.6)
        losses.plot(at, mean, color=COLOURS[name], label=name, linewidth=1.5)
        if name != PLAIN:
            gaps.plot(at, mean - smoothed(curves[PLAIN]), color=COLOURS[name], label=f"{name} - plain", linewidth=1.5)
    gaps.axhline(0, color="#222222", linewidth=0.8)
    losses.set_ylabel("loss")
    gaps.set_ylabel("difference of the loss")
    for axes in (losses, gaps):
        axes.set_xlabel(f"step (thick: mean of the last {min(SMOOTH, len(curves[PLAIN]))})", fontsize=9)
        axes.legend(fontsize=8)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return chart


if __name__ == "__main__":
    sys.exit(run(Parity, measure_parity, draw))
