"""Each augmentation as DALI operators, for CPU and GPU alike; images are uint8 HWC RGB before and after each.

Pillow works in uint8 between operations, truncates in its blends and rounds elsewhere; all of that is kept, because it
is visible: float32 between the operations is 1.0 grey levels off on average, this chain below 0.05
(tests/dali_pipes/test_operators.py). Inputs named in `arguments.py` are per-sample CPU nodes: conditions and named
arguments must be on the CPU also in a GPU graph. An `if` on a node is DALI's conditional execution, which splits the
batch; it knows `and`, and no conditional expressions.
"""

# ruff: noqa: SIM108

from collections.abc import Mapping
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types

from dali_pipes.arguments import LUMA, MIXES
from dali_pipes.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

Node = Any  # nvidia.dali ships no types
Inputs = Mapping[str, Node]

# DALI rounds to nearest where Pillow's blend truncates. 1/1024 keeps whole numbers, which float32 may place just below,
# on their side.
_TRUNCATE = -0.5 + 1 / 1024
_HALF_UP = 2.0**-13  # before rounding, as Pillow rounds; alone, DALI takes ties to the even number on the GPU
_DIFFERENCES = [0.0, 1.0, -1.0, -1.0, 0.0, 1.0, 1.0, -1.0, 0.0]  # (R, G, B) to (G - B, B - R, R - G)


def view(image: Node, inputs: Inputs, spec: ViewSpec) -> Node:
    """One view before its flip: uint8 (size, size, 3). What the spec never applies is not in the graph."""
    x = crop(image, inputs, spec.size)
    if spec.jitter > 0 and inputs["jitter"]:
        x = jitter(x, inputs)
    if spec.grayscale > 0 and inputs["grayscale"]:
        x = grayscale(x)
    if spec.blur > 0 and inputs["blur"]:
        x = blur(x, inputs["taps"])
    if spec.solarize > 0 and inputs["solarize"]:
        x = solarize(x, spec.solarize_threshold)
    return x


def crop(image: Node, inputs: Inputs, size: int) -> Node:
    """Cut out the box and resize it as Pillow does: one axis, round, the other axis, round.

    At the border of the box Pillow scales up the part of its kernel that lies inside, where DALI repeats the border
    pixel. So the box stands in zeros, and each result is divided by the weight that met the box: at 32 px that takes
    the error from 0.14 grey levels to 0.0004.
    """
    box = fn.slice(image, start=inputs["box_start"], shape=inputs["box_shape"], axes=(0, 1))
    x = fn.slice(
        box,
        start=inputs["pad_start"],
        shape=inputs["pad_shape"],
        axes=(0, 1),
        out_of_bounds_policy="pad",
        fill_values=0,
    )
    x = _resize(x, inputs["first_size"], inputs["first_start"], inputs["first_end"])
    if inputs["rows_first"]:
        x = _divide_rows(x, inputs)
    else:
        x = _divide_columns(x, inputs)
    x = _resize(x, [size, size], inputs["second_start"], inputs["second_end"])
    if inputs["rows_first"]:
        x = _divide_columns(x, inputs)
    else:
        x = _divide_rows(x, inputs)
    return x


def _resize(x: Node, size: Node | list[int], start: Node, end: Node) -> Node:
    """The part of x between `start` and `end` at a new size, by a triangle kernel as wide as the reduction."""
    return fn.resize(
        x,
        size=size,
        roi_start=start,
        roi_end=end,
        mode="stretch",
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        dtype=types.FLOAT,
    )


def _divide_rows(x: Node, inputs: Inputs) -> Node:
    return fn.normalize(x, mean=0.0, stddev=inputs["row_weights"], axes=[1, 2], shift=_HALF_UP, dtype=types.UINT8)


def _divide_columns(x: Node, inputs: Inputs) -> Node:
    return fn.normalize(x, mean=0.0, stddev=inputs["column_weights"], axes=[0, 2], shift=_HALF_UP, dtype=types.UINT8)


def jitter(x: Node, inputs: Inputs) -> Node:
    """Brightness, contrast, saturation and hue in each sample's own order, all 24 of them.

    Contrast and hue stand in the graph once each way; brightness and saturation are matrices, at home in any of the six
    places around them. A four-way branch at each of four places would take three times the nodes.
    """
    x = _mix(x, inputs, 0)
    x = _mix(x, inputs, 1)
    if inputs["hue_first"]:
        x = hue(x, inputs["hue"]) if "hue" in inputs else x
    else:
        x = contrast(x, inputs["contrast"])
    x = _mix(x, inputs, 2)
    x = _mix(x, inputs, 3)
    if inputs["hue_first"]:
        x = contrast(x, inputs["contrast"])
    else:
        x = hue(x, inputs["hue"]) if "hue" in inputs else x
    x = _mix(x, inputs, 4)
    x = _mix(x, inputs, MIXES - 1)
    return x


