"""Numbers gone bad: that step changes nothing, it is named, and the run stops or goes on."""

import json

import pytest
import torch

from tests.ranks import run_on_ranks
from trainer import checkpoint, watch
from trainer.engine import Engine
from trainer.metrics import read_metrics

from .engines import engine_for, learned, views_for

IMAGE = 2  # of rank 1, or of the only rank


def poisoned(engine, views):
    """The views, normalised, with a NaN in one pixel of one image."""
    first, second = (engine.model.normalize(view) for view in views)
    first = first.clone()
    first[IMAGE, 0, 3, 4] = float("nan")
    return first, second


def with_a_bad_step(tree, *flags):
    """What was learned before, after and one step after a batch with a NaN on the last rank; and without that batch."""
    engine, undisturbed = (engine_for(tree, "--warmup-epochs", 0, *flags) for _ in range(2))
    share = len(views_for(engine, 0)[0])
    indices = torch.arange(share) + 100 * engine.world.rank
    engine.train_step(views_for(engine, 0), indices)
    before = learned(engine)
    views = views_for(engine, 1)
    engine.train_step(poisoned(engine, views) if engine.world.rank == engine.world.size - 1 else views, indices)
    after = learned(engine)
    engine.train_step(views_for(engine, 2), indices)
    later = learned(engine)

    undisturbed.train_step(views_for(engine, 0))
    undisturbed.step += 1
    undisturbed.train_step(views_for(engine, 2))
    engine.loader.close()
    undisturbed.loader.close()
    return before, after, later, learned(undisturbed), engine.watch.read()


@pytest.mark.parametrize(
    "flags",
    [
        ["--arch", "vit_conv_small"],  # batch norm in the backbone, too
        ["--optimizer", "lars", "--lr", 0.3],
        ["--amp", "fp16"],
        ["--amp", "fp16", "--optimizer", "lars", "--lr", 0.3],
        ["--microbatch", 5],
        ["--clip-grad", 0.01],
    ],
    ids=lambda flags: "-".join(map(str, flags)).strip("-"),
)
def test_a_bad_step_changes_nothing(flags, sample):
    before, after, later, undisturbed, reading = with_a_bad_step(sample / "train", *flags)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(later, undisturbed, rtol=0, atol=0)
    moved = [name for name in before if not torch.equal(later[name], after[name])]
    assert any(name.startswith("momentum_encoder.") for name in moved)
    assert reading.numbers["skipped_steps"] == 1
    (bad,) = reading.numbers["bad_steps"]
    assert (bad["step"], bad["rank"]) == (2, 0)
    assert bad["indices"] == (list(range(16)) if "vit_conv_small" in flags else [IMAGE])


@pytest.mark.parametrize("flags", [[], ["--optimizer", "lars", "--lr", 0.3], ["--microbatch", 3]])
def test_on_two_ranks_too_and_the_image_of_the_right_one_is_named(flags, sample, tmp_path):
    ranks = run_on_ranks(with_a_bad_step, sample / "train", *flags, folder=tmp_path)
    for before, after, later, undisturbed, reading in ranks:
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        torch.testing.assert_close(later, undisturbed, rtol=0, atol=0)
        assert reading.numbers["bad_steps"] == [{"step": 2, "rank": 1, "indices": [100 + IMAGE]}]
        assert "step 2 on rank 1 (images 102)" in reading.fatal
    torch.testing.assert_close(ranks[0][2], ranks[1][2], rtol=0, atol=0)


