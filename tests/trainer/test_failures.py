"""Ranks that are killed or hang: the run ends in time, says who it was, and goes on as if nothing had happened."""

import json
import os
import signal
import time

import pytest

from tests.trainer.conftest import rank_processes, wait_for_row

# Gradients of more than DDP's first bucket of 1 MiB, and steps that are long enough to be hit by a signal.
FLAGS = ["--no-knn", "--moco-mlp-dim", 384, "--epochs", 10, "--max-steps", 30, "--save-every", 2]
RESTARTS = ("--standalone", "--max-restarts=3")


@pytest.mark.slow
def test_four_ranks_of_which_one_is_killed_twice_give_the_undisturbed_trace(start, losses, sample, tmp_path):
    whole = start(*FLAGS, "--data", sample, "--out", tmp_path / "whole", ranks=4)
    assert whole.wait(300) == 0, whole.communicate()[1]
    run = start(*FLAGS, "--data", sample, "--out", tmp_path / "run", ranks=4, torchrun=RESTARTS)
    for rank, rows in ((2, 5), (0, 15)):
        wait_for_row(tmp_path / "run" / "metrics.jsonl", run, rows)
        os.kill(rank_processes(run)[rank], signal.SIGKILL)
        time.sleep(1)
    printed, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert printed.count("step 0 of 30") == 1
    assert "no sign of life from rank 2 (node 0" in errors
    assert list(losses()) == list(range(1, 31))
    assert losses() == losses("whole")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_within_the_timeout(start, losses, sample, tmp_path):
    flags = [*FLAGS, "--data", sample, "--out", tmp_path / "run"]
    run = start(*flags, "--timeout", 30, ranks=2)
    wait_for_row(tmp_path / "run" / "metrics.jsonl", run, 4)
    hung = rank_processes(run)[1]
    os.kill(hung, signal.SIGSTOP)
    stopped = time.monotonic()
    status = tmp_path / "run" / "status.json"
    while json.loads(status.read_text())["status"] == "running":
        assert time.monotonic() < stopped + 30
        time.sleep(0.2)
    os.kill(hung, signal.SIGCONT)  # or torchrun would wait for 30 s before it kills it
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    (line,) = [line for line in errors.splitlines() if line.startswith("train_ddp.py: error")]
    assert f"no sign of life from rank 1 (node 0: {os.uname().nodename}, pid {hung})" in line
    reported = json.loads(status.read_text())
    assert reported["status"] == "failed"
    assert "rank 1" in reported["reason"]
    again = start(*flags, ranks=2)
    assert again.wait(300) == 0, again.communicate()[1]
    assert list(losses()) == list(range(1, 31))
