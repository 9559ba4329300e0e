"""Do the benchmarks' intervals hold what they promise? The same measurement over and over, each judged by the next.

    python -m benchmarks.coverage [--reruns 10] [--rounds 7] [--seconds 0.3] [--help]

An interval says where the median of a rerun falls (`benchmarks.measure`). Here a quick loader benchmark runs eleven
times on end, and of each run's interval is asked whether it holds the median of the run after it: exit code 1 if fewer
do than on a machine whose state does not change between runs in 99 of 100 cases, else 0.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import dali_sources
from benchmarks.command import Setting
from benchmarks.environment import busy, environment
from benchmarks.measure import Estimate, estimate
from benchmarks.progress import Progress
from benchmarks.results import ResultError
from benchmarks.source import Contender, Source
from benchmarks.tables import number, spread
from benchmarks.throughput import RATE, measure
from dali_pipes import MOCO_V3, DatasetError, DatasetIndex
from trainer.config import ConfigError

CHANCE = 0.01  # that a machine in one state is taken for one that changes
TRIALS = 2000
GROUP = "loader"


@dataclass(frozen=True)
class Coverage:
    """How often an interval holds the median of a rerun."""

    common: Setting = field(default_factory=lambda: Setting(images=64))
    reruns: int = 10
    """Intervals that are judged, each by the run after it."""
    batch_size: int = 8
    """Images a batch."""
    image_size: int = 96
    """Side of the views, in pixels."""
    seconds: float = 0.3
    """At least so long does one window last."""


def covered(runs: Sequence[Estimate]) -> list[bool]:
    """Of each run but the last, whether its interval holds the median of the next."""
    return [before.low <= after.median <= before.high for before, after in itertools.pairwise(runs)]


def least(repeats: int, runs: int, measurements: int) -> int:
    """How many intervals hold on a machine in one state, but for the share `CHANCE` of such series.

    By simulation: a run is judged by its neighbour and judges the other, so the verdicts are not independent. Which
    orders of the repeats come up does not depend on their distribution.
    """
    rng = np.random.default_rng(0)
    hits = [
        sum(sum(covered([estimate(row.tolist()) for row in series])) for series in trial)
        for trial in rng.random((TRIALS, measurements, runs, repeats))
    ]
    return int(np.quantile(hits, CHANCE, method="lower"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 as on a machine in one state, 1 not, 2 wrong use."""
    flags = tyro.cli(Coverage, prog="python -m benchmarks.coverage", args=argv, config=(tyro.conf.OmitArgPrefixes,))
    progress = Progress("coverage")
    try:
        flags.common.check()
        if min(flags.reruns, flags.batch_size) < 1 or flags.image_size < 8 or not 0 < flags.seconds < math.inf:
            raise ConfigError("--reruns and --batch-size take 1 or more, --image-size 8 or more, --seconds more than 0")
        device = flags.common.chosen_device()
        facts, images = environment(device), flags.common.readable_by_all(progress)
        runs = [_run(flags, images, device, progress) for _ in range(flags.reruns + 1)]
    except (ConfigError, DatasetError, ResultError, OSError) as error:
        print(f"benchmarks.coverage: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        progress.clear()
    return _report({name: [run[name] for run in runs] for name in runs[0]}, busy(facts))


def _run(flags: Coverage, images: DatasetIndex, device: torch.device, progress: Progress) -> dict[str, Estimate]:
    """One run of a loader benchmark as any user starts it, pipelines built anew: rates by name."""
    threads = flags.common.threads
    batch = flags.batch_size
    sources: dict[str, Source] = {
        "dali: decode only": dali_sources.decode_only(images, batch, threads, device),
        "dali: two views": dali_sources.Views(images, MOCO_V3, batch, flags.image_size, threads, device),
    }
    contenders = [Contender(GROUP, name, source) for name, source in sources.items()]
    taken = measure(contenders, flags.common.rounds, flags.seconds, device, progress)
    return {m.name: estimate(m.values) for m in taken if m.quantity == RATE}


def _report(runs: dict[str, list[Estimate]], shared: str) -> int:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    table = Table("run", *runs, box=None, pad_edge=False)
    verdicts = {name: covered(estimates) for name, estimates in runs.items()}
    count = len(next(iter(runs.values())))
    for i in range(count):
        cells = []
        for name, estimates in runs.items():
            said = "" if i + 1 == count else ", holds the next" if verdicts[name][i] else ", MISSES the next"
            cells.append(f"{spread(estimates[i])}{said}")
        table.add_row(str(i + 1), *cells)
    console.print(table)
    judged = [verdict for each in verdicts.values() for verdict in each]
    stated = min(e.coverage for estimates in runs.values() for e in estimates)
    enough = least(next(iter(runs.values()))[0].repeats, count, len(runs))
    share = number(100 * sum(judged) / len(judged))
    console.print(
        f"{sum(judged)} of {len(judged)} intervals ({share} %) hold the median of the rerun; "
        f"stated: {100 * stated:.0f} %. A machine in one state has {enough} or more in 99 of 100 cases."
    )
    if shared:
        console.print(shared, markup=False)
    return 0 if sum(judged) >= enough else 1


if __name__ == "__main__":
    sys.exit(main())
