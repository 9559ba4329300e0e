import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import ImageFilter

from dali_pipes import MOCO_V2, MOCO_V3, SIMCLR, Recipe, ViewLoader, ViewSpec, multi_crop, sample_params
from dali_pipes.equality import view_gaps
from dali_pipes.gap import Gap
from dali_pipes.graph import decode
from dali_pipes.reference import ReferenceViews, load_image, reference_view
from tests.dali_pipes.odd_files import GOOD, write_odd_files


@pytest.mark.parametrize("hue", [0.1, 0.0])
def test_reference_is_torchvisions_transforms_with_the_dice_fixed(pictures, hue):
    """Ranges of one value leave torchvision's own random transforms nothing to draw but the order."""
    spec = ViewSpec(size=96, jitter=1.0, hue=hue, grayscale=0.0, blur=1.0, solarize=1.0, flip=1.0)
    p = sample_params(spec, 0, 0, 0, np.arange(12), [im.height for im in pictures], [im.width for im in pictures])
    for i, picture in enumerate(pictures):
        torch.manual_seed(i)
        order = torch.randperm(4)  # the first thing that ColorJitter draws
        p.order[i] = order.numpy()
        fixed = [(float(v[i]),) * 2 for v in (p.brightness, p.contrast, p.saturation, p.hue)]
        jitter, solarize = T.ColorJitter(*fixed), T.RandomSolarize(128, p=1.0)
        box = [int(side[i]) for side in (p.top, p.left, p.height, p.width)]
        torch.manual_seed(i)
        view = jitter(T.functional.resized_crop(picture, *box, [96, 96]))
        view = solarize(view.filter(ImageFilter.GaussianBlur(float(p.sigma[i]))))
        view = T.RandomHorizontalFlip(p=1.0)(view)
        assert np.array_equal(np.asarray(reference_view(picture, spec, p, i)), np.asarray(view))


@pytest.mark.parametrize("crop_min", [0.08, 0.2])
@pytest.mark.parametrize("size", [224, 96, 32])
def test_views_equal_torchvisions(photos, size, crop_min):
    for gap in view_gaps(photos, MOCO_V3.with_crop_min(crop_min), size, draws=36, seed=11):
        assert gap.mean < 0.02
        assert gap.by_more < 0.003


@pytest.mark.parametrize("size", [224, 96, 32])
@pytest.mark.parametrize(
    "recipe",
    [MOCO_V2, SIMCLR, multi_crop(n_local=2), Recipe((ViewSpec(jitter=1.0, hue=0.0),))],
    ids=["moco-v2", "simclr", "multi-crop", "no hue"],
)
def test_views_of_other_recipes(photos, recipe, size):
    for gap in view_gaps(photos, recipe, size, draws=12, seed=5):
        assert gap.mean < 0.05
        assert gap.by_more < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("crop_min", [0.08, 0.2])
@pytest.mark.parametrize("size", [224, 96, 32])
def test_views_equal_torchvisions_over_a_thousand_draws(photos, size, crop_min):
    recipe = MOCO_V3.with_crop_min(crop_min)
    for view, gap in enumerate(view_gaps(photos, recipe, size, draws=1000, seed=11), start=1):
        print(f"\n{size} px, crop_min {crop_min}, view {view}: {gap}", end="")
        assert gap.mean < 0.02
        assert gap.by_more < 0.002


def test_decoded_pixels_are_pillows(tmp_path, photos, pictures):
    """Of photographs and of every odd file that the index keeps, at full size: not a bit differs."""
    write_odd_files(tmp_path / "odd", pictures[0])
    paths = photos.paths + [str(tmp_path / "odd" / name) for name in GOOD]
    assert Gap.between(decode(paths), map(load_image, paths)).most == 0


def test_any_number_of_views(photos):
    recipe = Recipe((ViewSpec(size=64), ViewSpec(size=32, jitter=0.0, blur=0.0), ViewSpec(size=32, grayscale=0.0)))
    loader = ViewLoader(photos, recipe=recipe, batch_size=6, image_size=64, num_threads=2)
    batch = next(iter(loader))
    assert [view.shape for view in batch.views] == [(6, 3, 64, 64), (6, 3, 32, 32), (6, 3, 32, 32)]
    reference = ReferenceViews(photos, recipe)
    theirs = [reference[row][0] for row in batch.indices.tolist()]
    for view in range(3):
        assert Gap.between(batch.views[view], [views[view] for views in theirs]).mean < 0.05
