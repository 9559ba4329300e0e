"""One generated picture: dead leaves under 1/f noise, as a JPEG. No torch here: worker processes start at once."""

import io
import os
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

VERSION = 1  # of the pictures: raise it with any change that alters a byte of them

# Width, height, share: most of ImageNet is 500 pixels on its longer side; means about 500 x 375.
SIZES = (
    (500, 375, 0.58),
    (375, 500, 0.10),
    (500, 333, 0.14),
    (333, 500, 0.04),
    (640, 480, 0.06),
    (800, 600, 0.02),
    (1024, 768, 0.01),
    (400, 300, 0.05),
)
QUALITY = 90  # with the grain below, about 110 KB at the mean size


def render(number: int, scale: float = 1.0) -> bytes:
    """One JPEG file, a function of the arguments alone."""
    rng = np.random.default_rng([VERSION, number])
    width, height, _ = SIZES[rng.choice(len(SIZES), p=[share for *_, share in SIZES])]
    width, height = round(width * scale), round(height * scale)
    leaves = np.asarray(_leaves(rng, width, height), np.float32)
    # Light changes all channels together; a little colour of its own, as photos have.
    light = _pink(rng, width, height)[..., None]
    tint = np.stack([_pink(rng, width, height) for _ in range(3)], axis=-1)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32)
    pixels = leaves + 26 * light + 6 * tint + rng.uniform(2, 8) * grain
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()


def _leaves(rng: Generator, width: int, height: int) -> Image.Image:
    """Discs and triangles, radius distributed as r^-3 (scale invariant), later ones hiding earlier ones."""
    image = Image.new("RGB", (width, height), tuple(rng.integers(40, 200, 3).tolist()))
    pen = ImageDraw.Draw(image)
    smallest, largest = 0.012 * max(width, height), 0.4 * max(width, height)
    for _ in range(400):
        radius = 1 / np.sqrt(rng.uniform(largest**-2, smallest**-2))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        tone = rng.integers(20, 235)
        colour = tuple(np.clip(tone + rng.integers(-35, 36, 3), 0, 255).tolist())
        if rng.random() < 0.6:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        else:
            angles = rng.uniform(0, 2 * np.pi) + np.array([0.0, 2.1, 4.2])
            pen.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=colour)
    return image


def _pink(rng: Generator, width: int, height: int) -> np.ndarray:
    """Noise (height, width) of unit deviation whose amplitude falls as 1 / frequency, like that of photos."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency
    noise = np.fft.irfft2(spectrum, (height, width))
    return (noise / noise.std()).astype(np.float32)


def write(number: int, tree: Path, scale: float) -> None:
    """One file of the folder, whole or not at all."""
    draft = tree / f"{file_name(number)}.{os.getpid()}.part"
    draft.write_bytes(render(number, scale))
    draft.replace(tree / file_name(number))


def file_name(number: int) -> str:
    """Of the picture with that number."""
    return f"{number:05d}.jpg"
