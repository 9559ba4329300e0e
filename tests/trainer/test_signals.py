"""The first signal is a request, the second an order; the scheduler reads in status.json what became of the run."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch.distributed as dist

from tests.trainer.conftest import ROOT, lives, rank_processes, status, wait_for_row
from trainer import config as configuration
from trainer import launch, preparation
from trainer.distributed import World
from trainer.loop import TrainingError
from trainer.signals import Stopped
from trainer.status import Status

# Waits inside C code, as in a collective whose peer is gone: Python's own handlers do not run there.
STUCK = """
import ctypes, sys
from trainer.signals import StopSignals
StopSignals.SAME_SIGNAL_SECONDS = 1.0
signals = StopSignals()
with signals.patiently():
    print("ready", flush=True)
    lock = ctypes.CDLL(None).sem_wait
    semaphore = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).sem_init(semaphore, 0, 0)
    while lock(semaphore):
        pass
"""


def test_a_second_signal_ends_at_once_also_inside_a_collective():
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the same one again, as torchrun and a terminal send it
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 128 + signal.SIGINT
    process.stdout.close()


def test_what_became_of_a_run_stands_in_its_folder(train, tmp_path, monkeypatch, capsys):
    assert train("--no-knn", "--max-steps", 2) == 0
    assert (status(tmp_path / "run")["status"], status(tmp_path / "run")["step"]) == ("finished", 2)

    seen = []
    fit = launch.fit

    def failing(engine, *rest):
        seen.append(status(tmp_path / "run")["status"])
        fit(engine, *rest)
        raise TrainingError("loss is nan")

    monkeypatch.setattr(launch, "fit", failing)
    assert train("--no-knn", "--max-steps", 4) == 1
    assert seen == ["running"]
    found = status(tmp_path / "run")
    assert (found["status"], found["step"], found["reason"]) == ("failed", 4, "loss is nan")


def test_sigterm_where_there_is_no_step_to_finish(train, tmp_path, monkeypatch):
    def taken_away(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_scan", taken_away)
        assert train("--max-steps", 2) == 0
    assert status(tmp_path / "run")["status"] == "preempted"
    assert train("--max-steps", 2, "--no-knn") == 0
    assert status(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize("step", [0, 2], ids=["before the first step", "after the last"])
def test_sigterm_while_features_are_judged(step, train, judging_stopped_at, tmp_path):
    with judging_stopped_at(step):
        assert train("--max-steps", 2) == 0
    assert (status(tmp_path / "run")["status"], status(tmp_path / "run")["step"]) == ("preempted", step)
    assert train("--max-steps", 2) == 0
    assert status(tmp_path / "run")["status"] == "finished"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["knn_before"] is not None
    assert summary["knn_after"] is not None


def test_a_failure_of_any_rank_stays_where_torchrun_then_stops_the_others(tmp_path):
    """Else a run whose rank crashes at each start would look preempted, and be queued again for ever."""
    first, second = (Status(tmp_path, pytest.fail, lambda: 7, leads) for leads in (True, False))
    with suppress(Stopped), first.during():
        with suppress(RuntimeError), second.during():
            assert status(tmp_path)["status"] == "running"
            raise RuntimeError("CUDA error on rank 1")
        raise Stopped
    assert (status(tmp_path)["status"], status(tmp_path)["reason"]) == ("failed", "CUDA error on rank 1")
    first.write("running")  # the next start
    assert status(tmp_path)["status"] == "running"
    second.write("finished")
    assert status(tmp_path)["status"] == "running"
    first.write("preempted")
    second.write("failed", "connection closed by peer")
    assert status(tmp_path)["status"] == "preempted"


def test_the_other_ranks_know_where_the_run_is(tmp_path):
    """They say it if they fail before they have read the checkpoint."""
    argv = ["demo", "--data", str(tmp_path), "--out", str(tmp_path)]
    told = json.dumps(launch._packed(preparation.Start(configuration.parse(argv), None, step=5000)))
    store = dist.HashStore()
    store.set(launch.READY, told)
    start = launch._follow(argv, World(rank=1, size=2, torchrun=True), store)
    assert start is not None
    assert start.step == 5000


STARTING = """
import sys, time
from trainer import launch
settle = launch.settle

def slowly(engine):
    print("settling", flush=True)
    time.sleep(6)
    settle(engine)

launch.settle = slowly
sys.exit(launch.run(sys.argv[1:]))
"""
JUDGING = """
import sys, time
from trainer import launch
from trainer.judgement import Judge
measure = Judge._measure

def slowly(*arguments):
    print("judging", flush=True)
    time.sleep(8)
    return measure(*arguments)

