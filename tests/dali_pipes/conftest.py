from pathlib import Path

import numpy as np
import pytest

from dali_pipes import DatasetIndex
from dali_pipes.reference import load_image

PHOTOS = Path(__file__).parents[1] / "photos"


@pytest.fixture(scope="session")
def photos():
    return DatasetIndex.scan(PHOTOS)


@pytest.fixture(scope="session")
def pictures(photos):
    """The decoded photographs, RGB Pillow images."""
    return [load_image(path) for path in photos.paths]


@pytest.fixture(scope="session")
def squares(pictures):
    """Photographs as 224 x 224 views would be: uint8 (N, 224, 224, 3)."""
    return np.stack([np.asarray(picture.resize((224, 224))) for picture in pictures])
