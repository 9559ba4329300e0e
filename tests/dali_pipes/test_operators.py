"""Each augmentation alone, DALI against Pillow, on photographs and with the same numbers."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps

from dali_pipes import MOCO_V3, ViewSpec, alone, operators, sample_params
from dali_pipes.arguments import (
    LUMA,
    Window,
    box_reach,
    box_taps,
    brightness_matrix,
    colour_arguments,
    crop_arguments,
    saturation_matrix,
)
from dali_pipes.gap import Gap


def apply(operator, images, **inputs):
    """operator(image, {name: node}) on every image, each with its row of every input."""
    return alone.apply([operator], images, inputs)[0]


def pillow(squares, operation, factors):
    return [operation(Image.fromarray(x), float(factor)) for x, factor in zip(squares, factors, strict=True)]


def drawn(low, high, count):
    """Random factors: even ones, like 0.8, meet whole numbers in products, where float32 decides by the last bit."""
    return np.random.default_rng(0).uniform(low, high, count)


@pytest.mark.parametrize(("size", "limit"), [(224, 0.012), (96, 0.012), (32, 0.001)])
@pytest.mark.parametrize("crop_min", [0.08, 0.2])
def test_crop(pictures, size, limit, crop_min):
    spec = ViewSpec(size=size, crop_scale=(crop_min, 1.0))
    images = pictures * 4
    shapes = np.array([image.size for image in images])
    p = sample_params(spec, 0, 0, 0, np.arange(len(images)), shapes[:, 1], shapes[:, 0])
    inputs = crop_arguments(Window.of_crop(p, size), size)
    ours = apply(lambda image, x: operators.crop(image, x, size), images, **inputs)
    boxes = np.stack([p.top, p.left, p.height, p.width], 1).tolist()
    bilinear = F.InterpolationMode.BILINEAR
    theirs = [F.resized_crop(im, *box, [size, size], bilinear) for im, box in zip(images, boxes, strict=True)]
    gap = Gap.between(ours, theirs)
    assert gap.mean < limit
    assert gap.by_more < 1e-5


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (3, 5, 1, 40), (10, 20, 300, 2), (0, 0, 224, 224), (5, 5, 360, 50)])
def test_crop_of_extreme_boxes(pictures, box):
    """The third and the last are resized vertically first; the other way round a quarter of the values would differ."""
    image = pictures[0]
    top, left, height, width = (np.array([side], np.int32) for side in box)
    window = Window(
        np.stack([top, left], 1), np.stack([height, width], 1), np.full((1, 2), 32), np.zeros((1, 2), np.int32)
    )
    ours = apply(lambda im, x: operators.crop(im, x, 32), [image], **crop_arguments(window, 32))
    gap = Gap.between(ours, [F.resized_crop(image, *box, [32, 32], F.InterpolationMode.BILINEAR)])
    assert gap.mean < 0.03
    assert gap.most <= 1


def reduced(ratio, device="cpu"):
    """Noise made smaller by that ratio, by the operators and by Pillow: many results lie halfway between two bytes."""
    side, count = int(32 * ratio), 8
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    origin = np.zeros((count, 2), np.int32)
    window = Window(origin, np.full_like(origin, side), np.full_like(origin, 32), origin)
    parts = [lambda image, x: operators.crop(image, x, 32)]
    ours = alone.apply(parts, list(noise), crop_arguments(window, 32), device)[0]
    return ours, [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in noise]


@pytest.mark.parametrize("ratio", [1.5, 2, 3, 4])
def test_crop_rounds_halves_up(ratio):
    np.testing.assert_array_equal(*reduced(ratio))


def test_brightness(squares):
    factors = drawn(0.6, 1.4, len(squares))
    matrices = brightness_matrix(factors)
    ours = apply(lambda x, p: operators.mix(x, p["matrix"]), squares, matrix=matrices)
    gap = Gap.between(ours, pillow(squares, F.adjust_brightness, factors))
    assert gap.mean < 0.002
    assert gap.most <= 1


def test_saturation(squares):
    factors = drawn(0.8, 1.2, len(squares))
    matrices = saturation_matrix(factors)
    ours = apply(lambda x, p: operators.mix(x, p["matrix"]), squares, matrix=matrices)
    gap = Gap.between(ours, pillow(squares, F.adjust_saturation, factors))
    assert gap.mean < 0.002
    assert gap.most <= 1


def test_contrast(squares):
    factors = drawn(0.6, 1.4, len(squares))
    ours = apply(lambda x, p: operators.contrast(x, p["factor"]), squares, factor=factors.astype(np.float32))
    gap = Gap.between(ours, pillow(squares, F.adjust_contrast, factors))
    assert gap.mean < 0.005
    assert gap.most <= 1


def test_hue(squares):
    factors = drawn(-0.1, 0.1, len(squares))
    shifts = (np.trunc(factors * 255) + 256).astype(np.float32)
    ours = apply(lambda x, p: operators.hue(x, p["shift"]), squares, shift=shifts)
    gap = Gap.between(ours, pillow(squares, F.adjust_hue, factors))
    assert gap.mean < 0.01
    assert gap.by_more < 0.003


def test_hue_of_every_shift_and_pure_colours():
    """The colour cube's corners, an edge, grays and between, by every step that a hue of up to half a turn gives."""
    ramp = np.arange(256, dtype=np.uint8)
    levels = np.array(list(itertools.product([0, 1, 127, 128, 254, 255], repeat=3)), np.uint8)
    colours = np.concatenate([levels, np.stack([ramp] * 3, 1), np.stack([ramp, ramp * 0, 255 - ramp], 1)])[None]
    turns = np.arange(-127, 128)
    ours = apply(
        lambda x, p: operators.hue(x, p["shift"]), [colours] * len(turns), shift=(turns + 256).astype(np.float32)
    )
    theirs = []
    for turn in turns:
        hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(colours).convert("HSV")), 2, 0)
        turned = np.stack([hue + np.int32(turn).astype(np.uint8), saturation, value], 2)
        theirs.append(Image.fromarray(turned, "HSV").convert("RGB"))
    gap = Gap.between(ours, theirs)
    assert gap.mean < 0.02
    assert gap.most <= 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_in_every_order(squares, order):
    """The nearest two of the 24 orders are 0.11 grey levels apart at these strengths."""
    x = np.ascontiguousarray(squares[::3, ::2, ::2])
    spec = ViewSpec(jitter=1.0, brightness=0.9, contrast=0.9, saturation=0.9, grayscale=0.0, blur=0.0)
    p = sample_params(spec, 0, 3, 0, np.arange(len(x)), *np.full((2, len(x)), 224))
    p.order[:] = order
    inputs = {name: array for name, array in colour_arguments(p, spec).items() if name not in ("flip", "jitter")}
    ours = apply(operators.jitter, x, **inputs)
    theirs = []
    for i, square in enumerate(x):
        picture = Image.fromarray(square)
        for operation in order:
            adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[operation]
            picture = adjust(picture, float((p.brightness, p.contrast, p.saturation, p.hue)[operation][i]))
        theirs.append(picture)
    assert Gap.between(ours, theirs).mean < 0.015


