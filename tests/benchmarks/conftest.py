"""What the benchmarks' tests share: results with numbers that somebody chose."""

import pytest

from benchmarks.pictures import write
from benchmarks.results import Measurement, Result

ENVIRONMENT = {
    "hardware": "cpu 2 cores",
    "device": "cpu",
    "cpu": "Some CPU",
    "cores": 2,
    "memory_gb": 8.0,
    "busy_cores": 0.1,
    "gpu": None,
    "driver": None,
    "cuda": None,
    "os": "Linux",
    "python": "3.11.0",
    "versions": {"torch": "2.9.0", "timm": None},
    "torch_threads": 2,
    "commit": "0123456789abcdef",
    "dirty": False,
}


@pytest.fixture
def result():
    """A result of a loader benchmark; `result(rate=…, quick=…)` for another one."""

    def make(rate=100.0, quick=False, hardware="cpu 2 cores"):
        rates = tuple(rate * (1 + 0.01 * i) for i in range(7))
        return Result(
            benchmark="loader",
            subject="",
            created="2026-01-02T03:04:05Z",
            environment=ENVIRONMENT | {"hardware": hardware},
            configuration={
                "quick": quick,
                "rounds": 7,
                "threads": 16,
                "data": "generated",
                "files": {"files": 256, "mean_width": 500.0, "mean_height": 375.0, "mean_kilobytes": 110.0},
            },
            warm_up="three batches",
            measurements=(
                Measurement("loader", "ours", "images/s", rates, "higher", headline=True),
                Measurement("loader", "ours", "CPU-ms/image", (5.0, 5.5, 4.5), "lower"),
                Measurement("loader", "theirs <&|>", "images/s", (50.0,), "higher"),
            ),
            notes=("A note with <tags> & an ampersand.",),
            gpu={"available": False, "reason": "the benchmark ran on the CPU"},
        )

    return make


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A folder with twelve small JPEGs."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        write(number, folder, scale=0.2)
    return folder
