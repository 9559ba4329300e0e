import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop

from dali_pipes import MOCO_V3, ViewSpec, sample_params
from dali_pipes.sampling import uniforms

ROWS = np.arange(20_000)
COINS = ("jitter", "grayscale", "blur", "solarize", "flip")
FAIR = ViewSpec(jitter=0.5, grayscale=0.5, blur=0.5, solarize=0.5, flip=0.5)


def draw(spec=MOCO_V3.views[1], view=0, seed=0, epoch=0, rows=ROWS, height=375, width=500):
    return sample_params(spec, view, seed, epoch, rows, np.full(len(rows), height), np.full(len(rows), width))


def ks(a, b):
    """Two-sample Kolmogorov-Smirnov, scaled: 1.95 is passed by chance once in a thousand draws."""
    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    gap = np.abs(np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)).max()
    return gap * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


def test_golden_numbers():
    """What a seed means. These change only with a reason for breaking every run's reproducibility."""
    p = sample_params(MOCO_V3.views[1], 1, 7, 3, [0, 1, 1_281_166], [375, 500, 40], [500, 375, 1200])
    assert np.stack([p.top, p.left, p.height, p.width]).tolist() == GOLDEN_BOXES
    assert p.order.tolist() == GOLDEN_ORDERS
    fair = draw(FAIR, view=1, seed=7, epoch=3, rows=np.arange(32))
    coins = ["".join(map(str, getattr(fair, name).astype(int))) for name in COINS]
    assert coins == GOLDEN_COINS
    factors = np.stack([p.brightness, p.contrast, p.saturation, p.hue, p.sigma])
    np.testing.assert_allclose(factors, GOLDEN_FACTORS, rtol=1e-12)
    assert uniforms(2**64 + 5, 0, 0, [3], 2).tolist() == uniforms(5, 0, 0, [3], 2).tolist() == GOLDEN_UNIFORMS


GOLDEN_BOXES = [[8, 41, 0], [58, 37, 573], [367, 397, 40], [383, 315, 53]]
GOLDEN_ORDERS = [[0, 2, 1, 3], [1, 3, 0, 2], [1, 2, 0, 3]]
GOLDEN_COINS = [
    "11100011101001100110101111001011",
    "11010111010011101011111010011100",
    "00010110110001100111001010001010",
    "01000010111110101001010100100010",
    "10000001010010110110100111011000",
]
GOLDEN_FACTORS = [
    [1.0527462166460635, 0.7183543649650685, 1.0787341927753944],
    [0.9186777001806734, 1.1588556908321674, 1.2674488887669992],
    [0.9625205847267517, 0.8094768905679013, 0.9689791762590863],
    [-0.09641251865871053, -0.04232447291079669, 0.043309584619244224],
    [1.5682197641872924, 1.2671989161558885, 1.0998103469516187],
]
GOLDEN_UNIFORMS = [[0.770385750338124, 0.213261143681425]]


def test_a_batch_is_its_images():
    """The same numbers whatever the batch: alone, in another order, twice."""
    rows = np.array([5, 3, 3, 19_999])
    together, everything = draw(rows=rows), draw()
    for name, array in dataclasses.asdict(together).items():
        assert np.array_equal(array, getattr(everything, name)[rows])


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (224, 224)])
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(8000)]).T
    p = draw(ViewSpec(crop_scale=scale), height=height, width=width)
    ours = np.stack([p.top, p.left, p.height, p.width])
    assert (ours[0] >= 0).all()
    assert (ours[1] >= 0).all()
    assert (ours[0] + ours[2] <= height).all()
    assert (ours[1] + ours[3] <= width).all()
    for side in range(4):
        assert ks(ours[side], theirs[side]) < 1.95
    assert ks(ours[2] * ours[3], theirs[2] * theirs[3]) < 1.95
    assert ks(ours[2] / ours[3], theirs[2] / theirs[3]) < 1.95


