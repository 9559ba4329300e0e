"""The dataset as a table: every image file once, with its label and size; what cannot be read is set aside."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Level = Literal["header", "full"]
Pathlike = str | os.PathLike[str]

# torchvision.datasets.folder.IMG_EXTENSIONS: what counts as an image by name
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# what DALI decodes, by Pillow's name of the type; MPO is a camera's JPEG with a second picture behind it
_TYPES = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "JPEG2000")
_MOST_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a gigabyte as RGB
_TAIL = 4096  # bytes in which a JPEG's end marker is looked for; what cameras append is usually less
_READERS = 16  # threads: most of the work is waiting for the disk


class DatasetError(ValueError):
    """The data on disk cannot be used as asked; one line that names the thing, its value and the mend."""


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """Rows of images not known to be bad; made by `scan`, kept by `save` and `load`.

    A flat folder, images without class folders, has no `classes`, and label 0 in every row.
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
    def scan(cls, tree: Pathlike, level: Level = "header") -> "DatasetIndex":
        """Looks at every image file below `tree`: classes and rows in torchvision's ImageFolder order.

        Args:
            tree: one folder a class (files below it at any depth, links followed), or images without class folders.
            level: "header" reads type, size and end marker of each file; "full" decodes every pixel.

        Raises:
            DatasetError: no such folder, no images in it, or none that can be read.
        """
        root = Path(tree)
        if not root.exists():
            raise DatasetError(f"{root}: no such folder")
        if not root.is_dir():
            raise DatasetError(f"{root} is a file; give the folder that holds the images")
        classes, files = _find(root)
        if not files:
            raise DatasetError(f"{root}: no images in it (looked for {', '.join(_EXTENSIONS)})")
        # What Pillow warns of is rejected below. The filter is the process's, so it is set around all threads.
        with warnings.catch_warnings(), ThreadPoolExecutor(_READERS) as pool:
            warnings.simplefilter("ignore")
            checks = list(pool.map(partial(check_file, level=level), (os.path.join(root, name) for name, _ in files)))
        good = [(*file, check) for file, check in zip(files, checks, strict=True) if not check.reason]
        rejected = [
            (os.path.join(root, name), check.reason)
            for (name, _), check in zip(files, checks, strict=True)
            if check.reason
        ]
        if not good:
            raise DatasetError(f"{root}: none of {len(files)} images can be read; {rejected[0][0]}: {rejected[0][1]}")
        return cls(
            tree=root,
            names=[name for name, _, _ in good],
            labels=np.array([label for _, label, _ in good], np.int64),
            widths=np.array([check.width for _, _, check in good], np.int32),
            heights=np.array([check.height for _, _, check in good], np.int32),
            classes=classes,
            rejected=rejected,
        )

    def save(self, file: Pathlike) -> None:
        """Writes the index as an .npz file, in one move; paths are kept relative to the tree."""
        text = {"tree": str(self.tree.absolute()), "classes": self.classes, "rejected": self.rejected}
        partly = f"{os.fspath(file)}.{os.getpid()}.part"
        with open(partly, "wb") as out:
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

        Raises:
            DatasetError: the file is missing or is no index.
        """
        try:
            with np.load(file, allow_pickle=False) as columns:
                text = json.loads(columns["text"].tobytes())
                return cls(
                    tree=Path(text["tree"] if tree is None else tree),
                    names=[os.fsdecode(name) for name in columns["names"].tobytes().split(b"\0")],
                    labels=columns["labels"],
                    widths=columns["widths"],
                    heights=columns["heights"],
                    classes=tuple(text["classes"]),
                    rejected=[(path, reason) for path, reason in text["rejected"]],
                )
        except FileNotFoundError:
            raise DatasetError(
                f"{os.fspath(file)}: no such index; make it with DatasetIndex.scan(tree).save(file)"
            ) from None
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DatasetError(f"{os.fspath(file)} is not a dataset index; scan the images again ({error})") from None


@dataclass(frozen=True)
class FileCheck:
    """What one look at a file found: its size, or the reason why it cannot be used."""

    width: int = 0
    height: int = 0
    reason: str = ""


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


def _find(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Classes, and (name relative to the root, label) of every file that is an image by its name."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    files = []
    for label, name in enumerate(classes):
        folders = sorted(os.walk(root / name, followlinks=True))
        files += [(os.path.relpath(os.path.join(f, n), root), label) for f, _, ns in folders for n in _images(ns)]
    if files:
        return tuple(classes), files
    return (), [(name, 0) for name in _images(entry.name for entry in os.scandir(root) if entry.is_file())]


def _images(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(_EXTENSIONS))


def _joined(names: list[str]) -> bytes:
    return b"\0".join(os.fsencode(name) for name in names)
