"""The operators and the random numbers of the views against what the reference's own chain gave."""

import numpy as np
import pytest

from dali_pipes import MOCO_V3, ViewSpec, alone, operators, sample_params
from dali_pipes.arguments import box_reach, box_taps
from tests.golden.cases import load


def goldens(kind):
    return [pytest.param(kind, case, id=f"{kind}-{i}") for i, case in enumerate(load("augment")[kind])]


@pytest.mark.parametrize(("augmentation", "golden"), goldens("gaussian_blur"))
def test_blur_of_a_dot_and_of_an_edge(augmentation, golden):
    dot, edge = np.zeros((2, 21, 21, 3), np.uint8)
    dot[10, 10], edge[:, 10:] = 255, 255
    taps = box_taps(np.full(2, golden["sigma"]), box_reach(2.0))
    (ours,) = alone.apply([lambda x, p: operators.blur(x, p["taps"])], [dot, edge], {"taps": taps})
    for image, row in zip(ours, ("impulse_row", "step_row"), strict=True):
        assert np.abs(np.asarray(image)[10, :, 0].astype(int) - golden[row]).max() <= 1


@pytest.mark.parametrize(("augmentation", "golden"), goldens("solarize_lut"))
def test_solarize_of_every_grey_level(augmentation, golden):
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    (ours,) = alone.apply([lambda x, p: operators.solarize(x, 128)], [ramp], {})
    assert np.asarray(ours[0])[0, :, 0].tolist() == golden


@pytest.mark.parametrize(("augmentation", "golden"), goldens("random_resized_crop"))
def test_crops_fall_as_torchvisions(augmentation, golden):
    draws, height, width = golden["draws"], golden["h"], golden["w"]
    spec = ViewSpec(crop_scale=(golden["crop_min"], 1.0))
    p = sample_params(spec, 0, 0, 0, np.arange(draws), np.full(draws, height), np.full(draws, width))
    ours = {
        "area": p.height * p.width / (height * width),
        "aspect_w_over_h": p.width / p.height,
        "top_rel": p.top / height,
        "left_rel": p.left / width,
    }
    for name, values in ours.items():
        for share, value in zip(golden["quantiles"], golden[name], strict=True):
            below, upto = (values < value - 1e-9).mean(), (values <= value + 1e-9).mean()
            error = 4 * np.sqrt(2 * share * (1 - share) / draws)  # of two samples of as many draws
            assert below - error <= share <= upto + error, (name, share)


@pytest.mark.parametrize(("augmentation", "golden"), goldens("color_jitter_ranges"))
def test_jitter_stays_in_its_ranges_and_fills_them(augmentation, golden):
    rows = np.arange(5000)
    for view, spec in enumerate(MOCO_V3.views):
        p = sample_params(spec, view, 0, 0, rows, np.full(5000, 375), np.full(5000, 500))
        for name, (low, high) in golden.items():
            factors = getattr(p, name)
            assert low <= factors.min() < low + 0.01 * (high - low)
            assert high - 0.01 * (high - low) < factors.max() <= high
