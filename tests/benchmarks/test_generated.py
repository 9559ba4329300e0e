"""Generated JPEGs: ImageNet's sizes, natural spectra, and a folder that is made once."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.generated import describe, first, generated
from benchmarks.pictures import render
from dali_pipes import DatasetIndex


def test_size_and_bytes_are_those_of_imagenet():
    files = [render(number) for number in range(16)]
    sizes = [Image.open(io.BytesIO(file)).size for file in files]
    assert np.mean([width for width, _ in sizes]) == pytest.approx(500, rel=0.15)
    assert np.mean([height for _, height in sizes]) == pytest.approx(375, rel=0.15)
    assert np.mean([len(file) for file in files]) == pytest.approx(110_000, rel=0.2)
    assert render(3) == files[3]


def test_the_spectrum_falls_as_that_of_photos():
    # Power of natural images falls about as 1 / frequency^2.
    powers = []
    for number in range(4):
        gray = np.asarray(Image.open(io.BytesIO(render(number))).convert("L"), np.float64)[:256, :256]
        powers.append(np.abs(np.fft.fft2(gray - gray.mean())) ** 2)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
    band = (f > 4 / 256) & (f < 0.25)
    slope = np.polyfit(np.log(f[band]), np.log(np.mean(powers, 0)[band]), 1)[0]
    assert -2.7 < slope < -1.5


def test_a_folder_is_made_once_and_grows(tmp_path):
    index = generated(tmp_path, 2, scale=0.2)
    before = {path: Path(path).read_bytes() for path in index.paths}
    larger = generated(tmp_path, 3, scale=0.2)
    assert len(larger) == 3
    assert all(Path(path).read_bytes() == content for path, content in before.items())
    assert describe(larger)["files"] == 3


def test_an_index_is_repeated_where_it_is_too_short(tree):
    index = DatasetIndex.scan(tree)
    longer = first(index, 30)
    assert len(longer) == 30
    assert longer.names[12:24] == index.names
    assert describe(longer)["files"] == 12
