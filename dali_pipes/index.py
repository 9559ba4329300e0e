"""The dataset as a table: every image file once, with its label and size; what cannot be read is set aside."""

import hashlib
import itertools
import json
import os
import threading
import warnings
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_pipes.file_check import MOST_PIXELS, Level, check_file
from dali_pipes.listing import DatasetError, Listing, leaves, listing
from dali_pipes.replacing import replacing
from dali_pipes.scan_cache import Looks, ScanCache, default_file, joined, split, stamp

Pathlike = str | os.PathLike[str]

_BESIDE = "lies beside the class folders and so is of no class; move it into one"
_BEFORE = "was set aside at first, and stays so"
READERS = 16  # threads: most of the work is waiting for the disk
CALLS = 1000  # of a progress, about
LARGEST_PORTION = 256  # files that a thread takes at once: what it has not done with at a Ctrl-C is lost


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """Rows of images not known to be bad; made by `scan`, kept by `save` and `load`.

    A flat folder, images without class folders, and a list without labels have no `classes`, and label 0 in every row.
    """

    tree: Path
    names: list[str]  # relative to the tree, with "/"
    labels: NDArray[np.int64]
    widths: NDArray[np.int32]  # as stored in the file: an EXIF orientation is not applied
    heights: NDArray[np.int32]
    file_sizes: NDArray[np.int64]  # bytes; 0 where it is not known
    classes: tuple[str, ...]
    rejected: list[tuple[str, str]]  # (path, reason)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        """One file's path; a run takes them one by one, and so does not hold ImageNet's names twice in every rank."""
        name = self.names[row]
        return name if os.path.isabs(name) else self._prefix + name

    @cached_property
    def _prefix(self) -> str:
        return os.path.join(self.tree, "")

    @cached_property
    def paths(self) -> list[str]:
        """All files' paths, which open as they stand."""
        return [self.path(row) for row in range(len(self))]

    @cached_property
    def fingerprint(self) -> str:
        """Of the rows and their order, 32 hexadecimal digits; the place of the tree is no part of it."""
        digest = hashlib.sha256(joined(self.names))
        for column in (self.labels, self.widths, self.heights):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()[:32]

    @classmethod
    def scan(
        cls,
        tree: Pathlike,
        level: Level = "header",
        progress: Callable[[int, int], None] | None = None,
        cache: Pathlike | None = None,
        outside: bool = False,
    ) -> "DatasetIndex":
        """Looks at every image file below `tree`: classes and rows in torchvision's ImageFolder order.

        Args:
            tree: one folder a class (files below it at any depth, links followed; a hidden one without images is no
                class, and images beside the folders are set aside), or images without class folders; or a list file
                with a line `path[ label]` an image, relative to the list's folder and not leaving it, labels whole
                numbers from 0 in every line or in none: rows are then in the list's order.
            level: "header" reads type, size and end marker of each file; "full" decodes every pixel.
            progress: called now and then, at most about a thousand times, with the number of files looked at, and of
                all; and once at the end.
            cache: file of what earlier scans of this tree found: a good file of the same size and modification time is
                not opened again. Default: the user's own, under $XDG_CACHE_HOME or ~/.cache.
            outside: a list may name files outside of its folder.

        Raises:
            DatasetError: no such folder or list, no image in it that can be read, or a line of the list is wrong.
        """
        found = listing(Path(tree), outside)
        remembered = ScanCache(Path(cache) if cache is not None else default_file(Path(tree), level), level)
        looks = _looked_at(found, level, progress, remembered)
        rejected = [(os.path.join(found.root, found.names[row]), reason) for row, reason in looks.reasons.items()]
        good = [row for row in range(len(looks)) if row not in looks.reasons]
        if not good:
            path, reason = rejected[0]
            raise DatasetError(f"{tree}: none of {len(looks)} images can be read; {path}: {reason}")
        rejected += [(os.path.join(found.root, name), _BESIDE) for name in found.beside]
        return cls(
            tree=found.root,
            names=[found.names[row] for row in good],
            labels=np.array([found.labels[row] for row in good], np.int64),
            widths=looks.widths[good],
            heights=looks.heights[good],
            file_sizes=np.maximum(looks.sizes[good], 0),
            classes=found.classes,
            rejected=rejected,
        )

    def labelled_as(self, other: "DatasetIndex") -> bool:
        """Whether both have labels that mean the same: of the same classes, or numbers, all of them the other's."""
        numbers = tuple(map(str, range(len(self.classes))))
        same = self.classes == other.classes or self.classes == numbers == other.classes[: len(numbers)]
        return bool(self.classes) and same

    def found_again(self, now: "DatasetIndex") -> tuple["DatasetIndex", list[int]] | None:
        """These rows in a later scan of the tree, and which of them it does not have as they were.

        What was set aside at first and can be used by now is no row of either. The first index is this one, with the
        file sizes of now, and with all that was set aside, then or now, or is lost. None if there are other images
        besides, or other labels.
        """
        if self.classes != now.classes:
            return None
        found = {name: row for row, name in enumerate(now.names)}
        rows = np.array([found.pop(name, -1) for name in self.names], np.int64)
        there = rows >= 0
        mine, reasons = set(self.names), dict(now.rejected)
        aside = {name: why for path, why in self.rejected if (name := path.removeprefix(self._prefix)) not in mine}
        if (now.labels[rows] != self.labels)[there].any() or found.keys() - aside.keys():
            return None
        same = there & (now.widths[rows] == self.widths) & (now.heights[rows] == self.heights)
        lost = np.flatnonzero(~same).tolist()
        for row in lost:
            reasons.setdefault(self.path(row), "another image than before" if there[row] else "no longer there")
        for name, why in aside.items():
            reasons.setdefault(os.path.join(self.tree, name), why if why.startswith(_BEFORE) else f"{_BEFORE} ({why})")
        sizes = np.where(there, now.file_sizes[rows], self.file_sizes)
        return replace(self, file_sizes=sizes, rejected=list(reasons.items())), lost

    def without(self, rows: Collection[int]) -> "DatasetIndex":
        """A copy that lacks these rows."""
        return self.at(np.setdiff1d(np.arange(len(self)), np.array(sorted(rows), np.int64)))

    def at(self, rows: NDArray[np.int64]) -> "DatasetIndex":
        """A copy with these rows, in this order."""
        return replace(
            self,
            names=[self.names[row] for row in rows.tolist()],
            labels=self.labels[rows],
            widths=self.widths[rows],
            heights=self.heights[rows],
            file_sizes=self.file_sizes[rows],
        )

    def save(self, file: Pathlike) -> None:
        """Writes the index as an .npz file, in one move; paths are kept relative to the tree."""
        aside = [(path.removeprefix(self._prefix), reason) for path, reason in self.rejected]
        text = {
            "tree": str(self.tree.absolute()),
            "classes": self.classes,
            "set_aside": aside,
            "outside": any(map(leaves, self.names)),
        }
        with replacing(Path(file)) as stream:
            np.savez(
                stream,
                names=np.frombuffer(joined(self.names), np.uint8),
                labels=self.labels,
                widths=self.widths,
                heights=self.heights,
                file_sizes=self.file_sizes,
                text=np.frombuffer(json.dumps(text).encode(), np.uint8),
            )

    @classmethod
    def load(cls, file: Pathlike, tree: Pathlike | None = None) -> "DatasetIndex":
        """Reads what `save` wrote; `tree` is where the images are now, if they were moved.

        Nothing in the file is executed, and it takes no more memory than it has bytes on disk, whatever it claims.

        Raises:
            DatasetError: the file is missing, cannot be read, or is no index.
        """
        try:
            with zipfile.ZipFile(file) as archive:
                text = json.loads(_column(archive, "text", np.uint8).tobytes())
                tree = Path(text["tree"] if tree is None else tree)
                labels = _column(archive, "labels", np.int64)
                sized = "file_sizes.npy" in archive.namelist()
                index = cls(
                    tree=tree,
                    names=split(_column(archive, "names", np.uint8)),
                    labels=labels,
                    widths=_column(archive, "widths", np.int32),
                    heights=_column(archive, "heights", np.int32),
                    file_sizes=_column(archive, "file_sizes", np.int64) if sized else np.zeros_like(labels),
                    classes=tuple(text["classes"]),
                    rejected=[(os.path.join(tree, path), reason) for path, reason in text.get("set_aside", ())],
                )
                _check(index, bool(text["outside"]))
        except FileNotFoundError:
            raise DatasetError(
                f"{os.fspath(file)}: no such index; make it with DatasetIndex.scan(tree).save(file)"
            ) from None
        except OSError as error:
            raise DatasetError(f"{os.fspath(file)} cannot be read: {error.strerror}") from None
        except Exception as error:  # whatever bytes are in the file: zipfile, NumPy and JSON raise many types
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise DatasetError(
                f"{os.fspath(file)} is not a dataset index; scan the images again ({reason[:120]})"
            ) from None
        return index


