"""The dataset as a table: every image file once, with its label and size; what cannot be read is set aside."""

import hashlib
import itertools
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_pipes.listing import DatasetError, leaves, listing

Level = Literal["header", "full"]
Pathlike = str | os.PathLike[str]

# what DALI decodes, by Pillow's name of the type; MPO is a camera's JPEG with a second picture behind it
_TYPES = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "JPEG2000")
_MOST_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a gigabyte as RGB
_TAIL = 4096  # bytes in which a JPEG's end marker is looked for; what cameras append is usually less
READERS = 16  # threads: most of the work is waiting for the disk


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
    classes: tuple[str, ...]
    rejected: list[tuple[str, str]]  # (path, reason)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        """One file's path; a run takes them one by one, and so does not hold ImageNet's names twice in every rank."""
        return os.path.join(self.tree, self.names[row])

    @cached_property
    def paths(self) -> list[str]:
        """All files' paths, which open as they stand."""
        return [self.path(row) for row in range(len(self))]

    @cached_property
    def fingerprint(self) -> str:
        """Of the rows and their order, 32 hexadecimal digits; the place of the tree is no part of it."""
        digest = hashlib.sha256(_joined(self.names))
        for column in (self.labels, self.widths, self.heights):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()[:32]

    @classmethod
    def scan(
        cls,
        tree: Pathlike,
        level: Level = "header",
        progress: Callable[[int, int], None] | None = None,
        outside: bool = False,
    ) -> "DatasetIndex":
        """Looks at every image file below `tree`: classes and rows in torchvision's ImageFolder order.

        Args:
            tree: one folder a class (files below it at any depth, links followed), or images without class folders; or
                a list file with a line `path[ label]` an image, relative to the list's folder and not leaving it,
                labels whole numbers from 0 in every line or in none: rows are then in the list's order.
            level: "header" reads type, size and end marker of each file; "full" decodes every pixel.
            progress: called now and then, at most about a thousand times, with the number of files looked at, and of
                all; and once at the end.
            outside: a list may name files outside of its folder.

        Raises:
            DatasetError: no such folder or list, no image in it that can be read, or a line of the list is wrong.
        """
        found = listing(Path(tree), outside)
        paths = [os.path.join(found.root, name) for name in found.names]
        checks = _checked(paths, level, progress)
        rejected = [(path, check.reason) for path, check in zip(paths, checks, strict=True) if check.reason]
        good = [row for row, check in enumerate(checks) if not check.reason]
        if not good:
            raise DatasetError(f"{tree}: none of {len(paths)} images can be read; {rejected[0][0]}: {rejected[0][1]}")
        return cls(
            tree=found.root,
            names=[found.names[row] for row in good],
            labels=np.array([found.labels[row] for row in good], np.int64),
            widths=np.array([checks[row].width for row in good], np.int32),
            heights=np.array([checks[row].height for row in good], np.int32),
            classes=found.classes,
            rejected=rejected,
        )

    def lost(self, now: "DatasetIndex") -> list[int] | None:
        """Rows that a later scan of the tree does not have as they were; None if the two differ in anything else."""
        if self.classes != now.classes:
            return None
        found = {name: row for row, name in enumerate(now.names)}
        rows = np.array([found.pop(name, -1) for name in self.names], np.int64)
        if found or (now.labels[rows] != self.labels)[rows >= 0].any():
            return None
        same = (rows >= 0) & (now.widths[rows] == self.widths) & (now.heights[rows] == self.heights)
        return np.flatnonzero(~same).tolist()

    def without(self, rows: Collection[int]) -> "DatasetIndex":
        """A copy that lacks these rows."""
        kept = np.setdiff1d(np.arange(len(self)), np.array(sorted(rows), np.int64))
        return replace(
            self,
            names=[self.names[row] for row in kept.tolist()],
            labels=self.labels[kept],
            widths=self.widths[kept],
            heights=self.heights[kept],
        )

    def save(self, file: Pathlike) -> None:
        """Writes the index as an .npz file, in one move; paths are kept relative to the tree."""
        text = {
            "tree": str(self.tree.absolute()),
            "classes": self.classes,
            "rejected": self.rejected,
            "outside": any(map(leaves, self.names)),
        }
        partly = f"{os.fspath(file)}.{os.getpid()}.part"
        with open(partly, "wb", opener=partial(os.open, mode=0o600)) as out:
            np.savez(
                out,
                names=np.frombuffer(_joined(self.names), np.uint8),
                labels=self.labels,
                widths=self.widths,
                heights=self.heights,
                text=np.frombuffer(json.dumps(text).encode(), np.uint8),
            )
        os.replace(partly, file)

    @classmethod
    def load(cls, file: Pathlike, tree: Pathlike | None = None) -> "DatasetIndex":
        """Reads what `save` wrote; `tree` is where the images are now, if they were moved.

        Nothing in the file is executed, and it takes no more memory than it has bytes on disk, whatever it claims.

        Raises:
            DatasetError: the file is missing or is no index.
        """
        try:
            with zipfile.ZipFile(file) as archive:
                text = json.loads(_column(archive, "text", np.uint8).tobytes())
                index = cls(
                    tree=Path(text["tree"] if tree is None else tree),
                    names=[os.fsdecode(name) for name in _column(archive, "names", np.uint8).tobytes().split(b"\0")],
                    labels=_column(archive, "labels", np.int64),
                    widths=_column(archive, "widths", np.int32),
                    heights=_column(archive, "heights", np.int32),
                    classes=tuple(text["classes"]),
                    rejected=[(path, reason) for path, reason in text["rejected"]],
                )
                _check(index, bool(text["outside"]))
        except FileNotFoundError:
            raise DatasetError(
                f"{os.fspath(file)}: no such index; make it with DatasetIndex.scan(tree).save(file)"
            ) from None
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
    rows = {len(index.names), len(index.labels), len(index.widths), len(index.heights)}
    if len(rows) != 1:
        raise ValueError(f"columns of {' and '.join(map(str, sorted(rows)))} rows")
    if not all(index.names) or (not outside and any(map(leaves, index.names))):
        raise ValueError("a path leaves the tree, or is empty")
    if not all(isinstance(word, str) for word in (*index.classes, *itertools.chain(*index.rejected))):
        raise ValueError("a class, path or reason is no text")
    if index.labels.min() < 0 or index.labels.max() >= max(1, len(index.classes)):
        raise ValueError("a label is of no class")
    pixels = index.widths.astype(np.int64) * index.heights
    if min(index.widths.min(), index.heights.min()) < 1 or pixels.max() > _MOST_PIXELS:
        raise ValueError("an image has no size that can be")