@pytest.mark.parametrize(("height", "width"), [(40, 1200), (1200, 40), (1, 375), (375, 1), (1, 1), (2, 2), (7, 5)])
def test_boxes_of_odd_shapes(height, width):
    """As torchvision: where no try fits, the largest allowed box, centred; and no box of no pixels."""
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)])
    p = draw(ViewSpec(crop_scale=(0.08, 1.0)), rows=ROWS[:3000], height=height, width=width)
    ours = np.stack([p.top, p.left, p.height, p.width], 1)
    theirs_only = {tuple(box) for box in theirs}
    if height in (40, 1, 375, 1200):  # never a fit: one box
        assert {tuple(box) for box in ours} == theirs_only
        assert len(theirs_only) == 1
    for side in range(4):
        assert ks(ours[:, side], theirs[:, side]) < 1.95


def test_factors_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [ColorJitter.get_params(*ranges) for _ in range(8000)]
    p = draw()
    for place, ours in enumerate((p.brightness, p.contrast, p.saturation, p.hue), start=1):
        assert ks(ours, np.array([draw[place] for draw in theirs])) < 1.95
    assert ks(p.sigma, np.random.default_rng(0).uniform(0.1, 2.0, 8000)) < 1.95


def test_all_orders_are_equally_likely():
    places = draw().order @ [64, 16, 4, 1]
    counts = np.unique(places, return_counts=True)[1]
    assert len(counts) == 24
    expected = len(ROWS) / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-square, 23 degrees of freedom, 1 in 1000


@pytest.mark.parametrize("name", ["jitter", "grayscale", "blur", "solarize", "flip"])
@pytest.mark.parametrize("spec", MOCO_V3.views)
def test_coins_fall_as_often_as_the_spec_says(spec, name):
    p, often = getattr(spec, name), getattr(draw(spec), name).mean()
    assert abs(often - p) <= 3.3 * math.sqrt(p * (1 - p) / len(ROWS))


def test_streams_are_independent():
    """Numbers of one address are unrelated to those of its neighbours along every axis."""
    base = uniforms(0, 0, 0, ROWS, 33)
    others = {
        "seed": uniforms(1, 0, 0, ROWS, 33),
        "epoch": uniforms(0, 1, 0, ROWS, 33),
        "view": uniforms(0, 0, 1, ROWS, 33),
        "row": uniforms(0, 0, 0, ROWS + 1, 33),
        "number": np.roll(base, 1, axis=1),
    }
    limit = 4.5 / math.sqrt(len(ROWS))  # unrelated numbers correlate by more once in 100,000 times
    for axis, other in others.items():
        for k in range(33):
            assert abs(np.corrcoef(base[:, k], other[:, k])[0, 1]) < limit, (axis, k)
            # Also what no correlation shows: all 64 fields of the unit square hold as many pairs.
            pairs = np.histogram2d(base[:, k], other[:, k], bins=8, range=[(0, 1)] * 2)[0]
            expected = len(ROWS) / 64
            assert ((pairs - expected) ** 2 / expected).sum() < 138, (axis, k)  # passed once in 6 million times
    assert ks(base.ravel()[::7], np.random.default_rng(0).uniform(size=90_000)) < 1.95


def test_what_is_drawn_for_an_image_is_independent():
    """No two share a number: with a blur's coin and strength of one, weak blurs would never be."""
    p = draw(FAIR)
    drawn = {name: getattr(p, name) for name in (*COINS, "brightness", "contrast", "saturation", "hue", "sigma")}
    drawn |= {"order": p.order[:, 0], "top": (p.top + 0.5) / (376 - p.height), "left": (p.left + 0.5) / (501 - p.width)}
    drawn |= {"area": p.height * p.width, "ratio": p.height / p.width}
    for one, other in itertools.combinations(drawn, 2):
        if (one, other) != ("area", "ratio"):  # of which some pairs do not fit into the image
            related = np.corrcoef(drawn[one].astype(float), drawn[other].astype(float))[0, 1]
            assert abs(related) < 4.5 / math.sqrt(len(ROWS)), (one, other)


def test_addresses_do_not_collide():
    """Parts of an address are mixed one after the other, so that sums like seed + epoch do not meet."""
    first = {uniforms(seed, epoch, view, [row], 1).item() for seed, epoch, view, row in np.ndindex(6, 6, 6, 6)}
    assert len(first) == 6**4