def _column(archive: zipfile.ZipFile, name: str, dtype: type[np.generic]) -> NDArray[Any]:
    """One array of the file. NumPy's own reader allocates what the header claims before it reads."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{name} is compressed")
    with archive.open(entry) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{name} is an array of another version")
        shape, _, found = np.lib.format.read_array_header_1_0(member)
        content = member.read()
    if found != np.dtype(dtype) or shape != (len(content) // found.itemsize,) or len(content) % found.itemsize:
        raise ValueError(f"{name} has type {found}, shape {shape} and {len(content)} bytes")
    return np.frombuffer(content, dtype)


def _check(index: DatasetIndex, outside: bool) -> None:
    """Raise `ValueError` if rows do not belong together, or name what no scan could have found."""
    columns = (index.names, index.labels, index.widths, index.heights, index.file_sizes)
    rows = {len(column) for column in columns}
    if len(rows) != 1:
        raise ValueError(f"columns of {' and '.join(map(str, sorted(rows)))} rows")
    if not all(index.names) or (not outside and any(map(leaves, index.names))):
        raise ValueError("a path leaves the tree, or is empty")
    if not all(isinstance(word, str) for word in (*index.classes, *itertools.chain(*index.rejected))):
        raise ValueError("a class, path or reason is no text")
    if index.labels.min() < 0 or index.labels.max() >= max(1, len(index.classes)):
        raise ValueError("a label is of no class")
    pixels = index.widths.astype(np.int64) * index.heights
    if min(index.widths.min(), index.heights.min()) < 1 or pixels.max() > MOST_PIXELS:
        raise ValueError("an image has no size that can be")
    if index.file_sizes.min() < 0:
        raise ValueError("a file has less than no bytes")


def _looked_at(found: Listing, level: Level, progress: Callable[[int, int], None] | None, cache: ScanCache) -> Looks:
    """All files, many at a time; `progress` is called from here, not from the threads."""

    def look(names: list[str]) -> Looks:
        looks = []
        for name in names:
            if stopped.is_set():
                break  # after a Ctrl-C nobody waits for the rest
            path = os.path.join(found.root, name)
            before = stamp(path)  # taken first: a change while the file is read shows the next time
            known = cache.known(name, before)
            looks.append((before, known if known is not None else check_file(path, level)))
        return Looks.of(looks)

    count, done, told, stopped = len(found.names), 0, 0, threading.Event()
    step = max(1, count // CALLS)
    portion = min(step, LARGEST_PORTION)
    parts: list[Looks] = []
    # What Pillow warns of is rejected by `check_file`. The filter is the process's, so it is set around all threads.
    with warnings.catch_warnings(), ThreadPoolExecutor(READERS) as pool:
        warnings.simplefilter("ignore")
        try:
            for part in pool.map(look, [found.names[at : at + portion] for at in range(0, count, portion)]):
                parts.append(part)
                done += len(part)
                if progress is not None and (done - told >= step or done == count):
                    told = done
                    progress(done, count)
        finally:  # also after a Ctrl-C: what was looked at need not be again
            stopped.set()
            pool.shutdown(cancel_futures=True)
            looks = Looks.joined(parts)
            cache.save(found.names, looks)
    return looks
