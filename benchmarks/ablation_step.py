"""What a training step costs, for the share of it that an augmentation takes: measured in the ablation's own run."""

import time
from dataclasses import dataclass

import torch

from benchmarks.ablation_costs import WALL
from benchmarks.clocks import cpu_seconds, finish, wait_until_idle
from benchmarks.measure import estimate
from benchmarks.throughput import CPU, DEVICE
from dali_pipes import DatasetIndex
from trainer.config import Config
from trainer.distributed import World
from trainer.engine import Engine, build_model

WARM_UP, STEPS = 3, 2


@dataclass(frozen=True)
class StepCost:
    """Medians, by quantity, of a step without its data; and a sentence that says of which step."""

    per_image: dict[str, float]
    described: str


def step_cost(config: Config, device: torch.device, index: DatasetIndex, threads: int, rounds: int) -> StepCost:
    """The trainer's step on a batch that stays on the device; everything in `config` is resolved.

    On CUDA the step's device time is its wall time: nothing in it waits for the host.
    """
    batch = config.optim.batch_size
    engine = Engine(config, World(), device, index, build_model(config), threads)
    views = next(iter(engine.loader)).views
    engine.loader.close()
    for _ in range(WARM_UP):
        engine.train_step(views)
    taken: dict[str, list[float]] = {WALL: [], CPU: []}
    for _ in range(rounds):
        wait_until_idle(device)
        cpu, started = cpu_seconds(), time.perf_counter()
        for _ in range(STEPS):
            engine.train_step(views)
        finish(device)
        taken[WALL].append(1000 * (time.perf_counter() - started) / STEPS / batch)
        taken[CPU].append(1000 * (cpu_seconds() - cpu) / STEPS / batch)
    per_image = {quantity: estimate(values).median for quantity, values in taken.items()}
    if device.type == "cuda":
        per_image[DEVICE] = per_image[WALL]
    model, run = config.model, config.run
    sizes = "".join(f", {name.replace('_', ' ')} {value}" for name, value in model.backbone.items())
    described = (
        f"{model.arch}{sizes} at {config.data.image_size} px on a cached batch of {batch}, "
        f"amp {run.amp}, compile {run.compile}"
    )
    return StepCost(per_image, described)
