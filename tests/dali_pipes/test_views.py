import dataclasses

import pytest

from dali_pipes import MOCO_V2, MOCO_V3, SIMCLR, Recipe, ViewSpec, multi_crop


def test_moco_v3_is_the_reference_recipe():
    first, second = MOCO_V3.views
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    for view in MOCO_V3.views:
        assert view.size == 224
        assert view.crop_scale == (0.08, 1.0)
        assert view.crop_ratio == (3 / 4, 4 / 3)
        assert (view.jitter, view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.4, 0.4, 0.2, 0.1)
        assert (view.grayscale, view.sigma, view.solarize_threshold, view.flip) == (0.2, (0.1, 2.0), 128, 0.5)


def strengths(view):
    return view.brightness, view.contrast, view.saturation, view.hue


def test_moco_v2_and_simclr_are_symmetric():
    for recipe, crop_min, jitter in ((MOCO_V2, 0.2, (0.4, 0.4, 0.4, 0.1)), (SIMCLR, 0.08, (0.8, 0.8, 0.8, 0.2))):
        first, second = recipe.views
        assert first == second
        assert first.crop_scale == (crop_min, 1.0)
        assert strengths(first) == jitter
        assert (first.jitter, first.grayscale, first.flip) == (0.8, 0.2, 0.5)
        assert (first.blur, first.sigma, first.solarize) == (0.5, (0.1, 2.0), 0.0)


def test_multi_crop_is_dinos():
    first, second, *local = multi_crop(n_local=6).views
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert len(local) == 6
    for view in (first, second):
        assert (view.size, view.crop_scale) == (224, (0.4, 1.0))
    for view in local:
        assert (view.size, view.crop_scale, view.blur, view.solarize) == (96, (0.05, 0.4), 0.5, 0.0)
    for view in (first, second, *local):
        assert strengths(view) == (0.4, 0.4, 0.2, 0.1)
    assert len(multi_crop(0).views) == 2
    with pytest.raises(ValueError, match="-1 local views"):
        multi_crop(-1)


def test_scaling_keeps_proportions_and_the_rest():
    recipe = Recipe((ViewSpec(size=224), ViewSpec(size=96, blur=0.3)))
    scaled = recipe.scaled(112)
    assert [view.size for view in scaled.views] == [112, 48]
    assert dataclasses.replace(scaled.views[1], size=96) == recipe.views[1]
    assert recipe.scaled(224) == recipe


def test_crop_min_is_set_in_every_view():
    assert {view.crop_scale for view in MOCO_V3.with_crop_min(0.2).views} == {(0.2, 1.0)}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", 0, "view size 0 is not a size"),
        ("jitter", 1.2, r"jitter probability 1.2 is outside \[0, 1\]"),
        ("crop_scale", (0.0, 1.0), "crop_scale"),
        ("crop_scale", (0.5, 1.5), "crop_scale"),
        ("sigma", (2.0, 1.0), "sigma"),
        ("hue", 0.6, "hue strength 0.6"),
    ],
)
def test_numbers_out_of_range_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        ViewSpec(**{field: value})


def test_a_recipe_needs_a_view():
    with pytest.raises(ValueError, match="at least one view"):
        Recipe(())
