"""The random numbers of an augmentation: a pure function of (seed, epoch, image index, view), in torchvision's terms.

A counter-based generator: each number is a hash of its full address, so nothing has state and nothing depends on the
batch, the rank or the order of the calls. Chain of SplitMix64 finalisers (Steele, Lea, Flood 2014)::

    key(seed, epoch, view)         = mix(mix(mix(seed) + epoch) + view)
    row(seed, epoch, view, index)  = mix(key + index)
    number k of that row           = mix(row + k * ODD) >> 11, as a float64 in [0, 1) with 53 bits

`_AREAS`, `_RATIOS` and `_DRAWS` are the layout of k. It is part of what a seed means: add at the end, never renumber.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dali_pipes.views import ViewSpec

_TRIES = 10  # of torchvision's RandomResizedCrop.get_params, before it falls back to a centred crop
_AREAS, _RATIOS = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES)  # one of each a try
_DRAWS = {
    "top": 20,
    "left": 21,
    "jitter": 22,
    "order": 23,
    "brightness": 24,
    "contrast": 25,
    "saturation": 26,
    "hue": 27,
    "grayscale": 28,
    "blur": 29,
    "sigma": 30,
    "solarize": 31,
    "flip": 32,
}
_COUNT = 33
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int64)  # 0 brightness 1 contrast 2 saturation 3 hue
_ODD = np.uint64(0xD1342543DE82EF95)
_MASK = (1 << 64) - 1


@dataclass(frozen=True, eq=False)
class SampleParams:
    """What is applied to N images in one view: arrays of N, in the terms of torchvision's functional operations.

    The crop box is in pixels of the decoded image and lies inside it. A factor is valid also where its coin
    (`jitter`, `blur`) is False: it is then not applied.
    """

    top: NDArray[np.int32]
    left: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    jitter: NDArray[np.bool_]
    order: NDArray[np.int64]  # (N, 4): which operation comes first … last; 0 brightness 1 contrast 2 saturation 3 hue
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]  # in turns, as adjust_hue takes it
    grayscale: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    sigma: NDArray[np.float64]
    solarize: NDArray[np.bool_]
    flip: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.top)


def sample_params(
    spec: ViewSpec, view: int, seed: int, epoch: int, indices: ArrayLike, heights: ArrayLike, widths: ArrayLike
) -> SampleParams:
    """Draws the parameters of one view for N images.

    Args:
        spec: the view's ranges and probabilities.
        view: the view's number in its recipe; views of one image are independent.
        seed: of the run; any integer, taken modulo 2^64.
        epoch: from 0.
        indices: (N,) rows of the dataset index, whole numbers from 0.
        heights: (N,) of the decoded images, pixels.
        widths: likewise.

    Returns:
        Arrays of N. The same arguments give the same numbers on any platform, in any batch.
    """
    u = uniforms(seed, epoch, view, indices, _COUNT)

    def between(name: str, low: float, high: float) -> NDArray[np.float64]:
        return low + (high - low) * u[:, _DRAWS[name]]

    def around_one(name: str) -> NDArray[np.float64]:
        strength = getattr(spec, name)
        return between(name, max(0.0, 1.0 - strength), 1.0 + strength)

    def coin(name: str) -> NDArray[np.bool_]:
        return u[:, _DRAWS[name]] < getattr(spec, name)

    top, left, height, width = _crop_boxes(spec, u, np.asarray(heights, np.int64), np.asarray(widths, np.int64))
    return SampleParams(
        top=top,
        left=left,
        height=height,
        width=width,
        jitter=coin("jitter"),
        order=_ORDERS[(u[:, _DRAWS["order"]] * len(_ORDERS)).astype(np.int64)],
        brightness=around_one("brightness"),
        contrast=around_one("contrast"),
        saturation=around_one("saturation"),
        hue=between("hue", -spec.hue, spec.hue),
        grayscale=coin("grayscale"),
        blur=coin("blur"),
        sigma=between("sigma", *spec.sigma),
        solarize=coin("solarize"),
        flip=coin("flip"),
    )


def uniforms(seed: int, epoch: int, view: int, indices: ArrayLike, count: int) -> NDArray[np.float64]:
    """(N, count) independent numbers in [0, 1) for N images; see the module's docstring for the generator."""
    key = np.zeros(1, np.uint64)  # an array: it wraps silently, where a NumPy scalar warns
    for part in (seed, epoch, view):
        key = _mix(key + np.uint64(part & _MASK))
    rows = _mix(np.asarray(indices).astype(np.uint64) + key)
    steps = np.arange(count, dtype=np.uint64) * _ODD
    return (_mix(rows[:, None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64 bits in which every input bit moves every output bit."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _crop_boxes(
    spec: ViewSpec, u: NDArray[np.float64], heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> tuple[NDArray[np.int32], ...]:
    """RandomResizedCrop.get_params for N images at once: (top, left, height, width), int32 arrays of N."""
    low, high = spec.crop_scale
    log_low, log_high = math.log(spec.crop_ratio[0]), math.log(spec.crop_ratio[1])
    area = (heights * widths)[:, None] * (low + (high - low) * u[:, _AREAS])
    ratio = np.exp(log_low + (log_high - log_low) * u[:, _RATIOS])
    try_width = np.rint(np.sqrt(area * ratio))  # rint is Python's round: half to even
    try_height = np.rint(np.sqrt(area / ratio))
    fits = (try_width > 0) & (try_width <= widths[:, None]) & (try_height > 0) & (try_height <= heights[:, None])
    first = fits.argmax(1)
    rows = np.arange(len(u))
    found = fits[rows, first]

    fallback_height, fallback_width = _fallback_size(spec, heights, widths)
    height = np.where(found, try_height[rows, first], fallback_height).astype(np.int64)
    width = np.where(found, try_width[rows, first], fallback_width).astype(np.int64)
    top = np.where(found, np.floor(u[:, _DRAWS["top"]] * (heights - height + 1)), (heights - height) // 2)
    left = np.where(found, np.floor(u[:, _DRAWS["left"]] * (widths - width + 1)), (widths - width) // 2)
    return tuple(side.astype(np.int32) for side in (top, left, height, width))


def _fallback_size(
    spec: ViewSpec, heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest crop whose ratio is allowed: what torchvision takes, centred, when no try fits."""
    narrow, wide = spec.crop_ratio
    ratio = widths / heights
    height = np.where(ratio < narrow, np.rint(widths / narrow), heights)
    width = np.where(ratio > wide, np.rint(heights * wide), widths)
    return height, width
