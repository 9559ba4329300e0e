"""How many cores this process may use: a container's share, where it is less than the machine's."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
FILESYSTEM = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores of the CPU affinity, or what the control groups' quota comes to, rounded up, if that is less.

    `docker --cpus` and Kubernetes' limits set a quota and leave the affinity at all of the machine's cores.
    """
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """Quotas in cores of this process's control group and of those it lies in (cgroups(7))."""
    try:
        lines = GROUPS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        tops, below = {"cpu", controllers} if controllers else {""}, Path(path.lstrip("/"))
        # A container may be told the path that its group has outside, where its own group is at the top.
        for group in (FILESYSTEM / top / each for top in tops for each in (below, *below.parents)):
            with suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (group / "cpu.max").read_text().split()
                if quota != "max" and int(quota) > 0:
                    yield int(quota) / int(period)
