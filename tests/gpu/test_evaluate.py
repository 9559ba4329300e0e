"""Evaluation on a GPU, of a run that was trained there."""

import json

import pytest

from evaluate import main
from trainer import run
from trainer.metrics import read_metrics

from ..trainer.conftest import TINY

FLAGS = ["--compile", "off", "--amp", "off", "--device", "cuda"]


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "run"
    assert run([*TINY, *FLAGS, "--data", str(sample), "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["knn", "linear --epochs 2 -b 16", "finetune --epochs 2 --warmup-epochs 1 -b 16"])
def test_every_kind_in_every_precision(kind, amp, trained, sample):
    flags = ["--run", str(trained), "--data", str(sample), "--device", "cuda", "--amp", amp, "--name", "result"]
    assert main([*kind.split(), *flags]) == 0
    found = json.loads((trained / "eval" / "result.json").read_text())
    assert (found["ranks"], found["images"]["val"]) == (1, 20)
    if kind.startswith("finetune"):
        assert found["outcome"]["loss"] < 10


def test_judging_while_training_leaves_the_trace_alone(trained, sample, tmp_path):
    flags = [*TINY, *FLAGS, "--data", str(sample), "--out", str(tmp_path), "--knn-every", "1"]
    assert run(flags) == 0
    judged, plain = (read_metrics(folder) for folder in (tmp_path, trained))
    assert [row["loss"] for row in judged] == pytest.approx([row["loss"] for row in plain], rel=1e-3)
    assert [row["step"] for row in judged if "knn" in row] == [3, 6, 9]
