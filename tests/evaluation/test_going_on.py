"""An evaluation that was interrupted goes on after its last whole epoch, as if nothing had happened."""

import json
import shutil
import sys

import pytest
import torch

from evaluate import main
from evaluation import accuracy
from tests.evaluation.test_evaluate import PROBE, TUNE, under_torchrun
from trainer import evaluation_file
from trainer.export import open_run

COMMANDS = {"linear": [*PROBE, "--lr", "0.1", "1e30"], "finetune": [*TUNE, "--epochs", "3"]}  # 1e30 diverges


@pytest.fixture
def evaluate(trained, sample):
    """Evaluate the run in this process; returns the result, without what differs from time to time."""

    def call(*flags, name):
        given = ["--run", str(trained), "--data", str(sample), "--name", name]
        assert main([*map(str, flags), *given]) == 0
        found = json.loads((trained / "eval" / f"{name}.json").read_text())
        return found.get("outcomes") or found["outcome"]

    return call


@pytest.fixture
def interrupted(trained, sample, monkeypatch):
    """A command that Ctrl-C ends in the validation of an epoch."""

    def call(*flags, name, epoch):
        validate = accuracy.validate

        def stopping(right, val, number, *rest, **options):
            if number == epoch:
                raise KeyboardInterrupt
            return validate(right, val, number, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(accuracy, "validate", stopping)
            assert main([*flags, "--run", str(trained), "--data", str(sample), "--name", name]) == 130

    return call


def epochs_in(printed):
    return [line.split()[1] for line in printed.splitlines() if line.startswith("epoch ")]


@pytest.mark.parametrize("kind", ["linear", pytest.param("finetune", marks=pytest.mark.slow)])
def test_it_ends_as_if_nothing_had_happened(kind, evaluate, interrupted, trained, capsys):
    command = COMMANDS[kind]
    whole = evaluate(*command, name=f"{kind}-whole")
    name = f"{kind}-parts"
    capsys.readouterr()
    interrupted(*command, name=name, epoch=2)
    interrupted(*command, name=name, epoch=3)
    assert evaluate(*command, name=name) == whole
    printed = capsys.readouterr().out
    assert epochs_in(printed) == ["1/3", "2/3", "3/3"]
    assert f"going on after epoch 2 of {trained / 'eval' / name}.unfinished.pt" in printed
    assert not (trained / "eval" / f"{name}.unfinished.pt").exists()
    files = [torch.load(trained / "eval" / f"{each}.pt", weights_only=True) for each in (name, f"{kind}-whole")]
    weights = [file.get("heads") or file["model"] for file in files]
    torch.testing.assert_close(*weights, rtol=0, atol=0, equal_nan=True)
    # What has ended is done anew, not gone on with; and stays until the new one has.
    interrupted(*command, name=name, epoch=3)
    assert epochs_in(capsys.readouterr().out) == ["1/3", "2/3"]
    kept = torch.load(trained / "eval" / f"{name}.pt", weights_only=True)
    torch.testing.assert_close(kept.get("heads") or kept["model"], weights[0], rtol=0, atol=0, equal_nan=True)
    assert evaluate(*command, name=name) == whole


def test_only_the_result_was_missing(evaluate, trained, monkeypatch, capsys):
    """Killed between the last epoch and the writing of what it has come to."""
    whole = evaluate(*PROBE, name="missing-whole")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_file.EvaluationFile, "save_weights", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            evaluate(*PROBE, name="missing")
    capsys.readouterr()
    assert evaluate(*PROBE, name="missing") == whole
    assert epochs_in(capsys.readouterr().out) == []
    found = [torch.load(trained / "eval" / f"{name}.pt", weights_only=True) for name in ("missing", "missing-whole")]
    torch.testing.assert_close(found[0]["heads"], found[1]["heads"], rtol=0, atol=0)


def test_an_untrained_network_is_of_no_step(trained, sample, interrupted, tmp_path, capsys):
    """The run may train on meanwhile."""
    command = [*PROBE, "--untrained"]
    interrupted(*command, name="of-no-step", epoch=2)
    folder = shutil.copytree(trained, tmp_path / "run")
    newest, older = sorted(folder.glob("checkpoint_*.pt"), reverse=True)[:2]
    newest.unlink()
    assert open_run(folder).file == older
    capsys.readouterr()
    assert main([*command, "--run", str(folder), "--data", str(sample), "--name", "of-no-step"]) == 0
    assert epochs_in(capsys.readouterr().out) == ["2/3", "3/3"]


def test_halves_of_files_are_swept_and_other_evaluations_left_alone(evaluate, trained):
    (trained / "eval").mkdir(exist_ok=True)
    mine, other = (trained / "eval" / f"{name}.pt.abcdefgh.part" for name in ("swept", "swept.2"))
    for half in (mine, other):
        half.write_bytes(b"half")
    evaluate(*PROBE, "--epochs", 1, name="swept")
    assert not mine.exists()
    other.unlink()


def test_of_other_flags_it_begins_anew_and_says_so(evaluate, interrupted, capsys):
    interrupted(*PROBE, name="other", epoch=3)
    evaluate(*PROBE, "--seed", 1, name="other")
    printed = capsys.readouterr().out
    assert "other.unfinished.pt was begun for another step, other images or flags; beginning anew" in printed
    assert epochs_in(printed) == ["1/3", "2/3", "1/3", "2/3", "3/3"]


@pytest.mark.parametrize("content", [b"rubbish", b""])
def test_a_damaged_file_is_begun_anew(content, evaluate, trained, capsys):
    (trained / "eval").mkdir(exist_ok=True)
    (trained / "eval" / "damaged.unfinished.pt").write_bytes(content)
    evaluate(*PROBE, name="damaged")
    printed = capsys.readouterr().out
    assert "damaged.unfinished.pt cannot be read" in printed
    assert epochs_in(printed) == ["1/3", "2/3", "3/3"]


def test_a_full_disk_costs_a_warning(evaluate, trained, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_file, "replacing", full)
    evaluate(*PROBE, name="no-room")
    printed = capsys.readouterr().out
    assert printed.count("no-room.unfinished.pt cannot be written: No space left on device") == 3
    assert (
        printed.count("no-room.pt cannot be written: No space left on device; the weights of this evaluation are lost")
        == 1
    )
    assert not (trained / "eval" / "no-room.pt").exists()


def test_what_was_learned_stays_as_plain_weights(evaluate, trained):
    evaluate(*TUNE, name="tuned")
    weights = torch.load(trained / "eval" / "tuned.pt", weights_only=True)["model"]
    source = open_run(trained).model.base_encoder
    assert weights["head.weight"].shape == (10, weights["head.weight"].shape[1])
    trunk = {name for name in source.state_dict() if not name.startswith("head.")}
    assert weights.keys() == trunk | {"head.weight", "head.bias"}
    evaluate(*PROBE, name="probed")
    probed = torch.load(trained / "eval" / "probed.pt", weights_only=True)
    assert probed["lrs"] == [0.1, 3.0, 30.0]
    assert [head["weight"].shape[0] for head in probed["heads"]] == [10, 10, 10]
    assert "optimizer" not in probed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "finetune"])
def test_two_ranks_go_on_together(kind, trained, sample, interrupted, evaluate):
    """With what one rank began: to rounding it is what two would have begun."""
    command, name = COMMANDS[kind], f"{kind}-two"
    interrupted(*command, name=name, epoch=2)
    process = under_torchrun(*command, "--run", trained, "--data", sample, "--name", name)
    assert process.returncode == 0, process.stderr
    assert epochs_in(process.stdout) == ["2/3", "3/3"]
    assert process.stdout.count("going on after epoch 1") == 1
