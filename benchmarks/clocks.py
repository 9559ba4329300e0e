"""Two clocks: CPU time of this process with its workers, and wall time of work that a device does."""

import multiprocessing
import time

import torch

IDLE_SHARE = 0.1  # of one core, below which the process counts as idle
POLL_SECONDS = 0.04
PATIENCE_SECONDS = 20.0


def cpu_seconds() -> float:
    """CPU time of all threads of this process and of its live child processes (DataLoader's workers)."""
    return time.process_time() + sum(_cpu_seconds_of(child.pid) for child in multiprocessing.active_children())


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
        torch.cuda.synchronize(device)
