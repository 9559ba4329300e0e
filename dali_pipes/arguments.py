"""From parameters in torchvision's terms to what DALI's operators take: NumPy arrays of N, made on the host."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dali_pipes.sampling import SampleParams
from dali_pipes.views import ViewSpec

LUMA = np.array([19595, 38470, 7471]) / 65536  # Pillow's RGB to L, in its 16-bit fixed point
MIXES = 6  # places of a colour matrix around contrast and hue: two before, two between, two after
Arguments = dict[str, NDArray]  # one graph input each; axis 0 is the sample


@dataclass(frozen=True, eq=False)
class Window:
    """A box of each image is resized, and of the result a square is kept. int32 (N, 2): y, x; all in pixels."""

    start: NDArray[np.int32]  # of the box in the image
    shape: NDArray[np.int32]  # of the box
    resized: NDArray[np.int32]  # shape of the resized box
    origin: NDArray[np.int32]  # of the square in it

    @classmethod
    def of_crop(cls, params: SampleParams, size: int) -> "Window":
        """The whole box, resized to a square of that size: torchvision's `resized_crop`."""
        start, shape = np.stack([params.top, params.left], 1), np.stack([params.height, params.width], 1)
        return cls(start, shape, np.full_like(shape, size), np.zeros_like(shape))

    @classmethod
    def of_centre(cls, heights: NDArray[np.int32], widths: NDArray[np.int32], resize: int, crop: int) -> "Window":
        """The middle of the whole image: torchvision's `Resize(resize)` of the shorter side, `CenterCrop(crop)`."""
        shape = np.stack([heights, widths], 1).astype(np.int32)
        resized = (resize * shape.astype(np.int64) // shape.min(1, keepdims=True)).astype(np.int32)
        return cls(np.zeros_like(shape), shape, resized, np.rint((resized - crop) / 2).astype(np.int32))


def crop_arguments(window: Window, size: int) -> Arguments:
    """Inputs of `operators.crop` for views of `size` pixels a side; its docstring says what the zeros are for."""
    scale = window.shape / window.resized
    # Enlarging, Pillow and DALI alike see only the border pixel beyond the border: no zeros, and all weights 1.
    pad = np.where(scale > 1, np.ceil(scale) + 2, 0).astype(np.int32)
    padded = window.shape + 2 * pad
    start, end = pad + window.origin * scale, pad + (window.origin + size) * scale
    weights = np.ones((2, len(scale), size), np.float32)  # of rows, of columns
    inside = _inside_share(np.maximum(scale, 1.0), window.shape).T
    weights[:, :, 0] = np.where(window.origin.T == 0, inside, 1.0)
    weights[:, :, -1] = np.where((window.origin + size == window.resized).T, inside, weights[:, :, -1])

    # Pillow 13 resizes vertically first where the height loses more than twice the pixels that the width loses, and
    # horizontally first otherwise (Pillow PR 9549; the bound measured over 60 shapes); up to 12 it is always the
    # latter. Each pass rounds to bytes, so the order moves a quarter of an image's values by one.
    lost = window.shape - window.resized
    rows_first = (lost[:, 0] > 0) & (lost[:, 0] > 2 * lost[:, 1])
    first = np.stack([rows_first, ~rows_first], 1)  # whether the first pass is along that axis; the second is not
    return {
        "box_start": window.start,
        "box_shape": window.shape,
        "pad_start": -pad,
        "pad_shape": padded,
        "first_start": np.where(first, start, 0).astype(np.float32),
        "first_end": np.where(first, end, padded).astype(np.float32),
        "first_size": np.where(first, size, padded).astype(np.float32),
        "second_start": np.where(first, 0, start).astype(np.float32),
        "second_end": np.where(first, size, end).astype(np.float32),
        "rows_first": rows_first,
        "row_weights": weights[0, :, :, None, None],
        "column_weights": weights[1, :, None, :, None],
    }


def _inside_share(scale: NDArray[np.float64], length: NDArray[np.int32]) -> NDArray[np.float64]:
    """The share of the outermost output's triangle kernel that lies inside the box, when `scale` pixels become one.

    Output 0 has its centre at scale / 2 and reaches scale to either side: it alone is cut on its side. By symmetry the
    same share holds for the last output. 1 at scale 1.
    """
    reach = int(np.ceil(scale.max())) + 1
    pixel = np.arange(-reach, 2 * reach).reshape(-1, *(1,) * scale.ndim)  # first: NumPy sums that axis fastest
    kernel = np.maximum(1 - np.abs(pixel + 0.5 - scale / 2) / scale, 0)
    return (kernel * ((pixel >= 0) & (pixel < length))).sum(0) / kernel.sum(0)


def colour_arguments(params: SampleParams, spec: ViewSpec) -> Arguments:
    """Inputs of the operators after the crop: of those that the spec ever applies."""
    inputs: Arguments = {"flip": params.flip.astype(np.int32)}
    if spec.jitter > 0:
        inputs |= jitter_arguments(params)
        if spec.hue == 0:  # left out, as by ColorJitter: the way through HSV would change colours all the same
            del inputs["hue"]
    if spec.grayscale > 0:
        inputs["grayscale"] = params.grayscale
    if spec.blur > 0:
        inputs |= {"blur": params.blur, "taps": box_taps(params.sigma, box_reach(spec.sigma[1]))}
    if spec.solarize > 0:
        inputs["solarize"] = params.solarize
    return inputs


def jitter_arguments(params: SampleParams) -> Arguments:
    """Inputs of `operators.jitter`, and of the condition around it."""
    place = np.argsort(params.order, 1)  # of each operation in its sample's order
    matrices, used = _mixes(params, place)
    inputs: Arguments = {
        "jitter": params.jitter,
        "hue_first": place[:, 3] < place[:, 1],
        "contrast": params.contrast.astype(np.float32),
        # adjust_hue adds int32(hue * 255) to an 8-bit hue, wrapping; the 256 keeps the sum positive for DALI's fmod.
        "hue": (np.trunc(params.hue * 255) + 256).astype(np.float32),
    }
    for i in range(MIXES):
        inputs[f"mix_{i}"], inputs[f"mixes_{i}"] = matrices[:, i], used[:, i]
    return inputs


def _mixes(params: SampleParams, place: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Brightness and saturation as (N, 6, 3, 4) matrices on (R, G, B, gray) and (N, 6) whether a place is taken.

    Contrast and hue, which are no matrices, stand between places 1 | 2 and 3 | 4, in the sample's order. So each of
    brightness and saturation lies in one of three gaps, and takes its second place only if the other came just before.
    """
    special = np.sort(place[:, [1, 3]], 1)
    gap = {k: (place[:, k, None] > special).sum(1) for k in (0, 2)}
    rows = np.arange(len(place))
    matrices = np.zeros((len(place), MIXES, 3, 4), np.float32)
    used = np.zeros((len(place), MIXES), np.bool_)
    mixes = {0: brightness_matrix(params.brightness), 2: saturation_matrix(params.saturation)}
    for k, other in ((0, 2), (2, 0)):
        i = 2 * gap[k] + ((gap[k] == gap[other]) & (place[:, other] < place[:, k]))
        matrices[rows, i] = mixes[k]
        used[rows, i] = True
    return matrices, used


def brightness_matrix(factor: NDArray[np.float64]) -> NDArray[np.float32]:
    """(N, 3, 4) for `operators.mix`: each channel times the factor."""
    matrices = np.zeros((len(factor), 3, 4), np.float32)
    matrices[:, :, :3] = factor[:, None, None] * np.eye(3)
    return matrices


def saturation_matrix(factor: NDArray[np.float64]) -> NDArray[np.float32]:
    """(N, 3, 4) for `operators.mix`: a blend with the gray, which stands in the fourth column."""
    matrices = brightness_matrix(factor)
    matrices[:, :, 3] = (1 - factor)[:, None]
    return matrices


def box_reach(sigma: float) -> int:
    """How far Pillow's box of that sigma reaches to either side, pixels, its fractional end included."""
    return int((np.sqrt(4 * sigma**2 + 1) - 1) / 2) + 1


def box_taps(sigma: NDArray[np.float64], reach: int) -> NDArray[np.float32]:
    """(N, 2 reach + 1): the extended box of which Pillow's GaussianBlur takes three in a row (Gwosdek et al. 2011).

    A box of whole radius l with ends of weight alpha, so that three have the Gaussian's variance; sums to 1.
    """
    variance = sigma**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    radius = whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    distance = np.abs(np.arange(-reach, reach + 1))[None]
    return (np.clip(radius[:, None] + 1 - distance, 0, 1) / (2 * radius[:, None] + 1)).astype(np.float32)
