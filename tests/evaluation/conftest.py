"""A run of the real command on generated images, for what evaluates runs."""

import pytest

from dali_pipes.synthetic import generate
from tests.trainer.conftest import TINY
from trainer import run


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A folder with train/ (51 images: no even number) and val/ (19), ten classes."""
    folder = tmp_path_factory.mktemp("evaluation") / "sample"
    generate(folder, seed=0, train_per_class=5, val_per_class=2)
    classes = sorted((folder / "train").iterdir())
    source = sorted(classes[0].iterdir())[0]
    (classes[3] / f"more{source.suffix}").write_bytes(source.read_bytes())
    sorted((folder / "val" / classes[4].name).iterdir())[0].unlink()
    return folder


@pytest.fixture(scope="session")
def trained(sample, tmp_path_factory):
    """The folder of a tiny run that ended."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    assert run([*TINY, "--data", str(sample), "--out", str(folder)]) == 0
    return folder
