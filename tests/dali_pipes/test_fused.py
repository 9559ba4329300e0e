"""The fused kernels against Pillow and torchvision: every byte, in Triton's interpreter; and as code for a GPU.

Triton decides at its import whether it interprets, so that is done in a process of its own.
"""

import itertools
import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

import dali_pipes
from dali_pipes import MOCO_V3, ViewSpec, fused, sample_params
from dali_pipes.fused import FusedView, pack
from dali_pipes.reference import reference_view
from dali_pipes.views import IMAGENET_MEAN, IMAGENET_STD

CPU = torch.device("cpu")
ORDERS = np.array(list(itertools.permutations(range(4))))
# Factors at which one rounding instead of two shows most: in up to 5 % of all pairs of bytes, where at a factor drawn
# at random it mostly shows in none.
REVEALING = np.array([4 / 3, 6 / 5, 2 / 3, 12 / 11, 10 / 11, 10 / 7, 8 / 5, 13 / 12])
NOTHING = ViewSpec(jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0, flip=0.0)
STRONG = replace(NOTHING, jitter=1.0, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
ALL = replace(STRONG, grayscale=0.3, blur=0.7, solarize=0.5, flip=0.5)


def drawn(spec, count, seed=0, **fixed):
    """Parameters whose crop is the whole view; those in `fixed` are given, one for all samples or one for each."""
    p = sample_params(spec, 0, seed, 0, np.arange(count), *np.full((2, count), spec.size))
    whole = {"top": 0, "left": 0, "height": spec.size, "width": spec.size}
    given = {name: np.broadcast_to(v, getattr(p, name).shape) for name, v in (whole | fixed).items()}
    return replace(p, **{name: np.array(v, getattr(p, name).dtype) for name, v in given.items()})


def expected(crops, spec, params):
    """What Pillow and torchvision make of the crops: uint8 (N, size, size, 3)."""
    views = [reference_view(Image.fromarray(crop), spec, params, i) for i, crop in enumerate(crops)]
    return np.stack([np.asarray(view) for view in views])


def normalised(views, output):
    """`ToTensor` and `Normalize` of uint8 views, (N, size, size, 3)."""
    tensors = [F.normalize(F.to_tensor(view), IMAGENET_MEAN, IMAGENET_STD) for view in views]
    return torch.stack(tensors).permute(0, 2, 3, 1).to(getattr(torch, output)).contiguous()


def every_value():
    """(1, 16, 16, 3): each channel takes each value once."""
    values = np.arange(256, dtype=np.uint8)
    return np.stack([values, values[::-1], np.roll(values, 100)], 1).reshape(1, 16, 16, 3)


def pure_and_gray(size):
    """Colours at the corners of the cube and next to them, grays, an extreme noise: (N, size, size, 3)."""
    rng = np.random.default_rng(0)
    levels = np.array(list(itertools.product([0, 1, 127, 128, 254, 255], repeat=3)), np.uint8)
    picked = levels[rng.integers(0, len(levels), (1, size, size))]
    grays = rng.integers(0, 256, (1, size, size, 1), np.uint8).repeat(3, 3)
    return np.concatenate([picked, grays, np.full_like(grays, 255), np.zeros_like(grays)])


def colour_cube(levels, size):
    """Every combination of these levels, as images: (N, size, size, 3)."""
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1)
    return np.ascontiguousarray(cube.reshape(-1, size, size, 3).astype(np.uint8))


def revealing(name, size):
    """Noise, a spec and parameters: contrast or saturation by `REVEALING` factors, after which hue changes little."""
    spec = replace(STRONG, size=size)
    images = np.random.default_rng(0).integers(0, 256, (len(REVEALING), size, size, 3), np.uint8)
    factors = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0} | {name: REVEALING}
    return images, spec, drawn(spec, len(images), order=[1, 2, 0, 3], **factors)


def in_interpreter(crops, spec, params, output, tile):
    """Runs in the other process: the view's bytes, (N, size, size, bytes)."""
    fused._PIXELS = tile
    view = FusedView(spec, output, CPU)(torch.from_numpy(crops), params)
    assert view.shape == (len(crops), 3, spec.size, spec.size)
    assert view.is_contiguous(memory_format=torch.channels_last)
    return view.permute(0, 2, 3, 1).contiguous().view(torch.uint8).numpy()


@pytest.fixture(scope="module")
def interpreted():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()

        def run(crops, spec, params, output="uint8", tile=512):
            return pool.submit(in_interpreter, np.ascontiguousarray(crops), spec, params, output, tile).result()

        yield run


@pytest.fixture(scope="module")
def crops(pictures):
    """crops(size): the photographs as crops of that size."""
    return lambda size: np.stack([np.asarray(picture.resize((size, size))) for picture in pictures])


def check(run, crops, spec, params, **options):
    np.testing.assert_array_equal(run(crops, spec, params, **options), expected(crops, spec, params))


