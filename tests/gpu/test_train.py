"""The real command on a GPU."""

import json

import pytest
import torch

from trainer import run
from trainer.metrics import read_metrics

from ..trainer.conftest import TINY as DEMO

TINY = [*DEMO, "--device", "cuda"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each run compiles for itself; many in one process would count as recompilations."""
    yield
    torch._dynamo.reset()


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


@pytest.mark.parametrize("compile_", ["off", "on"])
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_a_run_trains_and_is_judged(sample, tmp_path, amp, compile_):
    assert run([*TINY, "--data", str(sample), "--out", str(tmp_path), "--amp", amp, "--compile", compile_]) == 0
    assert len(losses(tmp_path)) == 9
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["device"] == torch.cuda.get_device_name()
    assert 0 <= summary["knn_after"] <= 1


def test_float32_follows_the_cpu(sample, tmp_path):
    flags = ["--data", str(sample), "--no-knn", "--amp", "off", "--compile", "off", "--max-steps", "3"]
    assert run([*TINY, *flags, "--out", str(tmp_path / "gpu")]) == 0
    assert run([*TINY, *flags, "--out", str(tmp_path / "cpu"), "--device", "cpu"]) == 0
    # The decoders differ by a fraction of a grey level.
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=0.02)


def test_a_run_goes_on_where_it_stopped(sample, tmp_path):
    flags = ["--data", str(sample), "--no-knn", "--amp", "off", "--compile", "off"]
    assert run([*TINY, *flags, "--out", str(tmp_path / "whole")]) == 0
    assert run([*TINY, *flags, "--out", str(tmp_path / "run"), "--max-steps", "4"]) == 0
    assert run([*TINY, *flags, "--out", str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_out_of_memory_says_which_batch_would_fit(sample, tmp_path, capsys):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    kept = torch.cuda.memory_reserved()  # by tests before this one
    torch.cuda.set_per_process_memory_fraction((kept + 600 * 2**20) / total)
    try:
        # About 1 GB of activations at this batch, 60 MB of parameters; no batch norm, which would rule out chunks.
        sizes = "--arch vit_small --image-size 224 --embed-dim 384 --depth 4 --num-heads 6 --batch-size 48".split()
        code = run([*TINY, *sizes, "--no-knn", "--compile", "off", "--data", str(sample), "--out", str(tmp_path)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 2
    error = capsys.readouterr().err
    assert "is out of memory" in error
    assert "a step fits with --microbatch" in error


@pytest.mark.parametrize("ranks", [1, 2])
def test_under_torchrun_with_nccl(ranks, sample, tmp_path, start):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    flags = ["--device", "cuda", "--data", sample, "--compile", "off"]
    process = start(*flags, "--out", tmp_path / "run", ranks=ranks)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found = losses(tmp_path / "run")
    assert len(found) == 9
    if ranks > 1:  # as one process, but for rounding
        assert run([*TINY, *map(str, flags), "--out", str(tmp_path / "one"), "--no-knn"]) == 0
        assert found[:4] == pytest.approx(losses(tmp_path / "one")[:4], rel=0.02)
