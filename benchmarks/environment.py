"""What a number was measured on: hardware, driver, versions, commit."""

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dali_pipes.cores import usable_cores

BUSY_SHARE = 0.1  # of the cores, from which on a machine counts as shared
LOOK_SECONDS = 1.0
ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "numpy", "pillow")


def environment(device: torch.device) -> dict[str, Any]:
    """JSON-ready facts; what cannot be found out is None.

    `hardware` is the short name by which results are told apart. `busy_cores` says how many cores others kept busy when
    the benchmark started. Takes a second, to see that.
    """
    cores = usable_cores()
    gpu = _gpu(device) if device.type == "cuda" else None
    return {
        "hardware": gpu["name"] if gpu else f"{cpu_model()} {cores} cores",
        "device": device.type,
        "cpu": cpu_model(),
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "busy_cores": _busy_cores(),
        "gpu": gpu,
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "torch_threads": torch.get_num_threads(),
        **commit(),
    }


def busy(facts: dict[str, Any]) -> str:
    """A sentence if others used the machine when the benchmark started, else nothing."""
    if facts["busy_cores"] < BUSY_SHARE * facts["cores"]:
        return ""
    load = f"others used {facts['busy_cores']} of {facts['cores']} cores at the start"
    return f"The machine was busy: {load}; these numbers are not its best."


def _busy_cores() -> float:
    """Of this process's cores, how many others keep busy now; the load average counts what ran a minute ago, too.

    Of a quota of them: in proportion.
    """
    total, own = _seconds_of_cores(), time.process_time()
    time.sleep(LOOK_SECONDS)
    spent = _seconds_of_cores() - total - (time.process_time() - own)
    share = usable_cores() / len(os.sched_getaffinity(0))
    return round(max(0.0, share * spent / LOOK_SECONDS), 2)


def _seconds_of_cores() -> float:
    """CPU time of this process's cores since the machine started, without idling and waiting for disks (proc_stat(5)):
    in a container the machine's other cores are somebody else's.
    """
    own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        core, *numbers = line.split()
        if core in own:
            user, nice, system, _, _, *interrupts = map(int, numbers[:7])
            ticks += user + nice + system + sum(interrupts)
    return ticks / os.sysconf("SC_CLK_TCK")


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def commit() -> dict[str, Any]:
    """The commit of this checkout, and whether the code differs from it; None where git does not tell.

    Results that a benchmark wrote do not make the code another one.
    """
    head = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/REPORT.*")
    return {"commit": head, "dirty": None if head is None or changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_model() -> str | None:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "visible": torch.cuda.device_count(),
    }


def _driver() -> str | None:
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def package_version(package: str) -> str | None:
    """Of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
