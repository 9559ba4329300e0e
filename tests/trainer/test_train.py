"""The real training: what it writes, that it goes on exactly, and that ranks do not change it."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.trainer.conftest import ROOT, TINY, wait_for_row
from trainer import checkpoint
from trainer.metrics import read_metrics


def test_a_run_writes_its_folder_and_judges_the_features(train, tmp_path, capsys):
    assert train() == 0
    out = tmp_path / "run"
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 10))  # 50 images, 3 batches of 16 an epoch, 3 epochs
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for row in rows:
        assert row["images_per_second"] > 0
        assert row["images_per_second_per_gpu"] == row["images_per_second"]
        assert 0 <= row["data_wait"] <= 1
    # Warm-up from exactly 0 to lr x batch / 256 over one epoch, then half a cosine over the two that are left.
    peak = 1e-3 * 16 / 256
    assert [row["lr"] for row in rows] == pytest.approx(
        [0, peak / 3, peak * 2 / 3] + [peak * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    )
    assert [row["momentum"] for row in rows] == pytest.approx(
        [1 - 0.01 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    )

    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 9
    assert (summary["loss_first"], summary["loss_last"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert 0 <= summary["knn_before"] <= 1
    assert 0 <= summary["knn_after"] <= 1
    assert json.loads((out / "config.json").read_text())["flags"]["arch"] == "vit_conv_small"
    assert (out / "latest").read_text().strip() == "checkpoint_00000009.pt"
    assert list(out.glob("events.out.tfevents.*"))
    printed = capsys.readouterr().out
    assert "k-NN" in printed.splitlines()[-3]
    assert str(out) in printed.splitlines()[-1]


def test_the_first_loss_is_near_chance(train, losses):
    assert train("--max-steps", 1, "--no-knn") == 0
    # Two terms of 2 T ln(batch) for unrelated queries and keys.
    assert losses()[1] == pytest.approx(4 * 0.2 * torch.tensor(16.0).log().item(), rel=0.35)


def test_two_commands_of_one_run_give_the_trace_of_one(train, losses, capsys):
    assert train("--no-knn", out="whole") == 0
    assert train("--no-knn", "--max-steps", 4) == 0
    assert list(losses()) == [1, 2, 3, 4]
    capsys.readouterr()
    assert train("--no-knn") == 0
    assert "step 4 of 9" in capsys.readouterr().out
    assert losses() == losses("whole")


def test_a_finished_run_says_so_and_changes_nothing(train, tmp_path, capsys):
    def folder():
        files = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
        found = json.loads(files.pop("status.json"))
        return files, (found["status"], found["step"])

    assert train("--max-steps", 2, "--no-knn") == 0
    before = folder()
    assert train("--max-steps", 2, "--no-knn") == 0
    assert "is complete" in capsys.readouterr().out
    assert folder() == before


def test_rows_after_the_checkpoint_are_cut_off_when_a_run_goes_on(train, losses, tmp_path):
    assert train("--no-knn", out="whole") == 0
    assert train("--no-knn", "--max-steps", 4) == 0
    with open(tmp_path / "run" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')  # written after the checkpoint, the last line torn
    assert train("--no-knn") == 0
    assert losses() == losses("whole")


@pytest.mark.parametrize("ranks", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_and_the_same_command_give_the_undisturbed_trace(ranks, start, sample, tmp_path):
    # 60 epochs, so that the signal comes while it trains.
    flags = ["--data", sample, "--no-knn", "--epochs", 60, "--max-steps", 40]
    whole = start(*flags, "--out", tmp_path / "whole", ranks=ranks)
    assert whole.wait(300) == 0, whole.communicate()[1]

    first = start(*flags, "--out", tmp_path / "run", ranks=ranks)
    wait_for_row(tmp_path / "run" / "metrics.jsonl", first)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to torchrun and to every rank
    printed, errors = first.communicate(timeout=60)
    if ranks is None:
        assert first.returncode == 0, errors
        assert "Traceback" not in errors
        assert "stopped at step" in printed
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "preempted"
    file, _ = checkpoint.newest(tmp_path / "run")
    assert file is not None
    assert 0 < checkpoint.load(file)["step"] < 40

    again = start(*flags, "--out", tmp_path / "run", ranks=ranks)
    assert again.wait(300) == 0, again.communicate()[1]
    for ours, theirs in zip(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole"), strict=True):
        assert (ours["step"], ours["loss"]) == (theirs["step"], theirs["loss"])


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "lars"])
def test_two_ranks_give_the_losses_of_one_process(optimizer, train, start, losses, sample, tmp_path):
    flags = ["--dtype", "float64", "--max-steps", 4, "--no-knn", "--optimizer", optimizer, "--warmup-epochs", 0]
    assert train(*flags, out="one") == 0
    two = start(*flags, "--data", sample, "--out", tmp_path / "two", ranks=2)
    assert two.wait(300) == 0, two.communicate()[1]
    assert list(losses("two")) == [1, 2, 3, 4]
    assert list(losses("two").values()) == pytest.approx(list(losses("one").values()), abs=1e-9, rel=0)
    assert losses("one")[4] != losses("one")[1]


def test_one_rank_then_two_then_one_give_the_trace_of_one(train, start, losses, sample, tmp_path):
    flags = ["--dtype", "float64", "--no-knn", "--warmup-epochs", 0]
    assert train(*flags, out="whole") == 0
    assert train(*flags, "--max-steps", 2) == 0
    two = start(*flags, "--max-steps", 7, "--data", sample, "--out", tmp_path / "run", ranks=2)
    assert two.wait(300) == 0, two.communicate()[1]
    assert "step 2 of 7" in two.communicate()[0]
    assert train(*flags) == 0
    assert list(losses()) == list(range(1, 10))
    assert list(losses().values()) == pytest.approx(list(losses("whole").values()), abs=1e-9, rel=0)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_follows_float32_and_is_recorded(amp, train, losses, tmp_path):
    assert train("--no-knn", "--max-steps", 4, out="plain") == 0
    assert train("--no-knn", "--max-steps", 4, "--amp", amp) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["amp"] == amp
    assert list(losses().values()) == pytest.approx(list(losses("plain").values()), rel=0.03)
    assert losses() != losses("plain")
    # Without --amp the run goes on in its own precision.
    assert train("--no-knn", "--max-steps", 5) == 0


@pytest.mark.slow
def test_compiled_follows_eager(train, losses):
    assert train("--no-knn", "--max-steps", 4, out="eager") == 0
    assert train("--no-knn", "--max-steps", 4, "--compile", "on") == 0
    assert list(losses().values()) == pytest.approx(list(losses("eager").values()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_small", "resnet50"])
def test_the_published_backbones_train(arch, sample, train, losses):
    flags = ["--arch", arch, "--no-knn", "--max-steps", 3, "--batch-size", 8, "--warmup-epochs", 0]
    flags += ["--embed-dim", None, "--depth", None, "--num-heads", None]
    if arch == "resnet50":
        flags += ["--optimizer", "lars", "--lr", 0.3]
    assert train(*flags) == 0
    assert len(losses()) == 3


def test_resume_starts_a_new_folder_from_a_checkpoint(train, losses, tmp_path):
    assert train("--no-knn", out="whole") == 0
    assert train("--no-knn", "--max-steps", 5, out="first") == 0
    assert train("--no-knn", "--resume", tmp_path / "first" / "checkpoint_00000005.pt") == 0
    whole = losses("whole")
    assert losses() == {step: whole[step] for step in range(6, 10)}


def test_resume_of_a_finished_run_judges_it(train, tmp_path, capsys):
    assert train("--max-steps", 2, "--no-knn", out="first") == 0
    capsys.readouterr()
    assert train("--max-steps", 2, "--resume", tmp_path / "first" / "checkpoint_00000002.pt") == 0
    assert "k-NN" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["loss_last"] is None


def test_a_finished_run_is_judged_when_that_is_asked_for_later(train, tmp_path, capsys):
    assert train("--max-steps", 2, "--no-knn") == 0
    capsys.readouterr()
    assert train("--max-steps", 2) == 0
    assert "k-NN" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["knn_after"] is not None


def test_an_unusable_val_costs_the_judgement_and_not_the_run(train, sample, tmp_path, capsys):
    data = tmp_path / "data"
    (data / "val").mkdir(parents=True)
    (data / "train").symlink_to(sample / "train")
    assert train("--data", data, "--max-steps", 1) == 0
    assert "no k-NN accuracy" in capsys.readouterr().out


def test_a_folder_without_val_trains_without_judgement(train, sample, tmp_path, capsys):
    assert train("--data", sample / "train", "--max-steps", 1) == 0
    assert "no k-NN accuracy" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["knn_after"] is None


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(train, tmp_path, capsys):
    code = train("--no-knn", "--lr", "1e30", "--warmup-epochs", 0, out="bad")
    assert code == 1
    assert "loss or gradients are not finite at step 2" in capsys.readouterr().err
    # The loss was read before anything was saved.
    assert not list((tmp_path / "bad").glob("checkpoint_*.pt"))


def test_what_a_backbone_drops_goes_on_as_well(train, losses):
    """ghostnet has a dropout before its head."""
    flags = ["--arch", "ghostnet_050", "--embed-dim", None, "--depth", None, "--num-heads", None, "--no-knn"]
    assert train(*flags, "--max-steps", 4, out="whole") == 0
    assert train(*flags, "--max-steps", 2) == 0
    assert train(*flags, "--max-steps", 4) == 0
    assert losses() == losses("whole")


def test_ranks_take_the_flags_of_rank_0(sample, tmp_path, losses, start):
    """As of a second node whose command line was mistyped; wrapped, as torchrun gives its ranks one command."""
    wrapper = tmp_path / "mistyped.py"
    wrapper.write_text(
        "import os, sys\nfrom trainer import run\n"
        "sys.exit(run(sys.argv[1:] + ['--lr', '0.5'] * (os.environ['RANK'] == '1')))\n"
    )
    flags = [*TINY, "--data", str(sample), "--no-knn", "--max-steps", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, str(wrapper), *flags, "--out", str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: rank 1 takes the flags of rank 0: --lr is 0.001 there, 0.5 here" in done.stdout
    plain = start(*flags[len(TINY) :], "--out", tmp_path / "plain", ranks=2)
    assert plain.wait(300) == 0
    assert losses() == losses("plain")
