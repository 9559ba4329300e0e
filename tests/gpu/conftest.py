"""Everything here needs CUDA: marked `gpu`, and skipped without it."""

from pathlib import Path

import pytest
import torch

from dali_pipes import DatasetIndex

from ..trainer.conftest import sample, start  # noqa: F401 (fixtures)

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def convolutions_as_before():
    """A training leaves it to cuDNN's measurements which kernels are taken, in all the process."""
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


@pytest.fixture(scope="session")
def photos():
    return DatasetIndex.scan(HERE.parent / "photos")
