"""Which files a dataset consists of, and their labels: a tree of class folders, a flat folder, or a list file."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# torchvision.datasets.folder.IMG_EXTENSIONS: what counts as an image by name in a folder
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_MOST_LABELS = 1_000_000  # in a list: above, the number is no class, and a table of classes would fill the memory


class DatasetError(ValueError):
    """The data on disk cannot be used as asked; one line that names the thing, its value and the mend."""


@dataclass(frozen=True)
class Listing:
    """Files that are images by their names, nothing read yet: names relative to `root`, with "/"."""

    root: Path
    classes: tuple[str, ...]  # empty: no labels, and 0 in every row
    names: list[str]
    labels: list[int]
    beside: tuple[str, ...] = ()  # images outside the class folders, where there are such: not used


def training_tree(data: Path) -> Path:
    """Where the images of a `--data` are: its train/, if there is one, else itself."""
    train = data / "train"
    return train if os.path.isdir(train) else data  # which, unlike Path's, never raises


def validation_tree(data: Path) -> Path | None:
    """What features of a `--data` are judged on: val/ beside its train/, or val.txt beside the list train.txt.

    None if there is no such folder or list.
    """
    if data.is_file():
        val = data.with_name("val.txt")
        return val if data.name == "train.txt" and val.is_file() else None
    val = data / "val"
    return val if training_tree(data) != data and val.is_dir() else None


def beside_training_tree(data: Path) -> list[str]:
    """Folders beside a train/, with its val/ and hidden ones left out: maybe train is a class as well."""
    if training_tree(data) == data:
        return []
    with suppress(OSError):
        return sorted(
            e.name for e in os.scandir(data) if e.is_dir() and e.name not in ("train", "val") and e.name[0] != "."
        )
    return []


def leaves(name: str) -> bool:
    """Whether a name relative to a folder is of something outside of it."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def listing(path: Path, outside: bool = False) -> Listing:
    """The files of a folder, in the order of torchvision's ImageFolder, or of a list file, in its own order.

    `outside`: the list may name files outside of its folder.

    Raises:
        DatasetError: there is nothing there, no image in it, or a line of the list cannot be used.
    """
    try:
        if not path.exists():
            raise DatasetError(f"{path}: no such folder")
        found = _tree(path) if path.is_dir() else _list(path, outside)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    if not found.names:
        raise DatasetError(f"{path}: no images in it" + (f" (looked for {', '.join(_EXTENSIONS)})" * path.is_dir()))
    return found


def _tree(root: Path) -> Listing:
    classes: list[str] = []
    files: list[tuple[str, int]] = []
    for name in sorted(e.name for e in os.scandir(root) if _is_folder(e) and not _leads_up(str(root), e.name)):
        before = len(files)
        for folder, found in sorted(_folders(str(root / name))):
            inside = os.path.relpath(folder, root)
            files += [(f"{inside}/{image}", len(classes)) for image in _images(found)]
        # Where ImageFolder refuses an empty folder, it is a class that may have lost its files; a hidden one, a tool's.
        if len(files) > before or not name.startswith("."):
            classes.append(name)
    flat = _images(entry.name for entry in os.scandir(root) if not _is_folder(entry))
    if files:
        return Listing(root, tuple(classes), [name for name, _ in files], [label for _, label in files], tuple(flat))
    return Listing(root, (), flat, [0] * len(flat))


def _folders(top: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `top` down with the names of its files, links followed but for those that lead back up."""
    for folder, inner, files in os.walk(top, onerror=_unlisted, followlinks=True):
        inner[:] = [name for name in inner if not _leads_up(folder, name)]
        yield folder, files


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise DatasetError(f"{entry.path}: cannot be looked at: {error.strerror}") from None


def _leads_up(folder: str, name: str) -> bool:
    """Whether it is a link to the folder that it lies in, or to one above that, or to one that led here by a link."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    target, here = os.path.realpath(path), Path(os.path.abspath(folder))
    way = [os.path.realpath(each) for each in (here, *here.parents)]
    return any(os.path.commonpath([real, target]) == target for real in way)


def _unlisted(error: OSError) -> None:
    """A folder that is passed over would be a class without images."""
    raise DatasetError(f"{error.filename}: cannot be listed: {error.strerror}")


def _images(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(_EXTENSIONS))


def _list(file: Path, outside: bool) -> Listing:
    """Lines of `path` or `path label`; a last word that is a whole number is the label, so paths may hold blanks."""
    with open(file, "rb") as stream:
        if b"\0" in stream.read(4096):
            raise DatasetError(f"{file} is neither a folder of images nor a list of them, one `path[ label]` a line")
    names: dict[str, int] = {}
    labelled: set[bool] = set()
    # What is no UTF-8 in a name stays as the bytes it is.
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix("\ufeff")  # which Windows writes
            if not line.strip():
                continue
            name, label = _entry(line.strip(), f"{file}, line {number}")
            if leaves(name) and not outside:
                raise DatasetError(
                    f"{file}, line {number}: {name} is outside of the list's folder; name images below it, relative to "
                    "it, or allow it with --outside"
                )
            if name in names:
                raise DatasetError(f"{file}, line {number}: {name} was listed before; name each image once")
            names[name] = label or 0
            labelled.add(label is not None)
            if len(labelled) == 2:
                raise DatasetError(f"{file}, line {number}: give a label in every line or in none")
    classes = map(str, range(max(names.values()) + 1)) if labelled == {True} else ()
    return Listing(file.parent, tuple(classes), list(names), list(names.values()))


def _entry(line: str, place: str) -> tuple[str, int | None]:
    labelled = re.fullmatch(r"(.*\S)[ \t]+([0-9]+)", line)  # a name may hold blanks, and a tab stand before the label
    if not labelled:
        return os.path.normpath(line), None
    digits = labelled[2].lstrip("0")
    if len(digits) >= len(str(_MOST_LABELS)):
        raise DatasetError(f"{place}: label {digits[:20]} is not below {_MOST_LABELS}; number the classes from 0")
    return os.path.normpath(labelled[1]), int(digits or "0")
