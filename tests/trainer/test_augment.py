"""Which back end augments: what `--augment` comes to on a device, what a run keeps of it, and a run by the kernels."""

import json

import pytest
import torch

from trainer.config import Config, ConfigError, replace
from trainer.metrics import read_metrics
from trainer.preparation import resolve

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = replace(Config(), amp="off", compile="off")


@pytest.fixture
def resolved(monkeypatch):
    """resolved(flag, device, before, reason): the back end and what was said; `reason`: why CUDA has no kernels."""

    def call(flag="auto", device=GPU, before=None, reason=None):
        found = reason if device.type == "cuda" else "device cpu runs no Triton kernels"
        monkeypatch.setattr("trainer.preparation.why_not_fused", lambda device, recipe: found)
        said: list[str] = []
        recorded = {"augment": before} if before else {}
        return resolve(replace(CONFIG, augment=flag), device, said.append, recorded).data.augment, said

    return call


def test_auto_is_fused_on_cuda_and_dali_elsewhere(resolved):
    assert resolved() == ("fused", [])
    assert resolved(device=CPU) == ("dali", [])
    back_end, (line,) = resolved(reason="no C compiler (gcc or clang) on the PATH")
    assert back_end == "dali"
    assert line.startswith("no C compiler (gcc or clang) on the PATH: augmenting with DALI's operators")


def test_auto_keeps_what_the_run_began_with_where_that_runs(resolved):
    assert resolved(before="dali") == ("dali", [])
    assert resolved(before="fused") == ("fused", [])
    back_end, (line,) = resolved(before="fused", device=CPU)
    assert back_end == "dali"
    assert "device cpu runs no Triton kernels: augmenting with DALI's operators" in line


def test_a_flag_is_obeyed_or_refused(resolved):
    assert resolved("dali") == ("dali", [])
    assert resolved("dali", before="dali") == ("dali", [])
    back_end, (line,) = resolved("dali", before="fused")
    assert back_end == "dali"
    assert "the run began with fused" in line
    with pytest.raises(ConfigError, match="--augment fused: no triton; use --augment dali"):
        resolved("fused", reason="no triton")


def test_fused_without_cuda_is_one_line_and_touches_nothing(train, tmp_path, capsys):
    assert train("--no-knn", "--augment", "fused") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "--augment fused: device cpu runs no Triton kernels; use --augment dali" in line
    assert not (tmp_path / "run").exists()


def test_the_engine_of_jpegs_is_recorded_and_must_agree(train, tmp_path, capsys):
    assert train("--no-knn", "--max-steps", 1, "--jpeg-engine", "off") == 0
    flags = json.loads((tmp_path / "run" / "config.json").read_text())["flags"]
    assert (flags["augment"], flags["jpeg_engine"]) == ("dali", "off")
    capsys.readouterr()
    assert train("--no-knn", "--max-steps", 2) == 2
    assert "--jpeg-engine is off there, on here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_by_the_fused_kernels(start, train, sample, tmp_path, monkeypatch, capsys):
    """In Triton's interpreter: it is exact when it goes on, and goes on where there are no kernels, saying so."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    flags = ["--no-knn", "--data", sample, "--batch-size", 2, "--image-size", 16]
    for out, stop, augment in (("whole", 3, "fused"), ("parts", 1, "fused"), ("parts", 3, "auto")):
        process = start(*flags, "--out", tmp_path / out, "--max-steps", stop, "--augment", augment)
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "augment fused" in printed
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["flags"]["augment"] == "fused"
    losses = [[row["loss"] for row in read_metrics(tmp_path / out)] for out in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3

    monkeypatch.delenv("TRITON_INTERPRET")
    capsys.readouterr()
    assert train(*flags, "--max-steps", 4, out="parts") == 0
    assert "augmenting with DALI's operators" in capsys.readouterr().out
