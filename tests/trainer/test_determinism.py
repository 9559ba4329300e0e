"""`--deterministic`: recorded, in force, and two runs equal to the last bit."""

import json
import os

import pytest
import torch
import torch._inductor.config as inductor

from trainer import checkpoint
from trainer.metrics import read_metrics


@pytest.fixture(autouse=True)
def settings_restored():
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.backends.cudnn.deterministic
    padding = inductor.shape_padding
    yield
    inductor.shape_padding = padding
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = before[1]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if before[0] is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = before[0]


def test_two_runs_are_equal_bit_for_bit(train, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)  # which tests have set
    states = []
    for out in ("first", "second"):
        assert train("--no-knn", "--deterministic", "--max-steps", 5, out=out) == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert not inductor.shape_padding
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert json.loads((tmp_path / out / "config.json").read_text())["flags"]["deterministic"] is True
        file, _ = checkpoint.newest(tmp_path / out)
        assert file is not None
        state = checkpoint.load(file)
        states.append({key: state[key] for key in ("model", "optimizer")})
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    losses = [[row["loss"] for row in read_metrics(tmp_path / out)] for out in ("first", "second")]
    assert losses[0] == losses[1]
