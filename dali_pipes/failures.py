"""Images that passed the scan and cannot be used: which they are, how many are too many, and how to do without."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dali_pipes.file_check import FileCheck, check_file
from dali_pipes.index import READERS, DatasetError, DatasetIndex
from dali_pipes.plan import Plan, Position
from dali_pipes.scan_cache import stamp
from dali_pipes.stream import BrokenBatch, Stream

_TOGETHER = 16  # images that are decoded at once to find one that cannot be
_PAUSES = (1.0, 4.0, 15.0)  # seconds between looks at files that are away all at once; torchrun kills after 30


def tolerated(count: int) -> int:
    """How many of `count` images may fail before a run stops: a thousandth, and in a small dataset 10.

    A thousandth is what a dying disk passes within minutes and what a few damaged sectors never reach. The floor lets
    a run over a few hundred images survive one file, too.
    """
    return max(10, count // 1000)


class DiskAway(DatasetError):
    """None of some files can be read, and their disk was waited for."""


def unusable(index: DatasetIndex, rows: Iterable[int], failure: str, stream: Stream) -> dict[int, str]:
    """Of the rows that the stream's DALI failed on, those whose files are unfit, each with "path: reason".

    Pillow looks first, as its reasons say more; only if it finds nothing wrong DALI decodes them, a few at a time.
    Files that are away all at once are waited for: it is their disk.

    Raises:
        DatasetError: every file decodes, or nothing does, so that the `failure` is DALI's own trouble.
        DiskAway: they are still away.
    """
    chosen = sorted({int(row) for row in rows})
    # Fewer than 4 may be missing by chance: then some from all over the index are looked at, too.
    seen = chosen if len(chosen) >= 4 else sorted({*chosen, *np.linspace(0, len(index) - 1, 4).astype(int).tolist()})
    found = _unfit(index, seen)
    for pause in _PAUSES:
        if not _away(found, seen):
            break
        time.sleep(pause)
        found = _unfit(index, seen)
    if _away(found, seen):
        first = f"{index.path(chosen[0])}: {found[chosen[0]].reason}"
        raise DiskAway(f"none of {len(seen)} files can be read, the first {first}; is their disk still there?")
    reasons = {row: found[row].reason for row in chosen if row in found}
    if not reasons and _decodes(stream):
        reasons = _undecoded(index, chosen, stream)
    if not reasons:
        raise DatasetError(f"DALI failed on a batch of readable files, the first {index.path(chosen[0])}: {failure}")
    return {row: f"{index.path(row)}: {reason}" for row, reason in reasons.items()}


def _unfit(index: DatasetIndex, rows: list[int]) -> dict[int, FileCheck]:
    with ThreadPoolExecutor(READERS) as pool:
        checks = list(pool.map(lambda row: _look(index, row), rows))
    return {row: check for row, check in zip(rows, checks, strict=True) if check.reason}


def _away(found: dict[int, FileCheck], rows: list[int]) -> bool:
    return len(found) == len(rows) >= 4 and all(check.of_disk for check in found.values())


def _decodes(stream: Stream) -> bool:
    """Whether the stream's DALI decodes at all: after an error of the GPU it does not."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "good.jpg")
        Image.new("RGB", (16, 16)).save(file)
        try:
            stream.decode([file])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
    return True


def _undecoded(index: DatasetIndex, rows: list[int], stream: Stream) -> dict[int, str]:
    """Of these rows, those that DALI fails on, or decodes to another size than was scanned; found by halving."""
    if len(rows) <= _TOGETHER:
        try:
            images = stream.decode([index.path(row) for row in rows])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if len(rows) == 1:
                return {rows[0]: "the decoder cannot read it, although Pillow can"}
        else:
            return _of_another_size(index, rows, images)
    half = len(rows) // 2
    return _undecoded(index, rows[:half], stream) | _undecoded(index, rows[half:], stream)


def _of_another_size(index: DatasetIndex, rows: list[int], images: list[NDArray[np.uint8]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for row, image in zip(rows, images, strict=True):
        height, width, _ = image.shape
        if (width, height) != (index.widths[row], index.heights[row]):
            scanned = f"{index.widths[row]} x {index.heights[row]}"
            found[row] = f"decoded to {width} x {height} pixels, and {scanned} when it was scanned"
    return found


class Salvager:
    """Takes the batches of a stream; an image that cannot be used is reported and failed in the plan, up to a limit.

    Args:
        stream: of the plan.
        plan: of the batches; it says what stands in for what failed.
        on_failed: called with one line for each image that is found.
        consequence: what becomes of its place, for the line.
        most: images that may fail (default: `tolerated`).
    """

    def __init__(
        self, stream: Stream, plan: Plan, on_failed: Callable[[str], None], consequence: str, most: int | None = None
    ) -> None:
        self._stream, self._plan, self._on_failed, self._consequence = stream, plan, on_failed, consequence
        self._most = tolerated(len(plan.index)) if most is None else most

    def take(self, position: Position) -> tuple[NDArray[np.int64], tuple[torch.Tensor, ...]]:
        """The batch of that position. A failure costs a new pipeline and a look at the files, and is rare.

        Raises:
            DatasetError: too many images failed, or DALI did on good ones.
        """
        retried = False
        while True:
            try:
                return self._stream.take(position)
            except BrokenBatch as broken:
                rows, failure = broken.rows, str(broken)
            # Out here, where an error drags neither DALI's traceback nor the broken pipeline along. What was failed
            # before may be among the rows that were read ahead; it is no news, and explains the failure.
            try:
                found = unusable(self._plan.index, rows, failure, self._stream)
            except DatasetError as error:
                if retried or isinstance(error, DiskAway):
                    raise
                retried = True  # the disk may have stumbled: once more, before it counts as DALI's own trouble
                continue
            for row, reason in found.items():
                if row not in self._plan.failed:
                    self._on_failed(f"{reason}; it passed the scan and cannot be used, {self._consequence}")
                    self.fail(self._plan.failed | {row}, f"the last is {reason}")

    def fail(self, failed: frozenset[int], last: str) -> None:
        """These rows, and no others, have failed; `last` is what is known of one of them.

        Raises:
            DatasetError: these are too many.
        """
        if len(failed) > self._most:
            raise DatasetError(
                f"{len(failed)} images that passed the scan cannot be used, and at most {self._most} may fail; {last}. "
                "Mend the files and run the same command again"
            )
        self._plan.fail(failed)


def _look(index: DatasetIndex, row: int) -> FileCheck:
    path, size = index.path(row), (int(index.widths[row]), int(index.heights[row]))
    check = check_file(path, "full")
    if check.reason:
        return check
    if (check.width, check.height) != size:
        seen = f"{check.width} x {check.height}, and {size[0]} x {size[1]}"
        return FileCheck(reason=f"another image: {seen} when it was scanned")
    now, scanned = stamp(path), int(index.file_sizes[row])
    if now is not None and scanned and now[0] != scanned:
        return FileCheck(reason=f"another image: {now[0]} bytes, and {scanned} when it was scanned")
    return check
