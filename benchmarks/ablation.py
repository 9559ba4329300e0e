"""What does each augmentation cost?

    python -m benchmarks.ablation [--data DIR] [--augment dali fused] [--quick] [--help]

The loader with all augmentations, with each one left out, with each one alone, and with the crops only; for both views
and for each view by itself. An augmentation's cost is a difference of two runs of the same round: in time of the
device, in CPU time of the host, and as the share of a training step that is measured in the same run.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from matplotlib.figure import Figure

from benchmarks import charts
from benchmarks.ablation_costs import ALONE, LEFT_OUT, WALL, costs, explanation, in_milliseconds
from benchmarks.ablation_step import step_cost
from benchmarks.ablation_variants import AUGMENTATIONS, BOTH, recipes, sweeps, used, variants
from benchmarks.command import Common, given, run
from benchmarks.dali_sources import Views
from benchmarks.environment import environment, now
from benchmarks.generated import describe, first
from benchmarks.progress import Progress
from benchmarks.results import Measurement, Result
from benchmarks.source import Contender
from benchmarks.step import training_config
from benchmarks.tables import number
from benchmarks.throughput import CPU, DEVICE, measure
from dali_pipes import MOCO_V3, DatasetIndex, Recipe
from dali_pipes.augment import why_not_fused
from trainer.config import ConfigError

SWEEP_ROUNDS = 3
BackEnd = Literal["dali", "fused"]


@dataclass(frozen=True)
class Ablation:
    """The cost of each augmentation, alone and among the others."""

    common: Common = field(default_factory=Common)
    augment: tuple[BackEnd, ...] | None = None
    """Back ends; None: dali, and on a GPU also fused."""
    batch_size: int | None = None
    """Images a batch; None: 256 on a GPU, 8 on the CPU."""
    image_size: int = 224
    """Side of the views, in pixels."""
    preset: str = ""
    """Whose step the shares are of; empty: vit-s-300ep on a GPU, demo on the CPU."""
    batches: int = 4
    """Of one window: the same ones for every variant, so that their draws cancel in a difference."""
    per_view: bool = True
    """Also each view by itself."""
    sweeps: bool = True
    """Also vary how often jitter and blur apply, and how wide the blur is."""


@dataclass(frozen=True)
class Bench:
    """What all measurements of a run have in common."""

    images: DatasetIndex
    batch: int
    size: int
    threads: int
    device: torch.device
    batches: int
    progress: Progress

    def measure(self, group: str, members: Mapping[str, Recipe], augment: BackEnd, rounds: int) -> list[Measurement]:
        """Every recipe by that back end, in turns."""
        contenders = [
            Contender(group, name, Views(self.images, r, self.batch, self.size, self.threads, self.device, augment))
            for name, r in members.items()
        ]
        return list(measure(contenders, rounds, 0.0, self.device, self.progress, self.batches, profiled=True))


def measure_ablation(flags: Ablation, device: torch.device, progress: Progress) -> Result:
    """Run the benchmark."""
    common, cuda = flags.common, device.type == "cuda"
    if flags.image_size < 8 or (flags.batch_size is not None and flags.batch_size < 1) or flags.batches < 1:
        raise ConfigError("--image-size takes 8 or more, --batch-size and --batches 1 or more")
    no_fused = why_not_fused(device, MOCO_V3)
    if no_fused and flags.augment and "fused" in flags.augment:
        raise ConfigError(f"--augment fused: {no_fused}")
    usual: tuple[BackEnd, ...] = ("dali",) if no_fused else ("dali", "fused")
    back_ends = flags.augment or usual
    started, env = now(), environment(device)
    threads = common.threads
    batch = given(flags.batch_size, 256 if cuda else 8)
    rounds = 2 if common.quick else common.rounds
    config = training_config(
        device,
        progress.say,
        preset=flags.preset,
        batch_size=max(2, batch),
        image_size=flags.image_size,
        compile="off" if common.quick else "auto",
    )
    found = common.index(progress)
    images = first(found, max(len(found), batch, 2))

    progress.say(f"the step that shares are of: {config.model.arch}, compile {config.run.compile} …")
    step = step_cost(config, device, images, threads, rounds)
    bench = Bench(images, batch, flags.image_size, threads, device, flags.batches, progress)
    quantities = (DEVICE, CPU) if cuda else (CPU, WALL)
    measurements: list[Measurement] = []
    notes = [f"Without fused: {no_fused}."] if no_fused and cuda else []
    for augment in back_ends:
        for which, recipe in recipes(flags.per_view and not common.quick).items():
            group = f"{which}, {augment}"
            runs = in_milliseconds(bench.measure(group, variants(recipe), augment, rounds))
            per_image = step.per_image[quantities[0]]
            measurements += [*runs.values(), *costs(group, runs, quantities, per_image, headline=which == BOTH)]
            notes.append(explanation(group, runs, quantities[0]))
        for name, members in sweeps().items() if flags.sweeps and not common.quick else ():
            taken = bench.measure(f"{name}, {augment}", members, augment, min(rounds, SWEEP_ROUNDS))
            measurements += [replace(m, detail=False) for m in in_milliseconds(taken).values()]
    notes.append(
        f"A step is {number(step.per_image[quantities[0]])} {quantities[0]} without its data, measured in this run: "
        f"{step.described}."
    )
    if cuda:
        notes.append("Device time is that of kernels and copies; the JPEG engine's work is not in it.")
    return Result(
        benchmark="ablation",
        subject="" if back_ends == usual else " and ".join(back_ends),
        created=started,
        environment=env,
        configuration={
            "quick": common.quick,
            "batch": batch,
            "image_size": flags.image_size,
            "threads": threads,
            "rounds": rounds,
            "batches": flags.batches,
            "back_ends": list(back_ends),
            "per_view": flags.per_view,
            "sweeps": flags.sweeps,
            "step": step.described,
            "probability": {name: [getattr(view, name) for view in MOCO_V3.views] for name in AUGMENTATIONS},
            "data": "generated" if common.data is None else common.data.name,
            "files": describe(images),
        },
        warm_up="before each window, as many batches as the loader may hold ready; 3 steps before the step",
        measurements=tuple(measurements),
        notes=tuple(notes),
    )


def draw(result: Result) -> Figure:
    """Costs of both views and of each, then the sweeps; a column a back end, or a quantity where there is one."""
    back_ends: list[str] = result.configuration["back_ends"]
    quantities = [DEVICE, CPU] if result.environment["device"] == "cuda" else [CPU, WALL]
    columns = [(b, quantities[0]) for b in back_ends] if len(back_ends) > 1 else [(back_ends[0], q) for q in quantities]
    costed = [which for which in recipes(per_view=True) if result.of(f"{which}, {back_ends[0]}")]
    swept = [name for name in sweeps() if result.of(f"{name}, {back_ends[0]}")]
    heights = [round(charts.BARS_A_PAIR * len(used(recipes(per_view=True)[which]))) for which in costed]
    heights += [len(sweeps()[name]) for name in swept]
    chart, axes = charts.figure(result, "What each augmentation costs", heights, columns=2)
    for row, name in zip(axes, [*costed, *swept], strict=True):
        for cell, (back_end, quantity) in zip(row, columns, strict=True):
            cell.set_title(f"{name}, {back_end}", fontsize=10, loc="left")
            if name in swept:
                charts.bars(cell, [m for m in result.of(f"{name}, {back_end}") if m.quantity == quantity], quantity)
                continue
            found = result.of(f"{name}, {back_end}: costs")
            pairs = {how: [m for m in found if m.quantity == f"{quantity} {how}"] for how in (LEFT_OUT, ALONE)}
            charts.paired_bars(cell, pairs, quantity)
    return chart


if __name__ == "__main__":
    sys.exit(run(Ablation, measure_ablation, draw))
