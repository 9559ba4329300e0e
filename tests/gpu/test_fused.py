"""The fused kernels as a GPU runs them: every byte against Pillow and torchvision; and beside the DALI operators."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dali_pipes import MOCO_V3, alone, operators
from dali_pipes.arguments import Window, colour_arguments, crop_arguments
from dali_pipes.fused import FusedView
from dali_pipes.gap import Gap
from dali_pipes.reference import load_image
from tests.dali_pipes import test_fused as on_cpu
from tests.dali_pipes.test_fused import ALL, NOTHING, ORDERS, STRONG, drawn, expected, normalised


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def crops(photos):
    """crops(size, count): the photographs as crops of that size, again and again."""
    pictures = [load_image(path) for path in photos.paths]

    def make(size, count):
        images = [np.asarray(picture.resize((size, size))) for picture in pictures]
        return np.stack([images[i % len(images)] for i in range(count)])

    return make


def fused(crops, spec, params, device, output="uint8"):
    """The view's bytes, (N, size, size, bytes)."""
    view = FusedView(spec, output, device)(torch.from_numpy(crops).to(device), params)
    assert view.device == device
    assert view.is_contiguous(memory_format=torch.channels_last)
    return view.permute(0, 2, 3, 1).contiguous().view(torch.uint8).cpu().numpy()


def check(crops, spec, params, device):
    np.testing.assert_array_equal(fused(crops, spec, params, device), expected(crops, spec, params))


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("size", [224, 96, 33, 32])
def test_views_of_the_recipe(crops, device, view, size):
    spec = replace(MOCO_V3.views[view], size=size)
    check(crops(size, 48), spec, drawn(spec, 48, seed=size), device)


@pytest.mark.parametrize("size", [1, 2, 5, 7, 16, 97, 224, 225, 384])
def test_everything_at_once_in_every_order(crops, device, size):
    spec = replace(ALL, size=size, sigma=(0.1, 2.43))
    check(crops(size, 48), spec, drawn(spec, 48, order=np.tile(ORDERS, (2, 1))), device)


def test_blur(crops, device):
    spec = replace(NOTHING, size=96, blur=1.0)
    check(crops(96, 48), spec, drawn(spec, 48, sigma=np.linspace(0.1, 2.43, 48)), device)


def test_factors_at_their_limits(device):
    spec = replace(STRONG, size=64)
    factors = {"brightness": [0, 1, 2, 0.5], "contrast": [1, 0, 2, 11], "saturation": [2, 1, 0, 1.5]}
    factors["hue"] = [0.5, -0.5, 0.0, 1 / 255]
    for seed in range(6):
        check(on_cpu.pure_and_gray(64), spec, drawn(spec, 4, seed, **factors), device)


@pytest.mark.parametrize("hue", [0.0, 0.1, -0.05])
def test_hue_of_all_colours(device, hue):
    spec = replace(STRONG, size=1024)
    images = on_cpu.colour_cube(np.arange(256), 1024)
    params = drawn(spec, len(images), brightness=1.0, contrast=1.0, saturation=1.0, hue=hue)
    check(images, spec, params, device)


@pytest.mark.parametrize("name", ["contrast", "saturation"])
def test_no_multiply_add_is_fused(device, name):
    images, spec, params = on_cpu.revealing(name, 256)
    check(images, spec, params, device)


@pytest.mark.parametrize("output", ["float16", "bfloat16", "float32"])
def test_normalised_output(crops, device, output):
    spec = replace(ALL, size=64, grayscale=0.0)
    images = crops(64, 24)
    images[:4, :16, :16] = on_cpu.every_value()
    params = drawn(spec, 24)
    theirs = normalised(expected(images, spec, params), output).view(torch.uint8)
    np.testing.assert_array_equal(fused(images, spec, params, device, output), theirs.numpy())


@pytest.mark.parametrize("view", [0, 1])
def test_beside_the_dali_operators(crops, device, view):
    """The same parameters by the other way: as near as those operators are to Pillow."""
    spec = replace(MOCO_V3.views[view], size=96)
    images = crops(96, 48)
    params = drawn(spec, 48)
    inputs = crop_arguments(Window.of_crop(params, 96), 96) | colour_arguments(params, spec)

    def whole(image, nodes):
        return operators.finish(operators.view(image, nodes, spec), nodes["flip"], "uint8")

    (theirs,) = alone.apply([whole], list(images), inputs, "cuda")
    gap = Gap.between(fused(images, spec, params, device), theirs)
    assert gap.mean < 0.05
    assert gap.by_more < 0.005


def test_on_a_stream_of_its_own(crops, device):
    """Reads the crops after what is queued there, and is ready for the current stream."""
    spec = replace(ALL, size=96)
    images = torch.from_numpy(crops(96, 24)).pin_memory()
    params = [drawn(spec, 24, seed) for seed in range(5)]
    chain, stream = FusedView(spec, "uint8", device), torch.cuda.Stream(device)
    views = []
    for each in params:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            made = images.to(device, non_blocking=True)
        views.append(chain(made, each, stream).clone())  # the clone on the current stream, which must have waited
        del made
    for view, each in zip(views, params, strict=True):
        np.testing.assert_array_equal(view.permute(0, 2, 3, 1).cpu(), expected(images.numpy(), spec, each))


def test_the_host_does_not_wait(crops, device):
    spec = replace(ALL, size=96)
    images, params = torch.from_numpy(crops(96, 24)).to(device), drawn(spec, 24)
    chain, stream = FusedView(spec, "float16", device), torch.cuda.Stream(device)
    for where in (None, stream):
        chain(images, params, where)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        end = torch.cuda.Event()
        torch.cuda._sleep(2_000_000_000)
        chain(images, params)
        end.record()
        assert not end.query()  # queued behind a second of sleep
        chain(images, params, stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def test_the_crops_are_not_changed(crops, device):
    spec = replace(ALL, size=32)
    images = crops(32, 24)
    on_gpu = torch.from_numpy(images).to(device)
    FusedView(spec, "uint8", device)(on_gpu, drawn(spec, 24))
    np.testing.assert_array_equal(on_gpu.cpu(), images)
