"""Images a second, CPU time and device time an image of several sources, measured in turns."""

import time
from collections.abc import Sequence

import torch

from benchmarks.clocks import cpu_seconds, finish, wait_until_idle
from benchmarks.gpu import LEAST_SECONDS, EnergyMeter
from benchmarks.measure import turns
from benchmarks.progress import Progress
from benchmarks.results import Better, Measurement, ResultError
from benchmarks.source import Contender
from benchmarks.trace import device_milliseconds

RATE, CPU, DEVICE, ENERGY = "images/s", "CPU-ms/image", "device-ms/image", "images/J of the GPU"
BETTER: dict[str, Better] = {RATE: "higher", CPU: "lower", DEVICE: "lower", ENERGY: "higher"}
PROFILED_BATCHES = 4  # of a window under the profiler, which slows the host down: apart from the timed one


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    seconds: float,
    device: torch.device,
    progress: Progress,
    batches: int | None = None,
    profiled: bool = False,
) -> tuple[Measurement, ...]:
    """Each contender's quantities, `rounds` values each, one window of at least `seconds` a round.

    A round goes through all of them before the next begins, and each starts when the one before has come to rest: a
    loader that fills its queue in another's window would slow that one down and get its own batches for nothing.
    Closes the sources. Energy is the card's alone: of a loader that works on the host it says little.

    `batches`: windows of exactly so many, not of a time. Variants of one recipe are then at the same place of the data
    in every round, and what the draws there have in common cancels between them.
    `profiled`: on CUDA also the time that the device was busy, from a second and shorter window of each round.
    """
    taken: dict[tuple[str, str], dict[str, list[float]]] = {(c.group, c.name): {} for c in contenders}
    meter = EnergyMeter(device)
    progress.expect(rounds * len(contenders))
    try:
        for turn, c in turns(contenders, rounds):
            progress.part(f"{c.group}, {c.name}: round {turn + 1} of {rounds}")
            wait_until_idle(device)
            window = _window(c, seconds, batches, device, meter)
            if profiled and device.type == "cuda":
                window[DEVICE] = _device_time(c, device)
            for quantity, value in window.items():
                taken[c.group, c.name].setdefault(quantity, []).append(value)
    finally:
        for c in contenders:
            c.source.close()
    return tuple(
        Measurement(group, name, quantity, tuple(values), BETTER[quantity])
        for (group, name), quantities in taken.items()
        for quantity, values in quantities.items()
    )


def _window(
    c: Contender, seconds: float, batches: int | None, device: torch.device, meter: EnergyMeter
) -> dict[str, float]:
    """One steady stretch of one source, by quantity."""
    # What stood ready before the window began would be counted without having been made in it.
    for _ in range(c.source.in_flight):
        next(c.stream)
    finish(device)
    images, done = 0, 0
    energy, cpu, started = meter.joules(), cpu_seconds(), time.perf_counter()

    def over() -> bool:
        if batches is not None:
            return done >= batches
        return done > 0 and not done % c.source.burst and time.perf_counter() - started >= seconds

    while not over():
        images += next(c.stream)
        done += 1
    finish(device)
    elapsed, spent, after = time.perf_counter() - started, cpu_seconds() - cpu, meter.joules()
    window = {RATE: images / elapsed, CPU: 1000 * spent / images}
    if elapsed >= LEAST_SECONDS and energy is not None and after is not None and after > energy:
        window[ENERGY] = images / (after - energy)
    return window


def _device_time(c: Contender, device: torch.device) -> float:
    """Milliseconds an image that the device was busy: of as many whole batches as were taken, for the source's queue is
    full before and after.

    Raises:
        ResultError: the profiler saw none of it.
    """
    images = 0

    def work() -> None:
        nonlocal images
        for _ in range(PROFILED_BATCHES):
            images += next(c.stream)
        wait_until_idle(device)

    wait_until_idle(device)
    busy = device_milliseconds(work, device)
    if not busy:
        raise ResultError("torch.profiler saw no work of the GPU: CUPTI is missing here, or another profiler holds it")
    return busy / images
