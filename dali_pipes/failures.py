"""Images that went bad since the scan: which they are, and how many are too many."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from dali_pipes.file_check import check_file
from dali_pipes.index import READERS, DatasetError, DatasetIndex
from dali_pipes.scan_cache import stamp


def tolerated(count: int) -> int:
    """How many of `count` images may go bad before a run stops: a thousandth, and in a small dataset 10.

    A thousandth is what a dying disk passes within minutes and what a few damaged sectors never reach. The floor lets
    a run over a few hundred images survive one file, too.
    """
    return max(10, count // 1000)


def gone_bad(index: DatasetIndex, rows: Iterable[int], failure: str) -> dict[int, str]:
    """Of the rows that DALI failed on, those whose files a second look finds unfit, each with "path: reason".

    Raises:
        DatasetError: every file decodes, so that the `failure` is DALI's own trouble.
    """
    chosen = sorted({int(row) for row in rows})
    with ThreadPoolExecutor(READERS) as pool:
        reasons = list(pool.map(lambda row: _reason(index, row), chosen))
    bad = {row: f"{index.path(row)}: {reason}" for row, reason in zip(chosen, reasons, strict=True) if reason}
    if not bad:
        raise DatasetError(f"DALI failed on a batch of readable files, the first {index.path(chosen[0])}: {failure}")
    return bad


def too_many(failed: int, allowed: int, last: str) -> DatasetError:
    """The error of a run that stops for its bad images; `last` is what is known of one of them."""
    return DatasetError(
        f"{failed} images went bad since they were scanned, and at most {allowed} may; {last}. "
        "Mend the files and run the same command again"
    )


def _reason(index: DatasetIndex, row: int) -> str:
    path, size = index.path(row), (int(index.widths[row]), int(index.heights[row]))
    check = check_file(path, "full")
    if check.reason:
        return check.reason
    if (check.width, check.height) != size:
        return f"another image: {check.width} x {check.height}, and {size[0]} x {size[1]} when it was scanned"
    now, scanned = stamp(path), int(index.file_sizes[row])
    if now is not None and now[0] < scanned:
        return f"another image: {now[0]} bytes, and {scanned} when it was scanned"
    return ""
