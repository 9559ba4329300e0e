"""What a run tells of its speed and its waits, on every channel, and who is told to be to blame."""

import datetime
import io
import itertools
import json
import time

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from dali_pipes import ViewLoader
from trainer import advice, checkpoint, distributed
from trainer.distributed import World
from trainer.heartbeat import Heartbeat
from trainer.loop import UNJUDGED
from trainer.metrics import Display, MetricsLog, read_metrics
from trainer.signals import Stopped


def test_rows_come_every_so_many_steps_and_at_each_epochs_end(train, tmp_path):
    assert train("--no-knn", "--log-every", 2) == 0  # 3 steps an epoch
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [2, 3, 4, 6, 8, 9]


def test_the_rate_is_that_of_all_steps_since_the_row_before(train, tmp_path):
    assert train("--no-knn", "--log-every", 2) == 0
    rows = read_metrics(tmp_path / "run")
    steps = [row["step"] for row in rows]
    taken = [16 * (b - a) / row["images_per_second"] for a, b, row in zip([0, *steps], steps, rows, strict=False)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(taken) == pytest.approx(summary["training_seconds"])
    assert all(row["images_per_second_per_gpu"] == row["images_per_second"] for row in rows)


def test_a_loader_that_is_slow_is_told_and_advised_on(train, tmp_path, monkeypatch, capsys):
    batches = ViewLoader.__iter__

    def slowly(loader):
        for batch in batches(loader):
            time.sleep(2.0)
            yield batch

    monkeypatch.setattr(ViewLoader, "__iter__", slowly)
    monkeypatch.setattr(advice, "WINDOW", 0.0)
    assert train("--no-knn", "--max-steps", 3) == 0
    waits = [row["data_wait"] for row in read_metrics(tmp_path / "run")]
    assert all(0.3 < wait <= 1 for wait in waits[1:])  # the first step's own time is longer
    assert capsys.readouterr().out.count("data wait") >= 4  # in each row, and in the advice


def test_the_rows_are_on_the_disk_before_a_checkpoint_that_stands_behind_them(train, monkeypatch):
    done, behind = [], []
    sync, save = MetricsLog.sync, checkpoint.save

    def synced(log):
        done.append("rows")
        sync(log)

    def saved(folder, state, *keep):
        done.append("checkpoint")
        if UNJUDGED not in state["notes"]:
            assert read_metrics(folder)[-1]["step"] == state["step"]
            behind.append(state["step"])
        return save(folder, state, *keep)

    monkeypatch.setattr(MetricsLog, "sync", synced)
    monkeypatch.setattr(checkpoint, "save", saved)
    assert train("--save-every", 2, "--knn-every", 1) == 0
    assert done.count("checkpoint") > 5
    assert behind == [2, 3, 4, 6, 8, 9]
    assert all(before == "rows" for before, now in itertools.pairwise(done) if now == "checkpoint")


def test_tensorboard_has_each_step_of_a_run_that_went_on_once(train, losses, tmp_path):
    assert train("--no-knn", "--max-steps", 4) == 0
    (tmp_path / "run" / "checkpoint_00000004.pt").unlink()
    assert train("--no-knn") == 0  # from step 3 on: the fourth comes again
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert {"loss", "lr", "images_per_second", "data_wait"} <= set(events.Tags()["scalars"])
    drawn = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))
    assert drawn == pytest.approx(losses(), rel=1e-6)


def test_a_terminal_gets_one_live_line(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(
        "trainer.metrics.Console", lambda **options: Console(**options, force_terminal=True, file=shown, width=120)
    )
    display = Display(True)
    display.start(0, 10)
    row = {"epoch": 0, "loss": 2.5, "lr": 1e-3, "images_per_second": 123.4, "data_wait": 0.25}
    for step in (5, 10):
        display.show({**row, "step": step})
    display.say("warning: something")
    display.stop()
    assert "epoch 0 loss 2.5000 lr 1.00e-03 123 images/s data wait 25%" in shown.getvalue()
    assert "10/10" in shown.getvalue()
    assert "warning: something" in shown.getvalue()
    assert "step 5/10" not in shown.getvalue()  # which is the plain form


def test_a_rank_that_left_because_of_a_signal_is_not_to_blame():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=60))
    worlds = [World(rank, rank, 2, 2, torchrun=True) for rank in range(2)]
    first, second = (Heartbeat(world, store, 3600, pytest.fail, lambda: None) for world in worlds)
    second.leave()
    with pytest.raises(Stopped):
        first.report("connection closed by peer")
    for each in (first, second):
        each.close()


def test_a_signal_that_came_of_a_lost_rank_does_not_hide_it(monkeypatch):
    """torchrun sends it to the others of that rank's node, and those of another node meet an error first."""
    monkeypatch.setattr(Heartbeat, "INTERVAL", 0.5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=60))
    worlds = [World(rank, rank, 3, 3, torchrun=True) for rank in range(3)]
    first, second, third = (Heartbeat(world, store, 3600, pytest.fail, lambda: None) for world in worlds)
    assert first._diagnose() == ""
    third.close()
    assert second.leave().startswith("no sign of life from rank 2 (node 0: ")
    assert not store.check(["moco_v3/left"])
    for each in (first, second):
        each.close()


def test_a_rank_that_lives_but_stands_still_is_named(monkeypatch):
    """As where its storage stalls: it beats, and the others wait for it."""
    monkeypatch.setattr(Heartbeat, "INTERVAL", 2.0)  # patient with a busy machine
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=60))
    worlds = [World(rank, rank, 2, 2, torchrun=True) for rank in range(2)]
    first, second = (Heartbeat(world, store, 3600, pytest.fail, lambda: None) for world in worlds)
    with first.watching(7), second.watching(7):
        first.fetched()
        assert "step 8, after" in (said := first._diagnose())
        assert "all wait for the next batch of rank 1 (node 0: " in said
        second.fetched()
        time.sleep(2 * Heartbeat.INTERVAL)
        assert first._diagnose() == ""
    with first.judging(8), second.judging(8):
        for each in (first, first, second):
            each.judged()
        time.sleep(2 * Heartbeat.INTERVAL)
        assert "judging after step 8, after" in (said := first._diagnose())
        assert "all wait for the features of rank 1 (node 0: " in said
        second.judged()
        time.sleep(2 * Heartbeat.INTERVAL)
        assert first._diagnose() == ""
    for each in (first, second):
        each.close()


@pytest.mark.parametrize(
    ("cores", "local", "each", "threads"), [(64, 8, 8, 8), (64, 1, 64, 16), (2, 4, 1, 1), (12, 8, 1, 1)]
)
def test_cores_are_shared_among_the_ranks_of_a_machine(cores, local, each, threads, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    world = World(0, 0, 64, local, torchrun=True)
    assert (world.cores(), world.default_threads()) == (each, threads)


@pytest.mark.parametrize(("quota", "threads"), [(4, 4), (64, 16)])
def test_torch_keeps_within_the_quota_of_a_container(quota, threads, monkeypatch):
    begun: list[int] = []
    monkeypatch.setattr(distributed, "usable_cores", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", begun.append)
    distributed.limit_threads()
    assert begun == [threads]