def test_a_loss_scale_that_overflows_is_lowered_and_is_no_fault(sample):
    engine = engine_for(sample / "train", "--amp", "fp16", "--warmup-epochs", 0)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = learned(engine)
    engine.train_step(views_for(engine, 0))
    assert engine.scaler.get_scale() == 2.0**59
    parameters = {name for name, _ in engine.model.named_parameters()}
    torch.testing.assert_close(
        {name: value for name, value in learned(engine).items() if name in parameters},
        {name: value for name, value in before.items() if name in parameters},
        rtol=0,
        atol=0,
    )
    reading = engine.watch.read(engine.scaler.get_scale())
    assert (reading.numbers["skipped_steps"], reading.numbers["skipped_share"]) == (1, 1.0)
    assert reading.fatal is None
    assert reading.warnings == []
    # A scale this small cannot be what overflows.
    engine.train_step(views_for(engine, 0))
    assert "not finite at step 2" in (engine.watch.read(scale=0.5).fatal or "")
    engine.loader.close()


@pytest.fixture
def bad_at(monkeypatch):
    """Puts a NaN into the batch of that step of every run from now on; returns the rows of each step's batch."""

    def arrange(*steps):
        train_step, rows = Engine.train_step, {}

        def poisoning(engine, views, indices):
            rows[engine.step + 1] = indices.tolist()
            bad = engine.step + 1 in steps
            return train_step(engine, poisoned(engine, views) if bad else views, indices)

        monkeypatch.setattr(Engine, "train_step", poisoning)
        return rows

    return arrange


def test_a_run_stops_at_the_next_row_and_saves_nothing_of_it(train, bad_at, tmp_path, capsys):
    rows = bad_at(5)
    assert train("--no-knn", "--arch", "vit_small", "--log-every", 2) == 1
    error = capsys.readouterr().err
    assert f"not finite at step 5 on rank 0 (images {rows[5][IMAGE]})" in error
    assert "--on-nan skip" in error
    file, _ = checkpoint.newest(tmp_path / "run")
    assert file is not None
    assert checkpoint.load(file)["step"] == 3
    # The row that names it is there to be read, and is cut off when the run goes on.
    last = read_metrics(tmp_path / "run")[-1]
    assert (last["step"], last["bad_steps"]) == (6, [{"step": 5, "rank": 0, "indices": [rows[5][IMAGE]]}])


def test_a_run_told_to_skip_goes_on_and_can_be_continued(train, bad_at, losses, tmp_path, capsys):
    rows = bad_at(5)
    flags = ["--no-knn", "--on-nan", "skip"]
    assert train(*flags, out="whole") == 0
    assert "not finite and changed nothing: step 5 on rank 0 (images " in capsys.readouterr().out
    trace = read_metrics(tmp_path / "whole")
    assert [row["skipped_steps"] for row in trace] == [0] * 4 + [1] * 5
    assert trace[4]["loss"] is None
    assert sorted(trace[4]["bad_steps"][0]["indices"]) == sorted(rows[5])
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["loss_last"] == trace[-1]["loss"]

    assert train("--no-knn") == 1  # stops at step 5, with a checkpoint of step 3
    assert train(*flags, "--max-steps", 7) == 0
    assert train(*flags) == 0
    assert losses() == losses("whole")
    assert read_metrics(tmp_path / "run")[-1]["skipped_steps"] == 1


def test_a_run_in_which_every_step_is_bad_ends(train, bad_at, monkeypatch, capsys):
    bad_at(*range(3, 10))
    assert watch.HOPELESS == 100  # as the README has it
    monkeypatch.setattr(watch, "HOPELESS", 4)
    assert train("--no-knn", "--on-nan", "skip") == 1
    assert "not finite for 4 steps in a row, the last step 6" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--log-every", 1], ["--log-every", 9]], ids=["interrupted", "in one reading"])
def test_no_interruption_and_no_good_step_behind_them_hides_such_a_row_of_steps(
    flags, train, bad_at, monkeypatch, capsys
):
    bad_at(2, 3, 4, 5)
    monkeypatch.setattr(watch, "HOPELESS", 4)
    if flags == ["--log-every", 1]:
        assert train("--no-knn", "--on-nan", "skip", "--max-steps", 4, *flags) == 0
    assert train("--no-knn", "--on-nan", "skip", *flags) == 1
    assert "not finite for 4 steps in a row, the last step 5" in capsys.readouterr().err