Judge._measure = slowly
sys.exit(launch.run(sys.argv[1:]))
"""


@pytest.fixture
def two_ranks(start, sample, tmp_path):
    """Run a script in train_ddp.py's place until a rank says this; gives torchrun's process and the ranks' numbers."""

    def call(script, says):
        (tmp_path / "script.py").write_text(script)
        process = start("--data", sample, "--out", tmp_path / "run", ranks=2, script=tmp_path / "script.py")
        while says not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(2)  # until the other rank is there as well
        return process, rank_processes(process)

    return call


def wait_for_its_end(number):
    """Until that process is gone; but not as long as gloo or torchrun's store would take to notice."""
    deadline = time.monotonic() + 60
    while lives(number):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "says", "killed"),
    [
        (STARTING, "settling", "torchrun"),
        (STARTING, "settling", "rank 0"),
        (STARTING, "settling", "rank 1"),
        (JUDGING, "judging", "torchrun"),
        (JUDGING, "judging", "rank 1"),
    ],
    ids=["start-torchrun", "start-rank 0", "start-rank 1", "judging-torchrun", "judging-rank 1"],
)
def test_what_is_killed_before_the_first_step_is_noticed(script, says, killed, two_ranks, tmp_path):
    """No step is under way, and no row of metrics tells where a run is."""
    process, ranks = two_ranks(script, says)
    os.kill(process.pid if killed == "torchrun" else ranks[int(killed[-1])], signal.SIGKILL)
    wait_for_its_end(ranks[killed == "rank 0"])
    found = status(tmp_path / "run")
    if killed == "torchrun":
        assert (found["status"], found["step"]) == ("preempted", 0)
    else:
        assert found["status"] == "failed"
        assert f"no sign of life from {killed} (node 0" in found["reason"]
        _, said = process.communicate(timeout=60)
        (line,) = [line for line in said.splitlines() if line.startswith("train_ddp.py: error: ")]
        assert f"no sign of life from {killed} (node 0" in line


@pytest.mark.slow
def test_a_rank_that_is_taken_away_alone_before_the_first_step_is_not_lost(two_ranks, tmp_path):
    """As where one node of several is: the others are told why it is gone."""
    process, ranks = two_ranks(STARTING, "settling")
    os.kill(ranks[1], signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    found = status(tmp_path / "run")
    assert (found["status"], found["reason"]) == ("preempted", "")


OTHER_DEVICE = """
import dataclasses, sys
from trainer import launch
follow = launch._follow
launch._follow = lambda *given: dataclasses.replace(follow(*given), device="cuda")
sys.exit(launch.run(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_on_another_kind_of_device_than_rank_0_are_told_once(start, sample, tmp_path):
    (tmp_path / "script.py").write_text(OTHER_DEVICE)
    flags = ["--data", sample, "--out", tmp_path / "run", "--batch-size", 12]
    run = start(*flags, ranks=3, script=tmp_path / "script.py")
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1  # torchrun's
    assert errors.count("train_ddp.py: error:") == 1
    assert "computes on cpu and rank 0 on cuda; see what is wrong with the GPU there (make doctor)" in errors


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_leaves_preempted(start, sample, tmp_path):
    run = start("--data", sample, "--out", tmp_path / "run", "--no-knn", "--epochs", 500, ranks=2)
    wait_for_row(tmp_path / "run" / "metrics.jsonl", run)
    run.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    printed, _ = run.communicate(timeout=60)
    assert time.monotonic() - asked < 25
    found = status(tmp_path / "run")
    assert found["status"] == "preempted"
    assert f"stopped at step {found['step']} of" in printed
    assert (tmp_path / "run" / "latest").read_text() == f"checkpoint_{found['step']:08d}.pt\n"


def test_a_signal_before_the_first_step_is_a_preemption(train, tmp_path, monkeypatch):
    """A scheduler that found no status would take it for a start that failed, and not queue it again."""

    def settling(engine):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    assert train("--no-knn", "--max-steps", 2) == 0
    monkeypatch.setattr(launch, "settle", settling)
    for out, step in (("new", 0), ("run", 2)):
        assert train("--no-knn", out=out) == 0
        assert (status(tmp_path / out)["status"], status(tmp_path / out)["step"]) == ("preempted", step)


@pytest.mark.parametrize(
    ("handler", "became"), [(signal.SIG_DFL, "preempted"), (signal.SIG_IGN, "finished")], ids=["terminal", "nohup"]
)
def test_a_terminal_that_goes_away_ends_no_run_half_way(handler, became, train, tmp_path, monkeypatch):
    fit = launch.fit

    def hung_up(engine, *rest):
        os.kill(os.getpid(), signal.SIGHUP)
        return fit(engine, *rest)

    monkeypatch.setattr(launch, "fit", hung_up)
    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert train("--no-knn") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert status(tmp_path / "run")["status"] == became
    assert (tmp_path / "run" / "latest").exists()
