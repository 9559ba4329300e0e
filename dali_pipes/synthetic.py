"""The generated sample dataset: ten classes of JPEG files that only shape can tell apart.

    python -m dali_pipes.synthetic --out DIR [--seed 0] [--train-per-class 200] [--val-per-class 50]

What makes generated images worth pre-training on:

- A class is one motif, scattered over the whole picture in several sizes, so that nearly every crop shows some of it.
- Everything else (ground, clutter, layout, angles, size, JPEG settings) is drawn from one distribution for all classes.
  It tells images apart, as contrastive learning needs, and says nothing about the class. It stays quieter than the
  motifs: with strong grounds and motifs both light and dark, a network learned those and k-NN stayed at 15 %.
- All images have the very same distribution of tones, and colour is all but a function of tone. With free colours a
  network tells images apart by colour and learns nothing else: k-NN 17 to 23 % instead of 48 to 87 % (measured).
"""

import ctypes
import dataclasses
import fcntl
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tyro
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from dali_pipes.cores import usable_cores

VERSION = 2  # of the pictures: raise it with any change that alters a byte of them

MARKER = "synthetic.json"  # the parameters; in the folder itself once it is complete
UNFINISHED = ".unfinished"  # until then in here, beside the files that are being written

SPLITS = ("train", "val")
MIN_SIDE, MAX_SIDE = 160, 640
SUPERSAMPLE = 2  # Pillow draws polygons without antialiasing, so they are drawn at twice the size

# Slate, stone, cream: colour along the tone axis, saturated enough for colour jitter to matter.
PALETTE = np.array([[34, 42, 62], [128, 120, 112], [238, 224, 196]])

Polygon = np.ndarray  # (n, 2): x and y, about the unit circle


def _arc(radius: float, start: float, stop: float, points: int = 28) -> Polygon:
    """Points on a circle around the origin; angles in turns."""
    angle = 2 * np.pi * np.linspace(start, stop, points)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _band(middle: Polygon, width: float) -> Polygon:
    """A line made `width` thick, with blunt ends."""
    tangent = np.gradient(middle, axis=0)
    normal = tangent[:, ::-1] * [-1, 1] / np.hypot(tangent[:, :1], tangent[:, 1:])
    return np.concatenate([middle + normal * width / 2, (middle - normal * width / 2)[::-1]])


def _box(x: float, y: float, half_width: float, half_height: float) -> Polygon:
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [half_width, half_height] + [x, y]


_TURNS = np.linspace(0.2, 1.6, 48)
_X = np.linspace(-1, 1, 40)

# Strokes are at least a quarter of the radius thick: thinner ones do not survive the blur of a 64-pixel view.
MOTIFS: dict[str, list[Polygon]] = {
    "bars": [_box(0, y, 0.9, 0.17) for y in (-0.7, 0, 0.7)],
    "checker": [
        _box(x, y, 0.285, 0.285) for x, y in [(-0.57, -0.57), (0.57, -0.57), (0, 0), (-0.57, 0.57), (0.57, 0.57)]
    ],
    "crescent": [np.concatenate([_arc(1.0, 0.15, 0.85), np.add(_arc(0.78, 0.81, 0.19), [0.42, 0])])],
    "cross": [_box(0, 0, 0.95, 0.26), _box(0, 0, 0.26, 0.95)],
    "disc": [_arc(0.85, 0, 1)],
    "ring": [np.concatenate([_arc(0.95, 0, 1), _arc(0.61, 1, 0)])],
    "spiral": [_band(0.54 * _TURNS[:, None] * _arc(1.0, 0.2, 1.6, 48), 0.27)],
    "star": [_arc(1.0, 0, 1, 11)[:-1] * np.tile([[1.0], [0.42]], (5, 1))],
    "triangle": [_arc(1.0, 0, 1, 4)[:-1]],
    "wave": [_band(np.stack([_X, 0.32 * np.sin(2 * np.pi * _X) + y], axis=1), 0.3) for y in (-0.42, 0.42)],
}
CLASSES = tuple(MOTIFS)