def test_grayscale_is_exact(squares):
    ours = apply(lambda x, p: operators.grayscale(x), squares)
    theirs = [F.to_grayscale(Image.fromarray(x), num_output_channels=3) for x in squares]
    assert Gap.between(ours, theirs).most == 0
    assert LUMA.sum() == 1.0


# At some sigmas the box's ends are such that sums fall on halves, which Pillow's fixed point and float32 round apart.
@pytest.mark.parametrize(
    ("sigma", "limit"), [(0.1, 0.0), (0.35, 0.02), (0.77, 0.02), (1.0, 0.5), (1.37, 0.02), (2.0, 0.07)]
)
def test_blur(squares, sigma, limit):
    taps = box_taps(np.full(len(squares), sigma), box_reach(2.0))
    ours = apply(lambda x, p: operators.blur(x, p["taps"]), squares, taps=taps)
    theirs = [Image.fromarray(x).filter(ImageFilter.GaussianBlur(sigma)) for x in squares]
    gap = Gap.between(ours, theirs)
    assert gap.mean <= limit
    assert gap.most <= 3


def test_blur_of_drawn_sigmas(squares):
    spec = MOCO_V3.views[0]
    p = sample_params(spec, 0, 0, 0, np.arange(len(squares)), *np.full((2, len(squares)), 224))
    ours = apply(lambda x, q: operators.blur(x, q["taps"]), squares, taps=colour_arguments(p, spec)["taps"])
    theirs = [
        Image.fromarray(x).filter(ImageFilter.GaussianBlur(float(s))) for x, s in zip(squares, p.sigma, strict=True)
    ]
    assert Gap.between(ours, theirs).mean < 0.02


def test_blur_wider_than_the_recipe(squares):
    """The number of taps follows the sigma."""
    taps = box_taps(np.array([4.0]), box_reach(4.0))
    assert taps.shape == (1, 9)
    assert taps.sum() == pytest.approx(1.0, abs=1e-6)
    ours = apply(lambda x, p: operators.blur(x, p["taps"]), squares[:1], taps=taps)
    assert Gap.between(ours, [Image.fromarray(squares[0]).filter(ImageFilter.GaussianBlur(4.0))]).mean < 0.1


@pytest.mark.parametrize("threshold", [128, 0, 100, 256])
def test_solarize_is_exact(squares, threshold):
    ours = apply(lambda x, p: operators.solarize(x, threshold), squares)
    theirs = [ImageOps.solarize(Image.fromarray(x), threshold) for x in squares]
    assert Gap.between(ours, theirs).most == 0


def test_flip_is_exact(squares):
    flips = np.arange(len(squares), dtype=np.int32) % 2
    ours = apply(lambda x, p: operators.finish(x, p["flip"], "uint8"), squares, flip=flips)
    theirs = [x[:, ::-1] if flip else x for x, flip in zip(squares, flips, strict=True)]
    assert Gap.between(ours, theirs).most == 0


@pytest.mark.parametrize(("output", "tolerance"), [("float32", 1e-6), ("float16", 0.0)])
def test_normalised_output(squares, output, tolerance):
    """Of float16, every bit is that of torchvision's result rounded once."""
    flips = np.arange(len(squares), dtype=np.int32) % 2
    ours = apply(lambda x, p: operators.finish(x, p["flip"], output), squares, flip=flips)
    for mine, x, flip in zip(ours, squares, flips, strict=True):
        tensor = F.normalize(F.to_tensor(x), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        tensor = (tensor.flip(2) if flip else tensor).permute(1, 2, 0).to(getattr(torch, output))
        assert np.abs(mine.astype(np.float64) - tensor.numpy().astype(np.float64)).max() <= tolerance