def _mix(x: Node, inputs: Inputs, place: int) -> Node:
    if inputs[f"mixes_{place}"]:
        x = mix(x, inputs[f"mix_{place}"])
    return x


def mix(x: Node, matrix: Node) -> Node:
    """Brightness or saturation: a (3, 4) matrix on (R, G, B, gray), truncated. Pillow's gray is a rounded byte, too."""
    with_gray = fn.cat(x, _gray(x), axis=2)
    return fn.coord_transform(with_gray, M=matrix, T=[_TRUNCATE] * 3, dtype=types.UINT8)


def _gray(x: Node) -> Node:
    return fn.coord_transform(x, M=LUMA.tolist(), T=[0.0], dtype=types.UINT8)


def contrast(x: Node, factor: Node) -> Node:
    """Blend with the image's mean gray, rounded as Pillow rounds it."""
    mean = math.floor(fn.reductions.mean(_gray(x), dtype=types.FLOAT) + 0.5)
    return fn.cast(x * factor + (mean * (1.0 - factor) + _TRUNCATE), dtype=types.UINT8)


def hue(x: Node, shift: Node) -> Node:
    """Turn the hue by `shift` - 256 of 255 steps, through Pillow's HSV, whose hue and saturation are bytes.

    The way back from HSV without branches: with k = (6 hue + n) mod 6 for n = 5, 3, 1, a channel is
    value - chroma * clamp(min(k, 4 - k), 0, 1).
    """
    value = fn.reductions.max(x, axes=[2], keep_dims=True)
    chroma = value - fn.reductions.min(x, axes=[2], keep_dims=True)
    # Six times the hue, from 8 up so that it stays positive: of the channels that are largest, the last one's formula.
    differences = fn.coord_transform(x, M=_DIFFERENCES, dtype=types.FLOAT)
    sixths = (differences / math.max(chroma, 1) + _constant([8.0, 10.0, 12.0])) * (x == value)
    sixths = fn.reductions.max(sixths, axes=[2], keep_dims=True)
    byte = (math.floor((sixths * 42.5 - (85.0 - 1e-3)) % 255.0) + shift) % 256.0  # 42.5 = 255 / 6
    saturation = math.floor(chroma * 255.0 / math.max(value, 1) + 1e-4)
    new_chroma = saturation * value * (1 / 255.0)
    k = (byte * (6 / 255.0) + _constant([5.0, 3.0, 1.0])) % 6.0
    return fn.cast(value - new_chroma * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0), dtype=types.UINT8)


def _constant(values: list[float]) -> Node:
    return types.Constant(np.array(values, np.float32))


def grayscale(x: Node) -> Node:
    """All channels Pillow's L."""
    return fn.coord_transform(x, M=np.tile(LUMA, 3).tolist(), dtype=types.UINT8)


def blur(x: Node, taps: Node) -> Node:
    """Pillow's GaussianBlur: three boxes along x, three along y, each rounded to bytes, the border repeated.

    fn.gaussian_blur is a better Gaussian and further from Pillow: 0.5 grey levels, at the border up to 45.
    """
    along_x = fn.reshape(taps, shape=[1, -1])
    along_y = fn.reshape(taps, shape=[-1, 1])
    for _ in range(3):
        x = fn.filter(x, along_x, border="clamp")
    for _ in range(3):
        x = fn.filter(x, along_y, border="clamp")
    return x


def solarize(x: Node, threshold: int) -> Node:
    """Invert the values from `threshold` on."""
    keys = list(range(256))
    return fn.lookup_table(x, keys=keys, values=[v if v < threshold else 255 - v for v in keys], dtype=types.UINT8)


def finish(x: Node, flip: Node, output: str) -> Node:
    """Flip horizontally and hand over as HWC: "uint8" as it is, "float16" and "float32" normalised."""
    if output == "uint8":
        return fn.flip(x, horizontal=flip)
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT16 if output == "float16" else types.FLOAT,
        output_layout="HWC",
        mirror=flip,
        mean=[255 * v for v in IMAGENET_MEAN],
        std=[255 * v for v in IMAGENET_STD],
    )