def test_jitter_in_every_order(interpreted, crops):
    spec = replace(STRONG, size=32)
    check(interpreted, np.tile(crops(32), (2, 1, 1, 1)), spec, drawn(spec, 24, order=ORDERS), tile=1024)


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("size", [32, 33])
def test_views_of_the_recipe(interpreted, crops, view, size):
    """An odd size ends within a tile; each size takes every other photograph."""
    spec = replace(MOCO_V3.views[view], size=size)
    check(interpreted, crops(size)[size % 2 :: 2], spec, drawn(spec, 6, seed=view))


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_tiny_views(interpreted, crops, size):
    """The blur's windows are wider than the image."""
    spec = replace(ALL, size=size)
    check(interpreted, crops(size)[:3], spec, drawn(spec, 3, blur=True, grayscale=False))


def test_blur(interpreted, crops):
    """From a sigma that changes nothing, over both widths of the box, to beyond the recipe's."""
    spec = replace(NOTHING, size=17, blur=1.0)
    sigma = [0.1, 0.2, 0.35, 0.5, 0.77, 1.0, 1.2, 1.37, 1.41421, 1.42, 2.0, 2.43]
    check(interpreted, crops(17), spec, drawn(spec, 12, sigma=sigma))


@pytest.mark.parametrize("threshold", [128, 0, 100, 256])
def test_grayscale_solarize_and_flip(interpreted, threshold):
    spec = replace(NOTHING, size=16, grayscale=0.5, solarize=0.5, flip=0.5, solarize_threshold=threshold)
    coins = np.array(list(itertools.product([False, True], repeat=3))).T
    params = drawn(spec, 8, grayscale=coins[0], solarize=coins[1], flip=coins[2])
    check(interpreted, every_value().repeat(8, 0), spec, params)


def test_factors_at_their_limits(interpreted, crops):
    """0 is black or gray and 1 the image itself; beyond, values are clipped; hue turns half around."""
    spec = replace(STRONG, size=16)
    factors = {"brightness": [0, 1, 2, 0.5], "contrast": [1, 0, 2, 11], "saturation": [2, 1, 0, 1.5]}
    factors["hue"] = [0.5, -0.5, 0.0, 1 / 255]
    for seed, images in enumerate((pure_and_gray(16), crops(16)[:4])):
        check(interpreted, images, spec, drawn(spec, 4, seed, **factors))


def test_a_hue_of_strength_zero_is_left_out(interpreted, crops):
    spec = replace(STRONG, size=16, hue=0.0)
    check(interpreted, crops(16)[:4], spec, drawn(spec, 4, order=ORDERS[:4]))


@pytest.mark.parametrize("name", ["contrast", "saturation"])
def test_products_and_sums_are_rounded_by_themselves(interpreted, name):
    check(interpreted, *revealing(name, 32))


@pytest.mark.parametrize("hue", [-0.1, 0.003, 0.4])
def test_hue_of_many_colours(interpreted, hue):
    images = colour_cube(np.r_[0:248:4, 254:256], 512)
    spec = replace(STRONG, size=512)
    params = drawn(spec, 1, brightness=1.0, contrast=1.0, saturation=1.0, hue=hue)
    check(interpreted, images, spec, params, tile=1 << 18)


