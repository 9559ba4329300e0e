"""Images a second and CPU time an image of several sources, measured in turns."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.clocks import cpu_seconds, finish, wait_until_idle
from benchmarks.progress import Progress
from benchmarks.results import Measurement
from benchmarks.source import Contender

RATE, CPU = "images/s", "CPU-ms/image"


@dataclass(frozen=True)
class Window:
    """One steady stretch of one source."""

    images_per_second: float
    cpu_ms_per_image: float


def measure(
    contenders: Sequence[Contender], rounds: int, seconds: float, device: torch.device, progress: Progress
) -> tuple[Measurement, ...]:
    """Two measurements of each contender, `rounds` values each, one window of at least `seconds` a round.

    A round goes through all of them before the next begins, and each starts when the one before has come to rest: a
    loader that fills its queue in another's window would slow that one down and get its own batches for nothing.
    Closes the sources.
    """
    windows: dict[tuple[str, str], list[Window]] = {(c.group, c.name): [] for c in contenders}
    progress.expect(rounds * len(contenders))
    try:
        for turn in range(rounds):
            for c in contenders:
                progress.part(f"{c.group}, {c.name}: round {turn + 1} of {rounds}")
                wait_until_idle(device)
                windows[c.group, c.name].append(_window(c, seconds, device))
    finally:
        for c in contenders:
            c.source.close()
    measurements = []
    for (group, name), taken in windows.items():
        rates, costs = [w.images_per_second for w in taken], [w.cpu_ms_per_image for w in taken]
        measurements += [
            Measurement(group, name, RATE, tuple(rates), "higher"),
            Measurement(group, name, CPU, tuple(costs), "lower"),
        ]
    return tuple(measurements)


def _window(c: Contender, seconds: float, device: torch.device) -> Window:
    # What stood ready before the window began would be counted without having been made in it.
    for _ in range(c.source.in_flight):
        next(c.stream)
    finish(device)
    images, batches = 0, 0
    cpu, started = cpu_seconds(), time.perf_counter()
    while batches == 0 or batches % c.source.burst or time.perf_counter() - started < seconds:
        images += next(c.stream)
        batches += 1
    finish(device)
    elapsed, spent = time.perf_counter() - started, cpu_seconds() - cpu
    return Window(images / elapsed, 1000 * spent / images)
