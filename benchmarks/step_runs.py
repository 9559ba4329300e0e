"""The kinds of step that are compared, run in turns: on JPEGs, on a cached batch, the loader alone, reference style."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import flops
from benchmarks.clocks import finish, wait_until_idle
from benchmarks.gpu import LEAST_SECONDS, EnergyMeter
from benchmarks.intervals import INTERVALS, StepClock, watched
from benchmarks.measure import estimate, turns
from benchmarks.progress import Progress
from benchmarks.reference_step import ReferenceStep
from benchmarks.trace import Beside, Trace, beside
from dali_pipes import Batch, DatasetIndex
from trainer.config import Config
from trainer.distributed import World
from trainer.engine import Engine, build_model

REAL, CACHED = "step on JPEGs", "step on a cached batch"
LOADER, REFERENCE = "loader alone", "reference-style step, cached batch"
QUEUE = 3  # batches that the loader may hold ready


class Runs:
    """One engine and its yardsticks on one device; results a round, in milliseconds a step."""

    def __init__(
        self, config: Config, device: torch.device, index: DatasetIndex, threads: int, reference: bool
    ) -> None:
        self.config, self.device = config, device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.engine = Engine(config, World(), device, index, build_model(config), threads)
        self.batches = _endless(self.engine)
        self.cached: tuple[Tensor, ...] = next(self.batches).views
        self.clock = StepClock(device)
        self.kinds = [REAL, CACHED, LOADER]
        self.milliseconds: dict[str, list[float]] = {}
        self.intervals: dict[str, list[list[dict[str, float]]]] = {REAL: [], CACHED: []}
        self.images_per_joule: dict[str, list[float]] = {}
        self.peak_gb: dict[str, float] = {}
        self._meter = EnergyMeter(device)
        self._joules: float | None = None  # of the last stretch
        self.left_out = ""
        self.reference: ReferenceStep | None = None
        if reference:
            self._add_reference()

    def _add_reference(self) -> None:
        """Its own model beside the engine's; a GPU that cannot hold both goes without."""
        try:
            self.reference = ReferenceStep(self.config, self.device)
            self._reference_views = [self.reference.prepared(view) for view in self.cached]
            self.kinds.append(REFERENCE)
        except torch.OutOfMemoryError:
            self._drop_reference()

    def _drop_reference(self) -> None:
        self.reference, self._reference_views = None, []
        self.kinds = [kind for kind in self.kinds if kind != REFERENCE]
        self.left_out = f"{REFERENCE}: left out, the GPU has no memory for it beside our step; lower --batch-size."

    @property
    def reference_settings(self) -> dict[str, Any]:
        """What the reference-style step does differently."""
        return {
            "compile": False,
            "amp": "fp16, loss scaler" if self.device.type == "cuda" else "off",
            "memory_format": "contiguous",
            "moving_average": "a Python loop over parameters",
            "optimizer": type(self.reference.optimizer).__name__ if self.reference else "",
            "host_waits_per_step": 2 if self.device.type == "cuda" else 0,
        }

    @property
    def multiplies_in(self) -> str:
        """What the engine multiplies in."""
        return {"bf16": "bfloat16", "fp16": "float16", "tf32": "TF32"}.get(self.config.run.amp, "float32")

    @property
    def reference_multiplies_alike(self) -> bool:
        """Whether the reference-style step multiplies at the engine's rate; on a GPU it does so in float16."""
        return self.device.type != "cuda" or self.multiplies_in in ("bfloat16", "float16")

    def matmul_rate(self) -> float:
        """FLOP/s of the best repeat."""
        dtype = getattr(torch, self.multiplies_in, torch.float32)  # TF32 is a float32 that the engine has let in
        return max(flops.matmul_rate(self.device, dtype))

    def flops(self) -> float:
        """Of one step."""
        return flops.step_flops(self.config, self.config.optim.batch_size)

    def warm_up(self, steps: int) -> None:
        """Run every kind: compilation, autotuning, allocator, and the optimizers' state."""
        for kind in list(self.kinds):
            if not self._fits(kind, steps):
                self._drop_reference()
                torch.cuda.empty_cache()

    def _fits(self, kind: str, steps: int) -> bool:
        """Run it; False if it is the reference, and the GPU has no memory for it, too."""
        cuda = self.device.type == "cuda"
        try:
            self._stretch(kind, steps - 1)
            if cuda:  # the compiler's own scratch memory is no part of a step
                torch.cuda.reset_peak_memory_stats(self.device)
                others = torch.cuda.memory_allocated(self.device) - self._resident_bytes(kind)
            self._stretch(kind, 1)
        except torch.OutOfMemoryError:
            if kind != REFERENCE:
                raise
            return False
        if cuda and kind != LOADER:
            self.peak_gb[kind] = (torch.cuda.max_memory_allocated(self.device) - others) / 1e9
        return True

    def _resident_bytes(self, kind: str) -> int:
        """Of what on the card belongs to this kind's step."""
        if kind == REFERENCE:
            assert self.reference is not None
            return resident_bytes(self.reference.model, self.reference.optimizer)
        return resident_bytes(self.engine.model, self.engine.optimizer, self.engine.guard.copies)

    def measure(self, rounds: int, steps: int, progress: Progress) -> None:
        """`rounds` times every kind in turn, `steps` steps each."""
        self.milliseconds = {kind: [] for kind in self.kinds}
        progress.expect(rounds * len(self.kinds))
        for turn, kind in turns(self.kinds, rounds):
            progress.part(f"{kind}: round {turn + 1} of {rounds}")
            wait_until_idle(self.device)
            self.milliseconds[kind].append(self._stretch(kind, steps))
            if self._joules:
                images = steps * self.config.optim.batch_size
                self.images_per_joule.setdefault(kind, []).append(images / self._joules)
            if kind in self.intervals:
                self.intervals[kind].append(self.clock.read())

    def median(self, kind: str) -> float:
        """Milliseconds a step."""
        return estimate(self.milliseconds[kind]).median

    def _stretch(self, kind: str, steps: int, warm: int = QUEUE) -> float:
        """Mean milliseconds of consecutive steps of one kind; where the loader works, after `warm` untimed ones.

        They bring its queue to where it is in a long run: full beside a slower step, empty where nothing else is done.
        """
        if kind in (REAL, CACHED):
            with watched(self.engine, self.clock):
                return self._timed(self._real if kind == REAL else self._cached, steps, warm * (kind == REAL))
        if kind == LOADER:
            return self._timed(lambda: next(self.batches), steps, warm)
        reference, (x1, x2) = self.reference, self._reference_views
        assert reference is not None
        lr, momentum = self.config.optim.lr, self.config.model.moco_m
        return self._timed(lambda: reference.train_step(x1, x2, lr, momentum), steps)

    def _timed(self, step: Callable[[], Any], steps: int, warm: int = 0) -> float:
        for _ in range(warm):
            step()
        self.clock.read()
        finish(self.device)
        before, started = self._meter.joules(), time.perf_counter()
        for _ in range(steps):
            step()
        finish(self.device)
        seconds, after = time.perf_counter() - started, self._meter.joules()
        self._joules = None if before is None or after is None or seconds < LEAST_SECONDS else after - before
        return 1000 * seconds / steps

    def _real(self) -> None:
        self.clock.begin()
        batch = next(self.batches)
        self.clock.switch("prepare")
        self.engine.train_step(batch.views)
        self.clock.end()

    def _cached(self) -> None:
        self.clock.begin()
        self.clock.switch("prepare")
        self.engine.train_step(self.cached)
        self.clock.end()

    def trace(self, file: Path, steps: int = 3) -> None:
        """Write torch.profiler's trace of steps on JPEGs, with ranges named as the intervals (NVTX on CUDA, too)."""
        clock, activities = self.clock, [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.clock = StepClock(self.device, ranges=True)
        wait_until_idle(self.device)
        with torch.profiler.profile(activities=activities) as profiler:
            # What the trace holds are steps, and as many batches as steps: the loader's queue is full at both ends.
            self._stretch(REAL, steps, warm=0)
            wait_until_idle(self.device)
        self.clock = clock
        profiler.export_chrome_trace(str(file))

    def beside(self, steps: int = 5) -> dict[str, Beside]:
        """Milliseconds a step on JPEGs of what runs on other streams, and the share that is hidden; CUDA only."""
        if self.device.type != "cuda":
            return {}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "trace.json")
            self.trace(file, steps)
            trace = Trace.read(file)
        training = trace.training_stream(INTERVALS[1:])  # waiting for data may lie on the kernels' own
        if training is None:
            return {}
        return {kind: Beside(b.milliseconds / steps, b.hidden) for kind, b in beside(trace, training).items()}

    def close(self) -> None:
        """Free the loader's pipeline."""
        self.engine.loader.close()


def _endless(engine: Engine) -> Iterator[Batch]:
    while True:
        yield from engine.loader


def resident_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer, kept: Sequence[Tensor] = ()) -> int:
    """Of all tensors that stay between steps: parameters, buffers, gradients, the optimizer's state, and `kept`."""
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [v for each in optimizer.state.values() for v in each.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in (*parameters, *model.buffers(), *gradients, *state, *kept))
