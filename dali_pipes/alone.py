"""Parts of the graph by themselves, on given images and with given numbers: what equality is measured on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torchvision.transforms.functional as F
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from PIL import Image, ImageFilter, ImageOps

from dali_pipes import operators
from dali_pipes.arguments import (
    Arguments,
    Window,
    box_reach,
    box_taps,
    brightness_matrix,
    crop_arguments,
    jitter_arguments,
    saturation_matrix,
)
from dali_pipes.gap import Gap
from dali_pipes.operators import Inputs, Node
from dali_pipes.reference import adjusted
from dali_pipes.sampling import SampleParams
from dali_pipes.views import ViewSpec

Operator = Callable[[Node, Inputs], Node]


def apply(
    parts: Sequence[Operator], images: Sequence[Any], inputs: Mapping[str, NDArray], device: str = "cpu"
) -> list[list[NDArray[np.uint8]]]:
    """For each part, part(image, {name: node}) of every image, each with its own row of every input.

    Args:
        parts: functions of DALI nodes, as in `operators`.
        images: uint8 (height, width, 3), arrays or Pillow's, of any sizes.
        inputs: arrays whose axis 0 is the image.
        device: "cpu", or "cuda": then the parts run there.
    """
    pixels = [np.asarray(image) for image in images]
    arrays = [np.ascontiguousarray(array) for array in inputs.values()]

    @pipeline_def(
        batch_size=len(pixels),
        num_threads=2,
        device_id=None if device == "cpu" else 0,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def graph() -> tuple[Node, ...]:
        image = fn.external_source(source=lambda: pixels, batch=True, layout="HWC")
        nodes = fn.external_source(source=lambda: arrays, num_outputs=len(arrays), batch=True) if arrays else []
        named = dict(zip(inputs, nodes))  # noqa: B905 (AutoGraph's zip knows no strict)
        image = image if device == "cpu" else image.gpu()
        done = []
        for part in parts:
            done.append(part(image, named))
        return tuple(done)

    outputs = [output.as_cpu() for output in graph().run()]
    return [[np.array(output[i]) for i in range(len(pixels))] for output in outputs]


def operator_gaps(
    images: Sequence[Image.Image], spec: ViewSpec, params: SampleParams, device: str = "cpu"
) -> dict[str, Gap]:
    """Each operator alone against torchvision and Pillow, one sample of `params` an image; all of them applied.

    The crop is of the images; the others work on what torchvision's crop makes of them.
    """
    crops = [_cropped(image, spec.size, params, i) for i, image in enumerate(images)]
    window = crop_arguments(Window.of_crop(params, spec.size), spec.size)
    (ours,) = apply([lambda x, p: operators.crop(x, p, spec.size)], images, window, device)
    gaps = {"crop and resize": Gap.between(ours, crops)}
    parts, theirs = _parts(spec), _references(spec)
    outputs = apply(list(parts.values()), crops, _inputs(params, spec), device)
    for (name, reference), output in zip(theirs.items(), outputs, strict=True):
        gaps[name] = Gap.between(output, [reference(crop, params, i) for i, crop in enumerate(crops)])
    return gaps


def _parts(spec: ViewSpec) -> dict[str, Operator]:
    return {
        "brightness": lambda x, p: operators.mix(x, p["brightness"]),
        "contrast": lambda x, p: operators.contrast(x, p["contrast"]),
        "saturation": lambda x, p: operators.mix(x, p["saturation"]),
        "hue": lambda x, p: operators.hue(x, p["hue"]),
        "jitter in its own order": operators.jitter,
        "grayscale": lambda x, p: operators.grayscale(x),
        "blur": lambda x, p: operators.blur(x, p["taps"]),
        "solarize": lambda x, p: operators.solarize(x, spec.solarize_threshold),
        "flip": lambda x, p: operators.finish(x, p["flip"], "uint8"),
    }


def _references(spec: ViewSpec) -> dict[str, Callable[[Image.Image, SampleParams, int], Image.Image]]:
    """What `_parts` are compared with, under the same names."""

    def jitter(image: Image.Image, params: SampleParams, i: int) -> Image.Image:
        for operation in params.order[i]:
            image = adjusted(image, params, i, operation)
        return image

    return {
        "brightness": lambda x, p, i: adjusted(x, p, i, 0),
        "contrast": lambda x, p, i: adjusted(x, p, i, 1),
        "saturation": lambda x, p, i: adjusted(x, p, i, 2),
        "hue": lambda x, p, i: adjusted(x, p, i, 3),
        "jitter in its own order": jitter,
        "grayscale": lambda x, p, i: F.to_grayscale(x, num_output_channels=3),
        "blur": lambda x, p, i: x.filter(ImageFilter.GaussianBlur(radius=float(p.sigma[i]))),
        "solarize": lambda x, p, i: ImageOps.solarize(x, spec.solarize_threshold),
        "flip": lambda x, p, i: F.hflip(x) if p.flip[i] else x,
    }


def _inputs(params: SampleParams, spec: ViewSpec) -> Arguments:
    jitter = jitter_arguments(params)
    del jitter["jitter"]  # the coin: here all are applied
    return {
        **jitter,
        "brightness": brightness_matrix(params.brightness),
        "saturation": saturation_matrix(params.saturation),
        "taps": box_taps(params.sigma, box_reach(spec.sigma[1])),
        "flip": params.flip.astype(np.int32),
    }


def _cropped(image: Image.Image, size: int, params: SampleParams, i: int) -> Image.Image:
    box = [int(side[i]) for side in (params.top, params.left, params.height, params.width)]
    return F.resized_crop(image, *box, [size, size], F.InterpolationMode.BILINEAR)