def _size(rng: Generator) -> tuple[int, int]:
    """Width and height: mostly small, since decoding takes time; half of them portrait, half landscape."""
    long = MIN_SIDE + 20 + (MAX_SIDE - MIN_SIDE - 20) * rng.random() ** 2.6
    short = max(MIN_SIDE, long * rng.uniform(0.62, 1.0))
    sides = (round(long), round(short))
    return sides if rng.random() < 0.5 else sides[::-1]


def _noise(rng: Generator, width: int, height: int, cell: float) -> np.ndarray:
    """Smooth noise (height, width), about N(0, 1), with features of `cell` pixels."""
    coarse = rng.standard_normal((max(2, round(height / cell)), max(2, round(width / cell))), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _ground(rng: Generator, width: int, height: int) -> np.ndarray:
    """Clouds over a slope of light, (height, width)."""
    short = min(width, height)
    direction = rng.uniform(0, 2 * np.pi)
    x, y = np.linspace(-1, 1, width), np.linspace(-1, 1, height)
    slope = np.cos(direction) * x + np.sin(direction) * y[:, None]
    clouds = _noise(rng, width, height, short * rng.uniform(0.15, 0.4))
    wisps = _noise(rng, width, height, short * rng.uniform(0.03, 0.08))
    return 0.5 * slope + 0.6 * clouds + 0.1 * wisps


def _turn(points: np.ndarray, angle: float) -> np.ndarray:
    """(n, 2) points turned around the origin."""
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _places(rng: Generator, width: int, height: int, step: float) -> np.ndarray:
    """Centres (n, 2) about `step` apart that cover the picture, in random order: a turned lattice, shaken."""
    reach = np.arange(int(np.hypot(width, height) / step / 2) + 2)
    line = np.concatenate([-reach[:0:-1], reach]).astype(float)
    lattice = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    lattice[:, 0] += 0.5 * (lattice[:, 1] % 2)
    shaken = lattice + rng.uniform(-0.2, 0.2, lattice.shape) + rng.random(2)
    centres = step * _turn(shaken, rng.uniform(0, 2 * np.pi)) + [width / 2, height / 2]
    seen = ((centres > -step / 2) & (centres < np.array([width, height]) + step / 2)).all(axis=1)
    return rng.permutation(centres[seen & (rng.random(len(centres)) < 0.95)])


def _pebble(rng: Generator) -> Polygon:
    """A roundish shape, never twice the same: the clutter of all classes."""
    angle, wave = np.linspace(0, 1, 24, endpoint=False), np.arange(2, 5)[:, None]
    bumps = rng.uniform(-0.3, 0.3, (3, 1)) / wave * np.cos(2 * np.pi * (wave * angle + rng.random((3, 1))))
    return _arc(1.0, 0, 23 / 24, 24) * (0.9 + bumps.sum(axis=0))[:, None]


class _Layer:
    """Shapes over nothing: `cover` is their opacity, `tone` their brightness times opacity."""

    def __init__(self, width: int, height: int) -> None:
        size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
        self.cover, self.tone = Image.new("L", size), Image.new("L", size)
        self._pens = ImageDraw.Draw(self.cover), ImageDraw.Draw(self.tone)

    def add(self, polygon: Polygon, centre: np.ndarray, radius: float, angle: float, tone: int) -> None:
        points = ((_turn(polygon, angle) * radius + centre) * SUPERSAMPLE).ravel().tolist()
        for pen, value in zip(self._pens, (255, tone), strict=True):
            pen.polygon(points, fill=value)

    def reduced(self) -> tuple[Image.Image, np.ndarray]:
        """Opacity as an image, and brightness times opacity as (height, width) in 0 to 1."""
        return self.cover.reduce(SUPERSAMPLE), np.asarray(self.tone.reduce(SUPERSAMPLE), dtype=np.float32) / 255


def _shapes(rng: Generator, class_name: str, width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """Pebbles, and over them the motifs of the class."""
    layer, short = _Layer(width, height), min(width, height)
    for centre in _places(rng, width, height, short * rng.uniform(0.3, 0.6)):
        layer.add(_pebble(rng), centre, short * rng.uniform(0.02, 0.07), 0.0, int(rng.integers(60, 196)))

    radius = short * rng.uniform(0.14, 0.17)
    heading, disorder = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, np.pi)
    for centre in _places(rng, width, height, radius * rng.uniform(2.1, 2.2)):
        scale, angle = rng.uniform(0.65, 1.3), heading + disorder * rng.uniform(-1, 1)
        tone = int(rng.integers(203, 228))
        for polygon in MOTIFS[class_name]:
            layer.add(polygon, centre, radius * scale, angle, tone)
    return layer.reduced()


def _scene(rng: Generator, class_name: str, width: int, height: int) -> np.ndarray:
    """Brightness (height, width), in no particular range."""
    cover, shapes = _shapes(rng, class_name, width, height)
    short = min(width, height)
    drop = round(0.03 * short)
    shadow = np.pad(np.asarray(cover.filter(ImageFilter.GaussianBlur(drop)), dtype=np.float32) / 255, drop, mode="edge")
    opacity = np.asarray(cover, dtype=np.float32) / 255
    ground = 0.38 + 0.045 * _ground(rng, width, height) - 0.12 * shadow[: -2 * drop, : -2 * drop]
    relief = 0.03 * _noise(rng, width, height, short * rng.uniform(0.05, 0.2))
    grain = 0.004 * rng.standard_normal((height, width), dtype=np.float32)
    return ground * (1 - opacity) + shapes + relief * opacity + grain


def _ranks(values: np.ndarray) -> Image.Image:
    """An "L" image with each pixel's rank in its picture, which gives every picture the same histogram."""
    low, high = values.min(), values.max()
    level = ((values - low) * (4095 / (high - low))).astype(np.int32)
    count = np.bincount(level.ravel(), minlength=4096)
    rank = (np.cumsum(count) - count / 2) / values.size
    return Image.fromarray((256 * rank).astype(np.uint8)[level])


def _equalised(scene: np.ndarray) -> Image.Image:
    """The scene in tones that are spread alike in every picture, as an "L" image.

    Ranks harden edges, since few pixels are between two areas, and softening them again unsettles the histogram by an
    amount that tells classes; ranking once more settles it, and hardly moves tones that are spread out already.
    """
    return _ranks(np.asarray(_ranks(scene).filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32))


def _coloured(rng: Generator, tone: Image.Image) -> Image.Image:
    """The "RGB" image of an "L" image of tones, a little warmer here and cooler there.

    Without these stains the chroma histogram tells how much edge 4:2:0 has blurred: 28 % 1-NN accuracy instead of 10 %.
    """
    ramp = np.stack([np.interp(np.arange(256), [0, 127.5, 255], channel) for channel in PALETTE.T], axis=1)
    picture = ramp.astype(np.float32)[np.asarray(tone)]
    warmth = _noise(rng, tone.width, tone.height, 0.12 * min(tone.size))
    warmth = 3 / warmth.std() * (warmth - warmth.mean())
    picture[..., 0] += warmth
    picture[..., 2] -= warmth
    return Image.fromarray(picture.round().astype(np.uint8))


def render(class_name: str, split: str, index: int, seed: int = 0) -> bytes:
    """One JPEG file of the dataset, a function of its arguments alone: neither order nor number of images matter."""
    rng = np.random.default_rng([seed, SPLITS.index(split), CLASSES.index(class_name), index])
    picture = _coloured(rng, _equalised(_scene(rng, class_name, *_size(rng))))
    if rng.random() < 0.08:
        picture = picture.convert("L")
    file = io.BytesIO()
    picture.save(
        file,
        "JPEG",
        quality=int(rng.integers(75, 96)),
        subsampling="4:4:4" if rng.random() < 0.3 else "4:2:0",
        progressive=bool(rng.random() < 0.15),
    )
    return file.getvalue()


def _write(task: tuple[str, str, int], out: Path, seed: int) -> None:
    """One image of the folder, whole or not at all; one that is there is whole, and is kept."""
    split, class_name, index = task
    name = f"{class_name}_{index:05d}.jpg"
    file, draft = out / split / class_name / name, out / UNFINISHED / f"{split}_{name}"
    if not file.exists():
        draft.write_bytes(render(class_name, split, index, seed))
        draft.replace(file)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle, and no worker outlives it: orphans would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; where the filesystem has no locks, as many as there are."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_complete(out: Path, parameters: str) -> bool:
    """Whether nothing is left to do in `out`; FileExistsError if it holds anything but this dataset."""
    if not os.path.lexists(out):
        return False
    if not out.is_dir():
        raise FileExistsError(f"--out {out} is not a folder; name a new or empty one")
    for marker in (out / MARKER, out / UNFINISHED / MARKER):
        if marker.is_file():
            if (found := marker.read_text()) == parameters:
                return marker.parent == out
            raise FileExistsError(
                f"--out {out} holds other sample data ({found}; asked for {parameters}); "
                "name a new folder, or delete this one"
            )
    foreign = sorted(entry.name for entry in out.iterdir() if entry.name != UNFINISHED)
    if foreign:
        raise FileExistsError(f"--out {out} holds something else ({foreign[0]}, ...); name a new or empty folder")
    return False


def generate(
    out: Path, *, seed: int = 0, train_per_class: int = 200, val_per_class: int = 50, processes: int | None = None
) -> int:
    """Write the sample dataset as `out`/train/<class>/*.jpg and `out`/val/<class>/*.jpg.

    With the same NumPy, Pillow and kind of processor, the bytes depend on the seed alone; a smaller dataset is the
    beginning of a larger one. A complete folder is left as it is, an interrupted one is completed.

    Args:
        out: A new or empty folder, or one that was begun with the same parameters.
        seed: Of all the pictures, 0 or more.
        train_per_class: Images a class in train/, 1 or more.
        val_per_class: Images a class in val/, 1 or more.
        processes: How many draw at a time; by default as many as there are cores for this process.

    Returns:
        The number of images drawn: 0 if the folder was complete.

    Raises:
        FileExistsError: `out` belongs to something else, or to other parameters. Nothing in it was touched.
        ValueError: A number is out of its range.
    """
    counts = {"train": train_per_class, "val": val_per_class}
    for flag, value, lowest in (
        ("seed", seed, 0),
        ("train-per-class", train_per_class, 1),
        ("val-per-class", val_per_class, 1),
    ):
        if value < lowest:
            raise ValueError(f"--{flag} {value} is too small; use {lowest} or more")
    parameters = json.dumps({"version": VERSION, "seed": seed, "per_class": counts})
    if not out.is_dir():
        _is_complete(out, parameters)  # else it is looked at alone, as another process may be about to complete it
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        return 0 if _is_complete(out, parameters) else _draw(out, seed, counts, parameters, processes)


def _draw(out: Path, seed: int, counts: dict[str, int], parameters: str, processes: int | None) -> int:
    (out / UNFINISHED).mkdir(exist_ok=True)
    (out / UNFINISHED / MARKER).write_text(parameters)
    for split in SPLITS:
        for class_name in CLASSES:
            (out / split / class_name).mkdir(parents=True, exist_ok=True)
    tasks = [(split, class_name, i) for split in SPLITS for class_name in CLASSES for i in range(counts[split])]
    workers = processes or usable_cores()
    # Fork, as torch's DataLoader does: a fresh interpreter would first import all that this package imports.
    with ProcessPoolExecutor(workers, get_context("fork"), initializer=_start_worker) as pool:
        for _ in pool.map(partial(_write, out=out, seed=seed), tasks, chunksize=8):
            pass
    (out / UNFINISHED / MARKER).replace(out / MARKER)
    shutil.rmtree(out / UNFINISHED)
    return len(tasks)


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """The sample dataset: 10 classes of small JPEG files that only shape can tell apart."""

    out: Path
    """folder to write train/ and val/ into; new, empty or begun by the same command"""
    seed: int = 0
    """of all the pictures"""
    train_per_class: int = 200
    val_per_class: int = 50


def main() -> None:
    """Command line; what cannot be done ends with one line and exit code 2."""
    config = tyro.cli(SyntheticConfig)
    start = time.perf_counter()
    try:
        drawn = generate(**vars(config))
    except (OSError, ValueError) as error:
        print(f"dali_pipes.synthetic: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"dali_pipes.synthetic: {config.out} is unfinished; the same command goes on with it", file=sys.stderr)
        sys.exit(130)
    seconds = time.perf_counter() - start
    print(f"{config.out}: {drawn} images drawn in {seconds:.1f} s" if drawn else f"{config.out}: complete")


if __name__ == "__main__":
    main()
