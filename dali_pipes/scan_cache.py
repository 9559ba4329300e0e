"""What earlier scans of a tree found, file by file, so that the next one opens only what is new or has changed."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from dali_pipes.file_check import FileCheck, Level
from dali_pipes.replacing import replacing

Stamp = tuple[int, int]  # size in bytes, modification time in nanoseconds since 1970
_VERSION = 6  # of the format, and of what makes `check_file` reject
# A file that changed so short before it was looked at could change again within the same tick of its disk's clock.
_SETTLED = 2_000_000_000  # nanoseconds; the coarsest clock, FAT's, ticks every two seconds
_UNKNOWN = (-1, -1)  # stands for the stamp of what is not to be remembered
_COLUMNS = {"sizes": np.int64, "times": np.int64, "widths": np.int32, "heights": np.int32}


@dataclass(frozen=True, eq=False)
class Looks:
    """What was found in N files: arrays of N, and the reasons of those that cannot be used, by their place."""

    sizes: NDArray[np.int64]
    times: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    reasons: dict[int, str]

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def of(cls, looks: Sequence[tuple[Stamp | None, FileCheck]]) -> "Looks":
        """Each file's stamp before it was looked at, None if there is no file, and what was found."""
        # A file that cannot be used is looked at each time: mended, it may have the size and the time that it had.
        # So is one whose time the column does not hold: of the year 2262 and later.
        kept = [now if now is not None and not check.reason and now[1] < 2**63 else _UNKNOWN for now, check in looks]
        numbers = (
            [now[0] for now in kept],
            [now[1] for now in kept],
            [check.width for _, check in looks],
            [check.height for _, check in looks],
        )
        columns = {name: np.array(column, kind) for (name, kind), column in zip(_COLUMNS.items(), numbers, strict=True)}
        return cls(**columns, reasons={i: check.reason for i, (_, check) in enumerate(looks) if check.reason})

    @classmethod
    def joined(cls, parts: Sequence["Looks"]) -> "Looks":
        """One after the other."""
        columns = {
            name: np.concatenate([np.zeros(0, kind), *(getattr(part, name) for part in parts)])
            for name, kind in _COLUMNS.items()
        }
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        places = zip(starts, parts, strict=False)
        reasons = {start + i: reason for start, part in places for i, reason in part.reasons.items()}
        return cls(**columns, reasons=reasons)

    def at(self, rows: Sequence[int]) -> "Looks":
        """Those of these places, none of which has a reason."""
        return Looks(**{name: getattr(self, name)[list(rows)] for name in _COLUMNS}, reasons={})


def stamp(path: str) -> Stamp | None:
    """Of the file itself, where the path is a link; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # no name at all, with a zero byte in it
        return None
    return status.st_size, status.st_mtime_ns


def default_file(tree: Path, level: Level) -> Path | None:
    """Where this user keeps what is known of that tree or list; None without a home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    key = hashlib.sha256(os.fsencode(os.path.abspath(tree)) + b"\0" + level.encode()).hexdigest()[:32]
    return home / "moco-v3-dali" / f"{key}.npz"


class ScanCache:
    """The content of such a file; empty if it is missing, damaged, or of another version of this code or of Pillow."""

    def __init__(self, file: Path | None, level: Level) -> None:
        self._file, self._kind = file, f"{_VERSION} {level} Pillow {PIL.__version__}"
        self._started = time.time_ns()
        self._rows: dict[str, int] = {}
        self._looks = Looks.joined([])
        if file is None:
            return
        # Where there is none, or whatever is wrong with it: the images can be looked at again.
        with suppress(Exception), np.load(file, allow_pickle=False) as stored:
            self._read(stored)

    def _read(self, stored: Any) -> None:
        text = json.loads(stored["text"].tobytes())
        if text["kind"] != self._kind:
            return
        names = split(stored["names"])
        columns = {name: stored[name].astype(kind) for name, kind in _COLUMNS.items()}
        if {len(column) for column in columns.values()} != {len(names)}:
            return
        self._looks = Looks(**columns, reasons={})
        self._rows = {name: row for row, name in enumerate(names)}

    def known(self, name: str, now: Stamp | None) -> FileCheck | None:
        """What was found in the file when it had this stamp; None if that is not known."""
        row, looks = self._rows.get(name), self._looks
        if row is None or now != (looks.sizes[row], looks.times[row]):
            return None
        return FileCheck(int(looks.widths[row]), int(looks.heights[row]))

    def save(self, names: list[str], looks: Looks) -> None:
        """Write what is known now, in one move, for this user only; without the room or the right to, nothing.

        Args:
            names: of all the tree's files.
            looks: at the first of them, or at all; of the others the file keeps what it had.
        """
        lasting = np.flatnonzero((looks.times >= 0) & (looks.times < self._started - _SETTLED)).tolist()
        unseen = [name for name in names[len(looks) :] if name in self._rows]
        kept = Looks.joined([looks.at(lasting), self._looks.at([self._rows[name] for name in unseen])])
        names = [names[row] for row in lasting] + unseen
        same = names == list(self._rows) and all(
            np.array_equal(getattr(kept, name), getattr(self._looks, name)) for name in ("sizes", "times")
        )
        if self._file is None or same:
            return
        text = json.dumps({"kind": self._kind}).encode()
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(self._file) as stream:
                np.savez(
                    stream,
                    names=np.frombuffer(joined(names), np.uint8),
                    text=np.frombuffer(text, np.uint8),
                    **{name: getattr(kept, name) for name in _COLUMNS},
                )
        except OSError:
            return


def joined(names: list[str]) -> bytes:
    """File names as bytes, which may be no UTF-8."""
    return b"\0".join(os.fsencode(name) for name in names)


def split(stored: NDArray[np.uint8]) -> list[str]:
    """The names of a non-empty list that `joined` made."""
    return [os.fsdecode(name) for name in stored.tobytes().split(b"\0")]
