"""How a long look at many files shows that it moves on."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dali_pipes.index import DatasetIndex

_SILENCE = 30.0  # seconds between lines of progress where no terminal shows it live


@contextmanager
def counting(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Gives what to call with the number of things done and of all: shown live on a terminal until the block ends.

    Elsewhere a line every half a minute, so that a quick count says nothing.
    """
    said, live = time.monotonic(), console.is_terminal
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not live,
    ) as bar:
        task = bar.add_task(what, total=None)

        def count(done: int, total: int) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total)
            if not live and time.monotonic() - said > _SILENCE:
                with suppress(OSError):  # a log on a full disk is no reason to end
                    console.print(f"{what}: {done} of {total}", markup=False, highlight=False, soft_wrap=True)
                said = time.monotonic()

        yield count


def scan_shown(tree: Path, outside: bool = False, console: Console | None = None) -> DatasetIndex:
    """`DatasetIndex.scan`, whose first look at a large tree takes minutes, with its progress: on stderr by default."""
    with counting(f"looking at the images in {tree}", console or Console(stderr=True)) as progress:
        return DatasetIndex.scan(tree, progress=progress, outside=outside)
