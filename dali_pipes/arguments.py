"""From parameters in torchvision's terms to what DALI's operators take: NumPy arrays of N, made on the host."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dali_pipes.sampling import SampleParams
from dali_pipes.views import ViewSpec

LUMA = np.array([19595, 38470, 7471]) / 65536  # Pillow's RGB to L, in its 16-bit fixed point
MIXES = 6  # places of a colour matrix around contrast and hue: two before, two between, two after
Arguments = dict[str, NDArray]  # one graph input each; axis 0 is the sample


@dataclass(frozen=True)
class Window:
    """A box of each image, resized to `resized_*`, of which a square from (`top_out`, `left_out`) on is kept."""

    top: NDArray[np.int32]
    left: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    resized_height: NDArray[np.int32]
    resized_width: NDArray[np.int32]
    top_out: NDArray[np.int32]
    left_out: NDArray[np.int32]

    @classmethod
    def of_crop(cls, params: SampleParams, size: int) -> "Window":
        """The whole box, resized to a square: torchvision's `resized_crop`."""
        full, zero = np.full(len(params), size, np.int32), np.zeros(len(params), np.int32)
        return cls(params.top, params.left, params.height, params.width, full, full, zero, zero)

    @classmethod
    def of_centre(cls, heights: NDArray[np.int32], widths: NDArray[np.int32], resize: int, crop: int) -> "Window":
        """The middle of the whole image: torchvision's `Resize(resize)` (the shorter side) and `CenterCrop(crop)`."""
        tall = heights > widths
        long = resize * np.maximum(heights, widths) // np.minimum(heights, widths)
        high, wide = np.where(tall, long, resize).astype(np.int32), np.where(tall, resize, long).astype(np.int32)
        zero = np.zeros(len(heights), np.int32)
        top, left = (np.rint((side - crop) / 2).astype(np.int32) for side in (high, wide))
        return cls(zero, zero, heights, widths, high, wide, top, left)


def crop_arguments(window: Window, size: int) -> Arguments:
    """Inputs of `operators.crop` for views of `size` pixels a side."""
    y = _Axis.of(window.height, window.resized_height, window.top_out, size)
    x = _Axis.of(window.width, window.resized_width, window.left_out, size)
    # Pillow 13 resizes vertically first where the height loses more than twice the pixels that the width loses, and
    # horizontally first otherwise (measured over 150 shapes; Pillow PR 9549). Either pass rounds to 8 bits, so the
    # order moves a quarter of the subpixels by one. Pillow up to 12 is always horizontal first.
    lost_y, lost_x = window.height - window.resized_height, window.width - window.resized_width
    rows_first = (lost_y > 0) & (lost_y > 2 * lost_x)
    whole = np.zeros_like(y.start)
    count = np.full_like(y.start, size)
    rows = {"first": y.padded, "second": count}  # the height before the pass, if the pass is along the other axis
    columns = {"first": x.padded, "second": count}
    inputs: Arguments = {
        "box_start": np.stack([window.top, window.left], 1),
        "box_shape": np.stack([window.height, window.width], 1),
        "pad_start": np.stack([-y.pad, -x.pad], 1),
        "pad_shape": np.stack([y.padded, x.padded], 1).astype(np.int32),
        "rows_first": rows_first,
        "row_weights": y.weights[:, :, None, None],
        "column_weights": x.weights[:, None, :, None],
    }
    for step, along_y in (("first", rows_first), ("second", ~rows_first)):
        inputs[f"{step}_start"] = np.stack([np.where(along_y, y.start, whole), np.where(along_y, whole, x.start)], 1)
        inputs[f"{step}_end"] = np.stack(
            [np.where(along_y, y.end, rows[step]), np.where(along_y, columns[step], x.end)], 1
        )
        inputs[f"{step}_size"] = np.stack(
            [np.where(along_y, count, rows[step]), np.where(along_y, columns[step], count)], 1
        )
    return inputs


@dataclass(frozen=True)
class _Axis:
    """One axis of the resize: float32 arrays of N, except `weights`."""

    pad: NDArray[np.int32]  # zeros on either side of the box
    padded: NDArray[np.float32]  # length with them
    start: NDArray[np.float32]  # of the source interval that becomes the output, in the padded box
    end: NDArray[np.float32]
    weights: NDArray[np.float32]  # (N, size): the share of each output's kernel that lies inside the box

    @classmethod
    def of(
        cls, length: NDArray[np.int32], resized: NDArray[np.int32], first: NDArray[np.int32], size: int
    ) -> "_Axis":
        """`length` source pixels become `resized`, of which `size` from `first` on are kept."""
        scale = length / resized
        # Enlarging, Pillow and DALI both see only the border pixel beyond the border: nothing to mend, no zeros.
        pad = np.where(scale > 1, np.ceil(scale) + 2, 0).astype(np.int32)
        weights = np.ones((len(length), size), np.float32)
        inside = _inside_share(np.maximum(scale, 1.0), length)
        weights[:, 0] = np.where(first == 0, inside, 1.0)
        weights[:, -1] = np.where(first + size == resized, inside, weights[:, -1])
        return cls(
            pad=pad,
            padded=(length + 2 * pad).astype(np.float32),
            start=(pad + first * scale).astype(np.float32),
            end=(pad + (first + size) * scale).astype(np.float32),
            weights=weights,
        )


def _inside_share(scale: NDArray[np.float64], length: NDArray[np.int32]) -> NDArray[np.float64]:
    """The share of the triangle kernel of the outermost output that lies inside the box; 1 where nothing is reduced.

    Output 0 has its centre at scale / 2 and reaches scale to either side, so it, and it alone on its side, is cut.
    """
    reach = int(np.ceil(scale.max())) + 1
    pixel = np.arange(-reach, 2 * reach)[None]
    kernel = np.maximum(1 - np.abs(pixel + 0.5 - scale[:, None] / 2) / scale[:, None], 0)
    inside = (kernel * ((pixel >= 0) & (pixel < length[:, None]))).sum(1)
    return np.where(scale > 1, inside / kernel.sum(1), 1.0)


def colour_arguments(params: SampleParams, spec: ViewSpec) -> Arguments:
    """Inputs of the operators after the crop: of those that the spec ever applies."""
    inputs: Arguments = {"flip": params.flip.astype(np.int32)}
    if spec.jitter > 0:
        inputs |= _jitter_arguments(params)
    if spec.grayscale > 0:
        inputs["grayscale"] = params.grayscale
    if spec.blur > 0:
        inputs |= {"blur": params.blur, "taps": box_taps(params.sigma, box_reach(spec.sigma[1]))}
    if spec.solarize > 0:
        inputs["solarize"] = params.solarize
    return inputs


def _jitter_arguments(params: SampleParams) -> Arguments:
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
    for k, other, factor in ((0, 2, params.brightness), (2, 0, params.saturation)):
        i = 2 * gap[k] + ((gap[k] == gap[other]) & (place[:, other] < place[:, k]))
        matrices[rows, i, :, :3] = factor[:, None, None] * np.eye(3)
        matrices[rows, i, :, 3] = (1 - factor)[:, None] if k == 2 else 0.0
        used[rows, i] = True
    return matrices, used


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
