"""A run of the real command on generated images, for what evaluates runs."""

import json

import pytest

from dali_pipes.synthetic import generate
from evaluate import main
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


@pytest.fixture
def evaluate(trained, sample):
    """Evaluate the run in this process; returns the JSON of that name."""

    def call(*flags, name):
        assert main([*map(str, flags), "--run", str(trained), "--data", str(sample)]) == 0
        return json.loads((trained / "eval" / f"{name}.json").read_text())

    return call


@pytest.fixture
def refused(trained, sample, tmp_path, capsys):
    """Check that a command is refused with one line and leaves no result; returns the line."""

    def call(*flags, run=trained, data=sample):
        before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
        assert main([*map(str, flags), "--run", str(run), "--data", str(data), "--device", "cpu"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("evaluate.py: error: ")
        assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == before
        return line

    return call
