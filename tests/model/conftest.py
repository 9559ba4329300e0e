import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """On a shared CPU OpenMP's threads wait for each other busily: one alone is several times faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
