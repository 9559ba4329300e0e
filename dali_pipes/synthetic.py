"""The generated sample dataset: ten classes of shapes that only shape can tell apart.

    python -m dali_pipes.synthetic --out DIR [--seed 0] [--train-per-class 200] [--val-per-class 50]

What makes a set of generated images worth pre-training on:

- A class is one motif, scattered over the whole picture in many sizes, so that a crop of 8 % still shows some of it.
- Everything else (ground, clutter, polarity, layout, size, lighting, JPEG settings) is drawn from one distribution for
  all classes. It tells images apart, as contrastive learning needs, and says nothing about the class.
- All images have the very same distribution of tones, and colour is a function of tone. With free colours the network
  learns to tell images by their colour and nothing else: k-NN 17 to 23 % instead of 48 to 87 % (measured).
"""

import dataclasses
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tyro
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

VERSION = 1  # of the pictures: raise it with any change that alters a byte of them

MARKER = "synthetic.json"  # the parameters; in the folder itself once it is complete
UNFINISHED = ".unfinished"  # until then in here, beside the files that are being written

SPLITS = ("train", "val")
MIN_SIDE, MAX_SIDE = 160, 640
SUPERSAMPLE = 2  # polygons are drawn without antialiasing, so at twice the size

# Dark slate, stone, cream: colour along the tone axis. Saturated enough for colour jitter to matter, and no more.
PALETTE = np.array([[34, 42, 62], [128, 120, 112], [238, 224, 196]], dtype=np.float64)

Polygon = np.ndarray  # (n, 2), x and y, inside the unit circle


def _arc(radius: float, start: float, stop: float, points: int = 28) -> Polygon:
    """Points on a circle around the origin; angles in turns."""
    angle = 2 * np.pi * np.linspace(start, stop, points)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _band(middle: Polygon, width: float) -> Polygon:
    """A line made `width` thick, with blunt ends."""
    tangent = np.gradient(middle, axis=0)
    normal = tangent[:, ::-1] * [-1, 1] / np.hypot(tangent[:, :1], tangent[:, 1:])
    return np.concatenate([middle + normal * width / 2, (middle - normal * width / 2)[::-1]])


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def _bars(rng: Generator) -> list[Polygon]:
    return [_box(-0.85, y - 0.13, 0.85, y + 0.13) for y in (-0.75, -0.25, 0.25, 0.75)]


def _checker(rng: Generator) -> list[Polygon]:
    edges = np.linspace(-0.8, 0.8, 5)
    return [
        _box(edges[i], edges[j], edges[i + 1], edges[j + 1]) for i in range(4) for j in range(4) if (i + j) % 2 == 0
    ]


def _crescent(rng: Generator) -> list[Polygon]:
    inner = _arc(0.78, 0.81, 0.19) + [0.42, 0.0]
    return [np.concatenate([_arc(1.0, 0.15, 0.85), inner])]


def _cross(rng: Generator) -> list[Polygon]:
    return [_box(-0.95, -0.26, 0.95, 0.26), _box(-0.26, -0.95, 0.26, 0.95)]


def _disc(rng: Generator) -> list[Polygon]:
    return [_arc(0.85, 0, 1)]


def _ring(rng: Generator) -> list[Polygon]:
    return [_band(_arc(0.78, 0, 1), rng.uniform(0.28, 0.40))]


def _spiral(rng: Generator) -> list[Polygon]:
    turn = np.linspace(0.25, 2.0, 56)
    angle = 2 * np.pi * turn
    middle = (0.45 * turn)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return [_band(middle, 0.22)]


def _star(rng: Generator) -> list[Polygon]:
    points = int(rng.integers(5, 7))
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, 0.42)[:, None]
    return [radius * _arc(1.0, 0, 1, 2 * points + 1)[:-1]]


def _triangle(rng: Generator) -> list[Polygon]:
    return [_arc(1.0, 0, 1, 4)[:-1]]


def _wave(rng: Generator) -> list[Polygon]:
    x = np.linspace(-1, 1, 40)
    return [_band(np.stack([x, 0.32 * np.sin(2 * np.pi * x) + dy], axis=1), 0.24) for dy in (-0.38, 0.38)]


MOTIFS: dict[str, Callable[[Generator], list[Polygon]]] = {
    "bars": _bars,
    "checker": _checker,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "ring": _ring,
    "spiral": _spiral,
    "star": _star,
    "triangle": _triangle,
    "wave": _wave,
}
CLASSES = tuple(MOTIFS)