@dataclass(frozen=True)
class FileCheck:
    """What one look at a file found: its size, or the reason why it cannot be used."""

    width: int = 0
    height: int = 0
    reason: str = ""


def _checked(paths: list[str], level: Level, progress: Callable[[int, int], None] | None) -> list[FileCheck]:
    """All files, many at a time; `progress` is called from here, not from the threads."""
    checks = []
    # What Pillow warns of is rejected by `check_file`. The filter is the process's, so it is set around all threads.
    with warnings.catch_warnings(), ThreadPoolExecutor(READERS) as pool:
        warnings.simplefilter("ignore")
        for done, check in enumerate(pool.map(partial(check_file, level=level), paths), start=1):
            checks.append(check)
            if progress is not None and (done == len(paths) or done % max(1, len(paths) // 1000) == 0):
                progress(done, len(paths))
    return checks


def check_file(path: str, level: Level = "header") -> FileCheck:
    """Whether an image file can be used; never raises for what is wrong with the file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return FileCheck(reason="empty file")
            with Image.open(file) as image:
                width, height = image.size
                if image.format not in _TYPES:
                    return FileCheck(reason=f"{image.format} is not a type that the decoder reads")
                if width * height > _MOST_PIXELS:
                    return FileCheck(reason=f"{width} x {height} is over the limit of {_MOST_PIXELS} pixels")
                if level == "full" or not _ends(file, size, image.format):
                    image.load()
    except Image.UnidentifiedImageError:
        return FileCheck(reason=_unidentified(path))
    except Image.DecompressionBombError as error:
        return FileCheck(reason=str(error))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
        return FileCheck(reason=str(error) or type(error).__name__)
    return FileCheck(width, height)


def _unidentified(path: str) -> str:
    with open(path, "rb") as file:
        jpeg = file.read(2) == b"\xff\xd8"
    return "a JPEG that is damaged or of an unsupported kind, such as 12-bit" if jpeg else "not an image"


def _ends(file: BinaryIO, size: int, kind: str) -> bool:
    """Whether the file has its type's end mark where it should be; without one, only decoding tells."""
    marks = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
    if kind not in marks:
        return True
    place = file.tell()
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    file.seek(place)
    return marks[kind] in tail


def _joined(names: list[str]) -> bytes:
    return b"\0".join(os.fsencode(name) for name in names)
