import dataclasses

import pytest

from dali_pipes import MOCO_V3, Recipe, ViewSpec


def test_moco_v3_is_the_reference_recipe():
    first, second = MOCO_V3.views
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    for view in MOCO_V3.views:
        assert view.size == 224
        assert view.crop_scale == (0.08, 1.0)
        assert view.crop_ratio == (3 / 4, 4 / 3)
        assert (view.jitter, view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.4, 0.4, 0.2, 0.1)
        assert (view.grayscale, view.sigma, view.solarize_threshold, view.flip) == (0.2, (0.1, 2.0), 128, 0.5)


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
