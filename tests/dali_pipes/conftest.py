import shutil
from pathlib import Path

import numpy as np
import pytest

from dali_pipes import DatasetIndex
from dali_pipes.reference import load_image
from tests.dali_pipes.failing import COUNT, copied, make
from tests.dali_pipes.odd_files import encoded, picture

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


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    for i in range(COUNT):
        (root / f"{i:02d}.jpg").write_bytes(encoded(picture(i), "JPEG"))
    return root


@pytest.fixture
def index(original, tmp_path):
    return DatasetIndex.scan(shutil.copytree(original, tmp_path / "images"))


@pytest.fixture(scope="module")
def undisturbed(original):
    return copied(make(DatasetIndex.scan(original)), epochs=3)


@pytest.fixture
def tree(tmp_path):
    """Three classes; nested folders, a link, other files, upper case, a loose image."""
    root = tmp_path / "tree"
    names = ["b/2.jpg", "b/10.jpg", "b/deep/er/1.PNG", "a/x.JPEG", "a/y.jpg", "B/z.webp", "loose.jpg"]
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"PNG": "PNG", "webp": "WEBP"}.get(name.rsplit(".")[-1], "JPEG")
        path.write_bytes(encoded(picture(seed, 40 + seed, 50), kind))
    (root / "a" / "notes.txt").write_text("no image by its name")
    (root / "a" / "linked").symlink_to("../b/deep")
    return root
