"""The training step cut into consecutive intervals, from outside: the very `Engine.train_step` that trains is timed.

A clock is switched from one interval to the next where a public part of the model begins, so the intervals follow each
other without a gap and sum to the step by construction. On CUDA a switch records an event on the training stream: what
is measured is the device's time, and nothing in the step waits.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model import contrastive
from trainer.engine import Engine

# In the order of the step. "prepare" is the schedules and zero_grad; "backward" begins where the loss is known, and
# holds DDP's averaging and the unscaling of fp16; "gather" is what is left to wait of the exchange of the keys, which
# began before "forward q".
INTERVALS = (
    "data wait",
    "prepare",
    "EMA",
    "forward k",
    "forward q",
    "gather",
    "loss",
    "backward",
    "optimizer",
)
Mark = float | torch.cuda.Event


class StepClock:
    """Intervals of consecutive steps; read them after the last one.

    With `ranges` each interval is also a range of the profiler and of NVTX, under the same name.
    """

    def __init__(self, device: torch.device, ranges: bool = False) -> None:
        self._cuda, self._ranges = device.type == "cuda", ranges
        self._device = device
        self._steps: list[list[tuple[str, Mark]]] = []
        self._range: Any = None

    def begin(self) -> None:
        """A step begins, with its wait for data."""
        self._steps.append([])
        self.switch(INTERVALS[0])

    def switch(self, interval: str) -> None:
        """The interval before ends here and this one begins."""
        self._steps[-1].append((interval, self._mark()))
        self._enter(interval)

    def end(self) -> None:
        """The step ends."""
        self._steps[-1].append(("", self._mark()))
        self._enter(None)

    def read(self) -> list[dict[str, float]]:
        """Milliseconds of each interval, a dict a step, and forget them; waits for the device.

        An interval that the step entered several times is the sum, one that it never entered is 0.
        """
        if self._cuda:
            torch.cuda.synchronize(self._device)
        steps = []
        for marks in self._steps:
            step = dict.fromkeys(INTERVALS, 0.0)
            for (name, start), (_, stop) in itertools.pairwise(marks):
                step[name] += _milliseconds(start, stop)
            steps.append(step)
        self._steps = []
        return steps

    def _mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, interval: str | None) -> None:
        if not self._ranges:
            return
        if self._range is not None:
            self._range.__exit__(None, None, None)
            if self._cuda:
                torch.cuda.nvtx.range_pop()
        self._range = torch.profiler.record_function(interval) if interval is not None else None
        if self._range is not None:
            self._range.__enter__()
            if self._cuda:
                torch.cuda.nvtx.range_push(interval)


def _milliseconds(start: Mark, stop: Mark) -> float:
    if isinstance(start, float) and isinstance(stop, float):
        return 1000 * (stop - start)
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(stop, torch.cuda.Event)
    return float(start.elapsed_time(stop))


@contextmanager
def watched(engine: Engine, clock: StepClock) -> Iterator[None]:
    """Within it, every step of the engine switches the clock where its parts begin."""
    moco = engine.model
    parts = {"encode": "forward q", "update_momentum": "EMA", "keys": "forward k"}

    def announced(part: Callable[..., Any], interval: str, then: str | None = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            clock.switch(interval)
            result = part(*args, **kwargs)
            if then is not None:
                clock.switch(then)
            return result

        return call

    for method, interval in parts.items():
        setattr(moco, method, announced(getattr(moco, method), interval))
    moco.loss = announced(moco.loss, "loss", then="backward")
    finish = contrastive.finish
    contrastive.finish = announced(finish, "gather", then="loss")
    hook = engine.optimizer.register_step_pre_hook(lambda *_: clock.switch("optimizer"))
    try:
        yield
    finally:
        hook.remove()
        contrastive.finish = finish
        for method in (*parts, "loss"):
            delattr(moco, method)  # the class's own shows again