def _size(rng: Generator) -> tuple[int, int]:
    """Width and height: small ones are common, since decoding time counts; half portrait, half landscape."""
    long = MIN_SIDE + 20 + (MAX_SIDE - MIN_SIDE - 20) * rng.random() ** 2.6
    short = max(MIN_SIDE, long * rng.uniform(0.62, 1.0))
    sides = (round(long), round(short))
    return sides if rng.random() < 0.5 else sides[::-1]


def _noise(rng: Generator, width: int, height: int, cell: float, stretch: float = 1.0) -> np.ndarray:
    """Smooth noise (height, width), about N(0, 1); a feature is `cell` pixels high and `cell * stretch` wide."""
    rows, columns = max(2, round(height / cell)), max(2, round(width / cell / stretch))
    coarse = Image.fromarray(rng.standard_normal((rows, columns), dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _ground(rng: Generator, width: int, height: int) -> np.ndarray:
    """Clouds or streaks over a slope of light; (height, width)."""
    short = min(width, height)
    stretch = float(rng.choice([0.25, 1.0, 1.0, 4.0]))
    coarse, fine = short * rng.uniform(0.15, 0.4), short * rng.uniform(0.03, 0.08)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    slope = np.cos(angle) * x + np.sin(angle) * y
    noise = 0.6 * _noise(rng, width, height, coarse, stretch) + 0.35 * _noise(rng, width, height, fine, stretch)
    return 0.5 * slope + noise


def _lattice(rng: Generator, width: int, height: int, step: float) -> np.ndarray:
    """Centres (n, 2) about `step` apart that cover the picture: a turned lattice, shaken, with gaps."""
    reach = int(np.hypot(width, height) / step / 2) + 2
    grid = np.stack(np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1)), axis=-1).reshape(-1, 2)
    grid = grid + [0.5, 0.0] * (grid[:, 1:] % 2) + rng.uniform(-0.3, 0.3, grid.shape) + rng.random(2)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    centres = step * grid @ rotation + [width / 2, height / 2]
    inside = ((centres > -step / 2) & (centres < np.array([width, height]) + step / 2)).all(axis=1)
    return rng.permutation(centres[inside & (rng.random(len(grid)) < 0.85)])


def _blob(rng: Generator) -> list[Polygon]:
    """A pebble: the clutter of every class."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    waves = np.arange(2, 5)[:, None]
    radius = 0.7 + 0.3 * rng.uniform(-1, 1, (3, 1)) / waves * np.cos(waves * angle + rng.uniform(0, 7, (3, 1)))
    return [radius.sum(axis=0, keepdims=True).T / 3 * np.stack([np.cos(angle), np.sin(angle)], axis=1) * 1.4]


class _Canvas:
    """Shapes on a transparent layer: `cover` is their opacity, `tone` their brightness times opacity."""

    def __init__(self, width: int, height: int) -> None:
        size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
        self.cover, self.tone = Image.new("L", size), Image.new("L", size)
        self.pens = ImageDraw.Draw(self.cover), ImageDraw.Draw(self.tone)

    def add(self, polygons: list[Polygon], centre: np.ndarray, radius: float, angle: float, tone: int) -> None:
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for polygon in polygons:
            points = ((polygon @ rotation * radius + centre) * SUPERSAMPLE).ravel().tolist()
            self.pens[0].polygon(points, fill=255)
            self.pens[1].polygon(points, fill=tone)

    def layers(self) -> tuple[Image.Image, np.ndarray]:
        """Opacity as an image, and brightness times opacity, (height, width) in 0 to 1."""
        return self.cover.reduce(SUPERSAMPLE), np.asarray(self.tone.reduce(SUPERSAMPLE), dtype=np.float32) / 255


def _scene(rng: Generator, motif: str, width: int, height: int) -> np.ndarray:
    """Brightness (height, width), in no particular range."""
    short = min(width, height)
    canvas = _Canvas(width, height)
    for centre in _lattice(rng, width, height, short * rng.uniform(0.3, 0.6)):
        canvas.add(_blob(rng), centre, short * rng.uniform(0.02, 0.07), 0.0, int(rng.integers(60, 196)))

    radius = short * rng.uniform(0.09, 0.19)
    heading, disorder = rng.uniform(0, 2 * np.pi), rng.choice([0.15, np.pi])
    shade = 215 if rng.random() < 0.5 else 40
    for centre in _lattice(rng, width, height, radius * rng.uniform(2.1, 2.9)):
        angle = heading + disorder * rng.uniform(-1, 1)
        tone = shade + rng.integers(-35, 36)
        canvas.add(MOTIFS[motif](rng), centre, radius * rng.uniform(0.65, 1.2), angle, int(tone))

    cover, tones = canvas.layers()
    shadow = cover.filter(ImageFilter.GaussianBlur(0.03 * short)).transform(
        cover.size, Image.Transform.AFFINE, (1, 0, -0.03 * short, 0, 1, -0.03 * short)
    )
    opacity = np.asarray(cover, dtype=np.float32) / 255
    ground = 0.5 + 0.13 * _ground(rng, width, height) - 0.12 * np.asarray(shadow, dtype=np.float32) / 255
    relief = 0.05 * _noise(rng, width, height, short * rng.uniform(0.05, 0.2))
    grain = 0.02 * rng.standard_normal((height, width), dtype=np.float32)
    return ground * (1 - opacity) + tones + relief * opacity + grain


def _equalise(scene: np.ndarray) -> np.ndarray:
    """Tones (height, width) in 0 to 1 with the same distribution for every picture: each pixel's rank."""
    low, high = scene.min(), scene.max()
    level = ((scene - low) * (4095 / (high - low))).astype(np.int32)
    count = np.bincount(level.ravel(), minlength=4096)
    return ((np.cumsum(count) - count / 2) / scene.size)[level]


