"""Saving while training goes on: what is written is the state of the moment, and a full disk costs no run."""

import subprocess
import threading
import time

import pytest
import torch

from tests.trainer.conftest import command
from tests.trainer.test_checkpoint import state
from trainer import checkpoint
from trainer.metrics import MetricsLog, read_metrics
from trainer.saving import Saver


@pytest.fixture
def held_back(monkeypatch):
    """Writing waits until this is set."""
    go, save = threading.Event(), checkpoint.save

    def waiting(*args):
        assert go.wait(30)
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", waiting)
    return go


def test_the_state_of_the_moment_is_written_while_training_goes_on(tmp_path, held_back):
    saver, training = Saver(tmp_path, 0, None, None, pytest.fail), state(1)
    training["optimizer"] = {"state": {0: {"exp_avg": torch.ones(2, 2).t(), "betas": (0.9, torch.zeros(1))}}}
    training["model"]["weight"].requires_grad_()
    saver.save(training)
    with torch.no_grad():
        training["model"]["weight"].add_(100)
    training["optimizer"]["state"][0]["betas"][1].add_(100)
    training["notes"]["knn"].append("later")
    assert not list(tmp_path.glob("*.pt"))
    held_back.set()
    assert saver.wait() is None
    found = checkpoint.load(tmp_path / "checkpoint_00000001.pt")
    assert found["model"]["weight"].tolist() == [1.0] * 3
    assert found["optimizer"]["state"][0]["betas"][1].tolist() == [0.0]
    assert found["notes"] == state(1)["notes"]


def test_a_second_save_waits_for_the_first_and_counts_as_stall(tmp_path, held_back):
    saver = Saver(tmp_path, 0, None, None, pytest.fail)
    saver.save(state(1))  # returns, though nothing may be written yet
    started, freed = time.monotonic(), []

    def free():
        freed.append(time.monotonic())
        held_back.set()

    threading.Timer(0.5, free).start()
    stall = saver.save(state(2))
    assert (freed[0] - started) / 2 < stall <= time.monotonic() - started
    assert saver.wait() is None
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint_00000002.pt", [])


def test_a_failed_save_is_told_and_the_next_tries_again(tmp_path):
    told: list[str] = []
    saver = Saver(tmp_path / "gone", 0, None, None, told.append)
    saver.save(state(1))
    assert isinstance(saver.wait(), OSError)
    assert len(told) == 1
    assert "checkpoint_00000001.pt could not be written" in told[0]
    (tmp_path / "gone").mkdir()
    saver.save(state(2))
    assert saver.wait() is None
    assert len(told) == 1


def test_saved_every_so_many_steps_and_the_stall_is_logged(train, tmp_path):
    assert train("--no-knn", "--save-every", 2, "--keep", 1, "--keep-every", 2) == 0  # 3 steps an epoch
    assert sorted(int(file.stem[-8:]) for file in (tmp_path / "run").glob("*.pt")) == [6, 9]
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "save_stall" in row] == [3, 4, 5, 7, 9]  # saved at 2 3 4 6 8, and at the end
    assert all(0 <= row["save_stall"] < 60 for row in rows if "save_stall" in row)


def test_saved_every_so_many_minutes(train, tmp_path):
    assert train("--no-knn", "--save-every", "0.000001min", "--keep", 0, "--max-steps", 5) == 0
    assert {1, 2, 3, 4, 5} == {int(file.stem[-8:]) for file in (tmp_path / "run").glob("*.pt")}


def test_minutes_are_sixty_seconds_since_the_last_save(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("trainer.saving.time.monotonic", lambda: now[0])
    saver = Saver(tmp_path, 0, None, 30.0, pytest.fail)
    for start in (1000.0, 5000.0):
        now[0] = start + 30 * 60 - 1
        assert not saver.due()
        now[0] = start + 30 * 60
        assert saver.due()
        now[0] = 5000.0
        saver.save(state(1))
        saver.wait()


def test_halves_of_files_are_swept_at_the_start(train, tmp_path):
    assert train("--no-knn", "--max-steps", 1) == 0
    (tmp_path / "run" / "checkpoint_00000002.pt.part").write_bytes(b"half")
    assert train("--no-knn", "--max-steps", 2) == 0
    assert not list((tmp_path / "run").glob("*.part"))


@pytest.mark.parametrize("rows", [4, 3], ids=["until the next", "until the end"])
def test_rows_wait_for_room_on_the_disk(rows, tmp_path):
    told: list[str] = []
    log = MetricsLog(tmp_path, 0, told.append)
    log.write({"step": 1, "loss": 1.0})
    room = log._rows
    with open("/dev/full", "ab", buffering=0) as log._rows:  # every write finds the disk full
        log.write({"step": 2, "loss": 2.0})
        log.write({"step": 3, "loss": 3.0})
    assert len(told) == 1
    assert "metrics.jsonl cannot be written: No space left on device; training goes on" in told[0]
    log._rows = room
    if rows == 4:
        log.write({"step": 4, "loss": 4.0})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, rows + 1))


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_no_step(train, losses, sample, tmp_path):
    """A small file system of the run's own; a file that takes the rest of it goes away in the middle of the run."""
    (tmp_path / "disk").mkdir()
    flags = ["--data", sample, "--out", tmp_path / "disk" / "run", "--no-knn", "--epochs", 30, "--max-steps", 90]
    script = """
        mount -t tmpfs -o size=8m tmpfs disk || exit 77
        mkdir disk/run; "$@" & run=$!
        while ! test -e disk/run/checkpoint_00000006.pt; do kill -0 $run || exit 1; sleep 0.05; done
        cat /dev/zero > disk/filler 2> /dev/null
        rows=$(wc -l < disk/run/metrics.jsonl); sleep 2; rm disk/filler
        wait $run || exit 1
        cp -r disk/run run; echo "full at $rows rows"
    """
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", *command(*flags)], cwd=tmp_path, capture_output=True, text=True
    )
    if done.returncode == 77 or "unshare: " in done.stderr:
        pytest.skip(f"this system lets nobody mount a file system of their own: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "No space left on device; training goes on, and the next save tries again" in done.stdout
    assert train("--no-knn", "--epochs", 30, "--max-steps", 90, out="whole") == 0
    assert losses() == losses("whole")
    assert checkpoint.newest(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint_00000090.pt"


def test_minutes_are_said_to_be_over_once(tmp_path):
    """The ranks agree a step later; until then it must not be asked for again, or the next step would save as well."""
    saver = Saver(tmp_path, 0, None, 0.0, pytest.fail)
    assert [saver.due(), saver.due()] == [True, False]
    saver.save(state(1))
    saver.wait()
    assert [saver.due(), saver.due()] == [True, False]
