"""`--knn-every`: the features are judged while they are learned, and learning does not notice."""

import json
import os
import shutil
import signal

import pytest
import torch

from tests.dali_pipes.odd_files import broken_inside
from tests.trainer.conftest import status, write_lists
from trainer import checkpoint
from trainer.engine import Engine
from trainer.judgement import Judge
from trainer.metrics import read_metrics


def accuracies(folder):
    return {row["step"]: row["knn"] for row in read_metrics(folder) if "knn" in row}


def test_it_leaves_the_trace_alone_and_is_kept(train, losses, tmp_path, capsys):
    """conv-stem ViT: batch norms in backbone and heads, whose statistics an evaluation must not move."""
    assert train("--knn-every", 2, "--epochs", 5, out="judged") == 0
    assert "k-NN after step 6: " in capsys.readouterr().out
    assert train("--epochs", 5, out="plain") == 0
    assert losses("judged") == losses("plain")
    last = [checkpoint.load(tmp_path / out / "checkpoint_00000015.pt") for out in ("judged", "plain")]
    assert all(torch.equal(value, last[1]["model"][name]) for name, value in last[0]["model"].items())

    found = accuracies(tmp_path / "judged")
    assert list(found) == [6, 12, 15]  # three steps an epoch; the last step whatever the epoch
    summaries = [json.loads((tmp_path / out / "summary.json").read_text()) for out in ("judged", "plain")]
    assert summaries[0]["knn_after"] == summaries[1]["knn_after"] == found[15]
    assert accuracies(tmp_path / "plain") == {}
    history = last[0]["notes"]["knn"]
    assert {each["step"]: each["accuracy"] for each in history} == {0: summaries[0]["knn_before"], **found}


def test_a_run_that_goes_on_judges_nothing_twice(train, tmp_path, capsys):
    assert train("--knn-every", 1, "--max-steps", 6) == 0
    first = accuracies(tmp_path / "run")
    capsys.readouterr()
    assert train("--knn-every", 1) == 0
    assert capsys.readouterr().out.count("k-NN after step") == 1
    assert train("--knn-every", 1, out="whole") == 0
    found = accuracies(tmp_path / "run")
    assert found == accuracies(tmp_path / "whole")
    assert {step: found[step] for step in first} == first
    notes = checkpoint.load(tmp_path / "run" / "checkpoint_00000009.pt")["notes"]
    assert [each["step"] for each in notes["knn"]] == [0, 3, 6, 9]


def assert_same_trace(tmp_path):
    traces = [
        [(row["step"], row["loss"], row.get("knn")) for row in read_metrics(tmp_path / o)] for o in ("run", "whole")
    ]
    assert traces[0] == traces[1]
    assert "unjudged" not in checkpoint.load(tmp_path / "run" / "checkpoint_00000009.pt")["notes"]


@pytest.mark.parametrize("step", [6, 9], ids=["on the way", "at the end"])
def test_a_run_that_is_killed_while_it_judges_goes_on_with_that(train, tmp_path, monkeypatch, step):
    class Killed(BaseException):
        pass

    def killed(judge, *trees):
        if judge.engine.step == step:
            raise Killed
        return measure(judge, *trees)

    measure = Judge._measure
    assert train("--knn-every", 1, out="whole") == 0
    monkeypatch.setattr(Judge, "_measure", killed)
    for _ in range(2):
        with pytest.raises(Killed):
            train("--knn-every", 1)
    monkeypatch.undo()
    assert train("--knn-every", 1) == 0
    assert_same_trace(tmp_path)


@pytest.mark.parametrize("step", [6, 9], ids=["on the way", "at the end"])
def test_a_signal_ends_the_judging_and_the_run_goes_on_with_that(train, judging_stopped_at, tmp_path, step):
    """Judging a large dataset takes minutes; after a SIGTERM torchrun leaves half of one."""
    assert train("--knn-every", 1, out="whole") == 0
    for _ in range(2):
        with judging_stopped_at(step):
            assert train("--knn-every", 1) == 0
        found = status(tmp_path / "run")
        assert (found["status"], found["step"]) == ("preempted", step)
        assert len(read_metrics(tmp_path / "run")) == step - 1
    assert train("--knn-every", 1) == 0
    assert_same_trace(tmp_path)


def test_a_stop_at_a_step_that_is_to_be_judged_leaves_that_for_later(train, tmp_path, monkeypatch):
    train_step = Engine.train_step

    def signalled(engine, *batch):
        if engine.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(engine, *batch)

    assert train("--knn-every", 1, out="whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", signalled)
        assert train("--knn-every", 1) == 0
    assert len(read_metrics(tmp_path / "run")) == 5
    assert train("--knn-every", 1) == 0
    assert_same_trace(tmp_path)


def test_without_val_it_trains_on(train, sample, tmp_path):
    assert train("--data", sample / "train", "--knn-every", 1, "--max-steps", 4) == 0
    assert accuracies(tmp_path / "run") == {}


def test_a_list_is_judged_on_the_list_beside_it(train, losses, sample, tmp_path):
    write_lists(sample, tmp_path)
    assert train("--knn-every", 1, out="folders") == 0
    assert train("--knn-every", 1, "--data", tmp_path / "train.txt", "--outside", out="lists") == 0
    assert losses("lists") == losses("folders")
    assert accuracies(tmp_path / "lists") == accuracies(tmp_path / "folders")


def test_images_that_cannot_be_used_do_not_cost_the_accuracy(train, sample, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    bad = [sorted((data / part).rglob("*.jpg"))[3] for part in ("train", "val")]
    for seed, file in enumerate(bad):
        file.write_bytes(broken_inside(seed))
    assert train("--data", data, "--knn-every", 1) == 0
    printed = capsys.readouterr().out
    assert list(accuracies(tmp_path / "run")) == [3, 6, 9]
    assert printed.count(f"{bad[1]}: ") == 1  # although it is met four times
    assert f"{bad[0]}: " in printed


@pytest.mark.slow
def test_two_ranks_judge_together(train, start, sample, tmp_path):
    flags = ["--dtype", "float64", "--max-steps", 4, "--knn-every", 1]
    assert train(*flags, out="one") == 0
    two = start(*flags, "--data", sample, "--out", tmp_path / "two", ranks=2)
    assert two.wait(300) == 0, two.communicate()[1]
    assert list(accuracies(tmp_path / "two")) == [3, 4]
    assert accuracies(tmp_path / "two") == accuracies(tmp_path / "one")
