"""Which change makes the step fast? From the reference-style step to the trainer's, one change a row.

    python -m benchmarks.variants [--presets vit-s-300ep vit-b-300ep r50-100ep] [--batch-size 256] [--quick] [--help]

All rows of an architecture are measured in turns, on one batch that stays on the device; the experiments after them,
each alone, for what CUDA graphs reserve they keep.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from matplotlib.figure import Figure

from benchmarks import charts, flops
from benchmarks.clocks import finish, wait_until_idle
from benchmarks.command import Common, given, run
from benchmarks.environment import environment, now
from benchmarks.float8 import multiplies_float8
from benchmarks.generated import describe, first
from benchmarks.measure import turns
from benchmarks.progress import Progress
from benchmarks.reference_step import Changes, ReferenceStep, side_by_side
from benchmarks.results import Measurement, Result, ResultError
from benchmarks.step import training_config
from benchmarks.step_runs import resident_bytes
from dali_pipes import DatasetIndex
from trainer import config as configuration
from trainer.config import Config, ConfigError
from trainer.distributed import World
from trainer.engine import Engine, build_model

REFERENCE, OURS = "reference-style step", "train_ddp.py's step"
# Each row keeps the changes of those above it. AMP comes after the optimizer, because bf16 also ends the loss scaler.
BF16, ONE_PASS = "+ bf16, no loss scaler", "+ both views in one pass"
ADDED: dict[str, dict[str, Any]] = {
    "+ moving average in one call": {"foreach_ema": True},
    "+ fused optimizer": {"fused_optimizer": True},
    BF16: {"amp": "bf16"},
    "+ no wait for the loss": {"no_host_wait": True},
    "+ channels_last": {"channels_last": True},
    "+ views as bytes": {"uint8": True},
    "+ torch.compile": {"compile": True},
    ONE_PASS: {"one_pass": True},
}
# Each with all of the changes above, and not in the trainer's step.
CUDA_GRAPHS, FLOAT8 = "experiment: CUDA graphs", "experiment: float8 linear layers"
EXPERIMENTS: dict[str, dict[str, Any]] = {CUDA_GRAPHS: {"cuda_graphs": True}, FLOAT8: {"float8": True}}
ROWS = (REFERENCE, *ADDED, OURS, *EXPERIMENTS)
VIT_ROWS = (ONE_PASS, FLOAT8)  # a ResNet has batch norm in its backbone, and no linear layers
NO_ROOM = "the GPU has no memory for it beside the others; lower --batch-size"
PRESETS = ("vit-s-300ep", "vit-b-300ep", "r50-100ep")
QUANTITIES = ("images/s", "ms/step", "MFU, %", "peak memory, GB")
WARM_UP = 3
SMALL = {"moco_mlp_dim": 512}  # on the CPU
SMALL_VIT = {**SMALL, "depth": 2}


@dataclass(frozen=True)
class Variants:
    """The step with one change a row."""

    common: Common = field(default_factory=Common)
    presets: tuple[str, ...] = PRESETS
    """Of train_ddp.py; a table each."""
    batch_size: int | None = None
    """Images a step; None: 256 on a GPU, 4 on the CPU."""
    image_size: int | None = None
    """Side of the views, in pixels; None: 224 on a GPU; 32 on the CPU, where the models are smaller, too."""
    compile: Literal["auto", "on", "off"] = "on"
    """The rows that compile; off where there is no compiler."""
    steps: int | None = None
    """Steps a round; None: 20 on a GPU, 1 on the CPU."""


def measure_variants(flags: Variants, device: torch.device, progress: Progress) -> Result:
    """Run the benchmark."""
    common, cuda = flags.common, device.type == "cuda"
    if flags.steps is not None and flags.steps < 1:
        raise ConfigError(f"--steps {flags.steps} is too small; use 1 or more")
    if not flags.presets:
        raise ConfigError(f"--presets takes one or more of: {', '.join(PRESETS)}")
    started, env = now(), environment(device)
    batch, size = given(flags.batch_size, 256 if cuda else 4), given(flags.image_size, 224 if cuda else 32)
    rounds = 3 if common.quick else common.rounds
    steps = given(flags.steps, 1 if not cuda else 5 if common.quick else 20)
    # The compiled rows are what the table is about: also in the short form.
    settings: dict[str, Any] = {"batch_size": batch, "image_size": size, "compile": flags.compile}
    configs = [_small(training_config(device, progress.say, preset=name, **settings)) for name in flags.presets]
    images = common.index(progress)
    bound = max(flops.matmul_rate(device, torch.bfloat16 if cuda else torch.float32))
    measurements: list[Measurement] = []
    notes: list[str] = []
    for config in configs:
        progress.say(f"{config.model.arch}: building and warming up {len(ROWS) - len(EXPERIMENTS)} steps …")
        with side_by_side():
            try:
                rows = Rows(config, device, first(images, max(len(images), batch)), common.threads)
            except torch.OutOfMemoryError:
                rows = None
            if rows is None:  # out of the block above, in which the error keeps its memory
                notes.append(f"{config.model.arch} left out: the GPU has no memory for it; lower --batch-size.")
                _free(device)
                continue
            rows.measure(rounds, steps, progress)
            if not common.quick:
                rows.experiment(rounds, steps, progress)
        measurements += rows.measurements(bound)
        notes += [f"{config.model.arch}: {note}" for note in rows.left_out]
        del rows
        torch.compiler.reset()  # else it keeps compiled models, and what their CUDA graphs reserved
        _free(device)
    if not measurements:
        raise ResultError(" ".join(notes))
    if common.quick:
        notes.append(f"Left out in the short form: {', '.join(EXPERIMENTS)}.")
    bound_of = "bf16" if cuda else "float32"
    notes.append(f"MFU is of the {bound / 1e12:.3g} TFLOP/s of a {bound_of} matmul, measured in this run.")
    if not cuda:
        small = f"ViTs of {SMALL_VIT['depth']} blocks, heads {SMALL['moco_mlp_dim']} wide"
        notes.append(f"On the CPU at small size ({small}), AMP off: that it runs, not what a GPU would show.")
    return Result(
        benchmark="variants",
        subject="" if flags.presets == PRESETS else " and ".join(config.model.arch for config in configs),
        created=started,
        environment=env,
        configuration={
            "quick": common.quick,
            "archs": [config.model.arch for config in configs],
            "batch_size": batch,
            "image_size": size,
            "amp": configs[0].run.amp,
            "compile": configs[0].run.compile,
            "rounds": rounds,
            "steps": steps,
            "data": "generated" if common.data is None else common.data.name,
            "files": describe(images),
        },
        warm_up=f"{WARM_UP} steps of each row, compilation included",
        measurements=tuple(measurements),
        notes=tuple(notes),
    )


def _small(config: Config) -> Config:
    """Of a size that the device can take."""
    if config.run.device == "cuda":
        return config
    return configuration.replace(config, **(SMALL_VIT if config.model.arch.startswith("vit_") else SMALL))


def _free(device: torch.device) -> None:
    """Memory of models that nothing refers to any more: they are cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Rows:
    """All steps of one architecture, side by side on one device; then the experiments."""

    def __init__(self, config: Config, device: torch.device, images: DatasetIndex, threads: int) -> None:
        self.config, self.device = config, device
        self.milliseconds: dict[str, list[float]] = {}
        self.peak_gb: dict[str, float] = {}
        self.left_out: list[str] = []
        self._steps: dict[str, Callable[[], Any]] = {}
        engine = Engine(config, World(), device, images, build_model(config), threads)
        self._views = next(iter(engine.loader)).views
        engine.loader.close()
        self._one_pass, copies = engine.model.one_pass, engine.guard.copies
        self._add(OURS, lambda: engine.train_step(self._views), engine.model, lambda: engine.optimizer, copies)
        for name, changes in _cumulative():
            reason = self._why_not(name, changes) or self._fits(name, changes)
            if reason:
                self._leave_out(name, reason)

    def _why_not(self, name: str, changes: Changes) -> str | None:
        """What keeps a row from being measured here, as one phrase; None if nothing does."""
        if changes.compile and self.config.run.compile == "off":
            return "nothing is compiled here"
        if name == BF16 and self.config.run.amp != "bf16":
            return f"--amp auto is {self.config.run.amp} on this device"
        if name == ONE_PASS and not self._one_pass:
            return "the backbone's batch norm takes its statistics from each view"
        if name == CUDA_GRAPHS and self.device.type != "cuda":
            return "the CPU has none"
        if name == FLOAT8 and not multiplies_float8(self.device):
            return "this device does not multiply float8"
        return None

    def _fits(self, name: str, changes: Changes) -> str | None:
        try:
            self._add_variant(name, changes)
        except torch.OutOfMemoryError:
            return NO_ROOM
        return None

    def _leave_out(self, name: str, reason: str) -> None:
        """Say why a row is not measured, and free what it took."""
        self.left_out.append(f"{name} left out: {reason}.")
        self._steps.pop(name, None)
        self.milliseconds.pop(name, None)
        self.peak_gb.pop(name, None)
        _free(self.device)

    def _add_variant(self, name: str, changes: Changes) -> None:
        if self.config.run.amp != "bf16":
            changes = replace(changes, amp=None)
        step = ReferenceStep(self.config, self.device, changes)
        x1, x2 = (step.prepared(view) for view in self._views)
        lr, momentum = self.config.optim.lr, self.config.model.moco_m
        self._add(name, lambda: step.train_step(x1, x2, lr, momentum), step.model, lambda: step.optimizer)

    def _add(
        self,
        name: str,
        step: Callable[[], Any],
        model: torch.nn.Module,
        optimizer: Callable[[], torch.optim.Optimizer],
        kept: Sequence[torch.Tensor] = (),
    ) -> None:
        """Warm it up, compilation included; its peak is over what its own model keeps, not over the others'."""
        cuda = self.device.type == "cuda"
        if cuda:
            others = torch.cuda.memory_allocated(self.device) - resident_bytes(model, optimizer(), kept)
        for turn in range(WARM_UP):
            if cuda and turn == WARM_UP - 1:  # the compiler's own scratch memory is no part of a step
                torch.cuda.reset_peak_memory_stats(self.device)
            step()
        finish(self.device)
        if cuda and name != CUDA_GRAPHS:  # a graph's memory is not counted while it is replayed
            self.peak_gb[name] = (torch.cuda.max_memory_allocated(self.device) - others) / 1e9
        self._steps[name] = step

    def measure(self, rounds: int, steps: int, progress: Progress) -> None:
        """`rounds` times every row in turn; a row that the GPU's memory turns out not to hold is left out."""
        names = [name for name in ROWS if name in self._steps]
        self.milliseconds |= {name: [] for name in names}
        progress.expect(rounds * len(names))
        for turn, name in turns(names, rounds):
            if name not in self._steps:
                continue
            progress.part(f"{self.config.model.arch}, {name}: round {turn + 1} of {rounds}")
            taken = self._time(name, steps)
            if taken is None:
                self._leave_out(name, NO_ROOM)
            else:
                self.milliseconds[name].append(taken)

    def _time(self, name: str, steps: int) -> float | None:
        """Milliseconds a step; None if the memory was not enough."""
        wait_until_idle(self.device)
        started = time.perf_counter()
        try:
            for _ in range(steps):
                self._steps[name]()
            finish(self.device)
        except torch.OutOfMemoryError:
            return None
        return 1000 * (time.perf_counter() - started) / steps

    def experiment(self, rounds: int, steps: int, progress: Progress) -> None:
        """Measure each of `EXPERIMENTS`; one that fails is left out, with the error for a reason."""
        *_, (_, changes) = _cumulative()
        for name, added in EXPERIMENTS.items():
            self._steps.clear()
            torch.compiler.reset()
            _free(self.device)
            reason = self._why_not(name, changes)
            if reason is None:
                try:
                    self._add_variant(name, replace(changes, **added))
                    self.measure(rounds, steps, progress)
                except Exception as error:  # of a compiler, a library, a driver: the other rows are not to be lost
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
            if reason:
                self._leave_out(name, reason)

    def measurements(self, bound: float) -> Iterator[Measurement]:
        """A table of this architecture; `bound` in FLOP/s."""
        batch, group = self.config.optim.batch_size, self.config.model.arch
        work = flops.step_flops(self.config, batch)
        rate, step, mfu, memory = QUANTITIES
        for name, taken in self.milliseconds.items():
            rates = tuple(1000 * batch / ms for ms in taken)
            # On a CPU the models are small ones: nothing to quote.
            headline = self.device.type == "cuda" and name in (REFERENCE, OURS)
            yield Measurement(group, name, rate, rates, "higher", headline)
            yield Measurement(group, name, step, tuple(taken), "lower")
            yield Measurement(group, name, mfu, tuple(100 * work / (ms / 1000) / bound for ms in taken), "higher")
            if name in self.peak_gb:
                yield Measurement(group, name, memory, (self.peak_gb[name],), "lower")


def _cumulative() -> Iterator[tuple[str, Changes]]:
    changes = Changes()
    yield REFERENCE, changes
    for name, added in ADDED.items():
        changes = replace(changes, **added)
        yield name, changes


def draw(result: Result) -> Figure:
    """Images a second and MFU of each architecture."""
    groups = result.groups()
    chart, axes = charts.figure(
        result,
        f"From the reference-style step to ours, batch {result.configuration['batch_size']}, "
        f"{result.configuration['image_size']} px",
        [len({m.name for m in result.of(g)}) for g in groups],
        columns=2,
    )
    for row, group in zip(axes, groups, strict=True):
        for cell, quantity, label in zip(
            row, (QUANTITIES[0], QUANTITIES[2]), ("source images/s (more is better)", "MFU, %"), strict=True
        ):
            charts.bars(cell, [m for m in result.of(group) if m.quantity == quantity], label, accent=[OURS])
            cell.set_title(group, fontsize=10, loc="left")
        row[1].set_yticklabels([])
    return chart


if __name__ == "__main__":
    sys.exit(run(Variants, measure_variants, draw))
