"""Two clocks: CPU time of this process with its workers, and wall time of work that a device does."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

IDLE_SHARE = 0.1  # of one core, below which the process counts as idle
POLL_SECONDS = 0.04
PATIENCE_SECONDS = 20.0
_looking_on = 0.0  # CPU seconds
_lock = threading.Lock()


def cpu_seconds() -> float:
    """CPU time of all threads of this process and of its live child processes (DataLoader's workers), without what was
    spent `looking_on`.
    """
    children = sum(_cpu_seconds_of(child.pid) for child in multiprocessing.active_children())
    return time.process_time() - _looking_on + children


@contextmanager
def looking_on() -> Iterator[None]:
    """Around what one thread does to watch the measured work: its CPU time is none of that work's."""
    global _looking_on
    before = time.thread_time()
    try:
        yield
    finally:
        with _lock:
            _looking_on += time.thread_time() - before


def _cpu_seconds_of(pid: int | None) -> float:
    # The kernel's id of another process's CPU clock (clock_getcpuclockid(3)): nanoseconds, and no /proc to parse.
    try:
        return time.clock_gettime((~pid << 3) | 2) if pid else 0.0
    except OSError:  # it has just ended
        return 0.0


def wait_until_idle(device: torch.device) -> None:
    """Wait for what is still under way (prefetching, queued kernels), so that it is not charged to the next one."""
    finish(device)
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while time.perf_counter() < deadline:
        before = cpu_seconds()
        time.sleep(POLL_SECONDS)
        if cpu_seconds() - before < IDLE_SHARE * POLL_SECONDS:
            break
    finish(device)


def finish(device: torch.device) -> None:
    """Wait until the device has done all that was queued; the CPU has nothing queued."""
    if device.type == "cuda":
        with looking_on():  # it spins: the wait for the GPU would pass for CPU time of the work
            torch.cuda.synchronize(device)