def _colour(tone: np.ndarray) -> np.ndarray:
    """uint8 RGB (height, width, 3)."""
    table = np.stack([np.interp(np.linspace(0, 1, 1024), [0, 0.5, 1], channel) for channel in PALETTE.T], axis=1)
    return np.rint(table).astype(np.uint8)[(tone * 1023).astype(np.int32)]


def render(class_name: str, split: str, index: int, seed: int = 0) -> bytes:
    """One JPEG file of the dataset, a function of the arguments alone: neither order nor number of images matter."""
    rng = np.random.default_rng([VERSION, seed, SPLITS.index(split), CLASSES.index(class_name), index])
    width, height = _size(rng)
    picture = Image.fromarray(_colour(_equalise(_scene(rng, class_name, width, height))))
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
    """One image of the folder, whole or not at all; one that is there was written whole and is kept."""
    split, class_name, index = task
    name = f"{class_name}_{index:05d}.jpg"
    file = out / split / class_name / name
    if not file.exists():
        draft = out / UNFINISHED / f"{split}_{name}"
        draft.write_bytes(render(class_name, split, index, seed))
        draft.replace(file)


def _is_complete(out: Path, parameters: dict[str, int]) -> bool:
    """Whether nothing is left to do in `out`; FileExistsError if it belongs to something else."""
    if not out.is_dir():
        if os.path.lexists(out):
            raise FileExistsError(f"--out {out} is not a folder; name one that is new or empty")
        return False
    for marker in (out / MARKER, out / UNFINISHED / MARKER):
        if marker.is_file():
            found = json.loads(marker.read_text())
            if found != parameters:
                raise FileExistsError(f"--out {out} holds the sample data of {found}, asked for was {parameters}; "
                                      "name a new folder, or delete that one")  # fmt: skip
            return marker.parent == out
    if any(entry.name != UNFINISHED for entry in out.iterdir()):
        raise FileExistsError(
            f"--out {out} holds files that are not the sample data; name a folder that is new or empty"
        )
    return False


def generate(
    out: Path, *, seed: int = 0, train_per_class: int = 200, val_per_class: int = 50, processes: int | None = None
) -> int:
    """Write the sample dataset as `out`/train/<class>/*.jpg and `out`/val/<class>/*.jpg.

    The files depend on the seed (and on the versions of NumPy and Pillow) alone; a smaller dataset is the beginning
    of a larger one. A complete folder is left as it is, an interrupted one is completed.

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
    parameters = {"version": VERSION, "seed": seed, "train_per_class": train_per_class, "val_per_class": val_per_class}
    for name, lowest in {"seed": 0, "train_per_class": 1, "val_per_class": 1}.items():
        if parameters[name] < lowest:
            raise ValueError(f"--{name.replace('_', '-')} {parameters[name]} is too small; use {lowest} or more")
    if _is_complete(out, parameters):
        return 0

    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED / MARKER).write_text(json.dumps(parameters) + "\n")
    counts = {"train": train_per_class, "val": val_per_class}
    for split in SPLITS:
        for class_name in CLASSES:
            (out / split / class_name).mkdir(parents=True, exist_ok=True)
    tasks = [(split, class_name, i) for split in SPLITS for class_name in CLASSES for i in range(counts[split])]
    # Fork, as torch's DataLoader does: a fresh interpreter would first import everything the package imports.
    with ProcessPoolExecutor(
        processes or len(os.sched_getaffinity(0)), get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    ) as pool:
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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    seconds = time.perf_counter() - start
    print(f"{config.out}: {drawn} images drawn in {seconds:.1f} s" if drawn else f"{config.out}: complete")


if __name__ == "__main__":
    main()
