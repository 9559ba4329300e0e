"""What a run tells: `metrics.jsonl`, TensorBoard events and the console, and how long the step waited for data."""

import datetime
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from dali_pipes.replacing import write_atomically

METRICS = "metrics.jsonl"


class WaitClock:
    """Seconds that the device idled for the next batch, summed between two reads.

    On CUDA it is the training stream's own time between two events around the hand-over (the host runs ahead, its
    waiting says nothing); reading it needs the events to have happened, so read after the metrics were.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call that fetches the next batch."""
        if self._cuda:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            yield
            after.record()
            self._events.append((before, after))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def read(self) -> float:
        """Seconds since the last read."""
        seconds = self._seconds + sum(before.elapsed_time(after) for before, after in self._events) / 1e3
        self._events.clear()
        self._seconds = 0.0
        return seconds


class MetricsLog:
    """Rows of `metrics.jsonl` and the same numbers as TensorBoard events.

    Opened at a step, both are cut back to it, so that a run that went on has each step once.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]) -> None:
        self.file, self._warn = folder / METRICS, warn
        rows = [row for row in read_metrics(folder) if row["step"] <= step]
        write_atomically(self.file, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._rows = open(self.file, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._unwritten = b""
        self._tensorboard: SummaryWriter | None = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, JSON-ready, with its `step`; a number that is not finite becomes null, as JSON has none.

        A full disk costs a warning: the row is written with the next that finds room, TensorBoard has to do without.
        """
        finite = {key: None if isinstance(value, float) and value - value != 0 else value for key, value in row.items()}
        held_back, self._unwritten = bool(self._unwritten), self._unwritten + json.dumps(finite).encode() + b"\n"
        try:
            self._append()
        except OSError as error:
            if not held_back:
                self._warn(f"{self.file} cannot be written: {error.strerror}; training goes on, its rows follow later")
        self._draw(row)

    def sync(self) -> None:
        """Have the rows on the disk before a checkpoint is, or a crash of the machine would leave a gap in them."""
        with suppress(OSError):
            os.fsync(self._rows.fileno())

    def _append(self) -> None:
        """Write the rows that wait, all or none."""
        whole = os.fstat(self._rows.fileno()).st_size
        try:
            if self._rows.write(self._unwritten) != len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self._rows.truncate(whole)  # not half a row
            raise
        self._unwritten = b""

    def _draw(self, row: dict[str, Any]) -> None:
        if self._tensorboard is None:
            return
        try:
            for name, value in row.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(name, value, row["step"])
        except OSError as error:  # of its own thread, some rows ago
            self._tensorboard = None
            self._warn(f"no more TensorBoard events in this process: {error.strerror}")

    def close(self) -> None:
        """Flush both, with the rows that found no room before, if there is room now."""
        with suppress(OSError):
            self._append()
        self.sync()
        self._rows.close()
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole rows of a run's `metrics.jsonl`; what a crash cut off, or is none of ours, ends them."""
    file = folder / METRICS
    rows = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def forget(folder: Path) -> None:
    """Remove the metrics and TensorBoard events in a run's folder."""
    for file in (folder / METRICS, *folder.glob("events.out.tfevents.*")):
        file.unlink(missing_ok=True)


class Display:
    """Rank 0's view of the run: one live line on a terminal, a plain line a row elsewhere."""

    def __init__(self, shown: bool) -> None:
        self.console = Console(quiet=not shown, highlight=False, soft_wrap=True)
        self._any_rank = self.console if shown else Console(highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal and shown
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._live,
        )
        self._task: TaskID | None = None

    def start(self, step: int, total: int) -> None:
        """Show the bar, from this step on; the time left is reckoned from here."""
        self._total, self._first, self._started = total, step, time.monotonic()
        self._task = self._bar.add_task("training", total=total, completed=step)
        self._bar.start()

    def say(self, line: str) -> None:
        """A line of its own."""
        self._print(self.console, line)

    def warn(self, line: str) -> None:
        """A line that is shown on whichever rank it arises."""
        self._print(self._any_rank, f"warning: {line}")

    @staticmethod
    def _print(console: Console, line: str) -> None:
        with suppress(OSError):  # a log on a full disk is no reason to end a run
            console.print(line, markup=False)

    def show(self, row: dict[str, Any]) -> None:
        """A row of metrics."""
        text = (
            f"epoch {row['epoch']} loss {row['loss']:.4f} lr {row['lr']:.2e} "
            f"{row['images_per_second']:.0f} images/s data wait {row['data_wait']:.0%}"
        )
        if self._live and self._task is not None:
            self._bar.update(self._task, description=text, completed=row["step"])
            return
        left = (time.monotonic() - self._started) / (row["step"] - self._first) * (self._total - row["step"])
        self.say(f"step {row['step']}/{self._total} {text} ETA {datetime.timedelta(seconds=int(left))}")

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()