@pytest.mark.parametrize("output", ["float16", "bfloat16", "float32"])
def test_normalised_output(interpreted, output):
    """Every bit is that of torchvision's result on the CPU; without a blur, and from the blur's own last pass."""
    spec = replace(NOTHING, size=16, blur=0.5, solarize=0.5, flip=0.5)
    params = drawn(spec, 4, blur=[0, 0, 1, 1], solarize=[0, 1, 0, 1], flip=[0, 1, 1, 0], sigma=0.6)
    images = every_value().repeat(4, 0)
    theirs = normalised(expected(images, spec, params), output).view(torch.uint8)
    np.testing.assert_array_equal(interpreted(images, spec, params, output), theirs.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("hue", [0.0, 0.1, -0.05])
def test_hue_of_all_colours(interpreted, hue):
    spec = replace(STRONG, size=1024)
    for image in colour_cube(np.arange(256), 1024):
        params = drawn(spec, 1, brightness=1.0, contrast=1.0, saturation=1.0, hue=hue)
        check(interpreted, image[None], spec, params, tile=1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_draws(interpreted, crops, seed):
    """Everything at once, in every order; sigmas up to what the kernel takes."""
    spec = replace(ALL, size=(32, 33, 47)[seed], sigma=(0.1, 2.43))
    check(interpreted, np.tile(crops(spec.size), (2, 1, 1, 1)), spec, drawn(spec, 24, seed, order=ORDERS))


@pytest.mark.slow
@pytest.mark.parametrize("view", [0, 1])
def test_views_of_full_size(interpreted, squares, view):
    spec = MOCO_V3.views[view]
    check(interpreted, squares[view::6], spec, drawn(spec, 2, blur=[True, False]), tile=1 << 16)


def test_a_sigma_beyond_the_taps_is_refused():
    spec = replace(NOTHING, blur=1.0, sigma=(0.1, 2.5))
    with pytest.raises(ValueError, match=r"sigma 2\.5 is too wide .* below 2\.44"):
        FusedView(spec, "uint8", CPU)
    with pytest.raises(ValueError, match="too wide"):
        pack(drawn(spec, 2, sigma=2.45), spec)
    pack(drawn(spec, 2, sigma=9.0, blur=False), spec)


def test_wrong_use_is_named(interpreted):
    for spec, output, message in (
        (ViewSpec(), "int8", "output 'int8'"),
        (ViewSpec(size=2048), "uint8", "view size 2048 .* at most 2047"),
        (ViewSpec(), "uint8", "device cpu runs no Triton kernels"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedView(spec, output, CPU)
    spec = replace(NOTHING, size=8)
    for images in (
        np.zeros((2, 8, 9, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.int32),
        np.zeros((1, 8, 8, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"give contiguous uint8 of shape \(2, 8, 8, 3\)"):
            interpreted(images, spec, drawn(spec, 2))


def test_without_triton_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "dali_pipes.fused_kernels", raising=False)
    monkeypatch.delattr(dali_pipes, "fused_kernels", raising=False)
    with pytest.raises(ImportError, match="needs triton"):
        FusedView(ViewSpec(), "uint8", torch.device("cuda", 0))


class Launches(list):
    """Kernels that only write down how they are launched: (name, grid, options)."""

    def __getattr__(self, name):
        return _Launch(self, name)


class _Launch:
    def __init__(self, launches, name):
        self.launches, self.name = launches, name

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.name, grid, options))


@pytest.mark.parametrize(
    ("spec", "names"),
    [(ALL, "gray_sum colour blur blur"), (replace(ALL, blur=0.0), "gray_sum colour"), (NOTHING, "colour")],
)
def test_every_launch_forbids_fused_multiply_add(monkeypatch, spec, names):
    launches = Launches()
    monkeypatch.setattr(fused, "_kernels", lambda device: launches)
    FusedView(spec, "float16", CPU)(torch.zeros(3, 224, 224, 3, dtype=torch.uint8), drawn(spec, 3))
    assert [name for name, _, _ in launches] == names.split()
    for _, grid, options in launches:
        assert grid[1] == 3
        assert options["enable_fp_fusion"] is False


# For each kernel the types of its pointers. The output's stands for *out.
POINTERS = {
    "gray_sum": {"crops": "*u8", "records": "*i32"},
    "colour": {"crops": "*u8", "unblurred": "*u8", "view": "*out", "table": "*out", "records": "*i32"},
    "blur": {"source": "*u8", "target": "*out", "table": "*out", "records": "*i32"},
}


def lowered(kernel, output, along_x=False, fusion=False):
    """The kernel compiled for an H100 or H200, without one: its PTX, and its machine code's size."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dali_pipes import fused_kernels

    function = getattr(fused_kernels, kernel)
    constants = {"SIZE": 224, "NORMALISE": output != "u8", "ALONG_X": along_x, "TILE": 512 if kernel != "blur" else 128}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    pointers = {name: kind.replace("out", output) for name, kind in POINTERS[kernel].items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(function, pointers | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return SimpleNamespace(ptx=compiled.asm["ptx"], size=len(compiled.asm["cubin"]))


@pytest.fixture
def compiler_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("compiler_cache")
@pytest.mark.parametrize(
    ("kernel", "output", "along_x"),
    [
        ("gray_sum", "u8", False),
        *(("colour", output, False) for output in ("u8", "fp16", "bf16", "fp32")),
        ("blur", "u8", True),
        *(("blur", output, False) for output in ("u8", "fp16", "bf16", "fp32")),
    ],
)
def test_every_kernel_compiles_for_sm_90_with_each_rounding_in_place(kernel, output, along_x):
    code = lowered(kernel, output, along_x)
    assert code.size > 0
    operations = re.findall(r"\b((?:fma|mul|add|sub|div|rcp|mad)\.[a-z0-9.]*f(?:32|64))\b", code.ptx)
    assert bool(operations) == (kernel != "blur")  # the blur is all integers
    # Triton 3.4 flushes a quotient too small for a normal float32 to 0 (.ftz); of bytes there is none.
    operations = [operation.replace(".ftz", "") for operation in operations]
    assert set(operations) <= {f"{name}.rn.f{bits}" for name in ("mul", "add", "sub", "div") for bits in (32, 64)}


@pytest.mark.usefixtures("compiler_cache")
def test_fusion_would_be_seen():
    assert "fma.rn.f32" in lowered("colour", "u8", fusion=True).ptx
