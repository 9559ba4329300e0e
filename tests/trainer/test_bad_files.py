"""Files that go bad under a running training: it goes on, says so, counts, remembers; and it can be continued."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dali_pipes import DatasetIndex, ViewLoader
from tests.dali_pipes.odd_files import broken_inside, encoded
from trainer import checkpoint
from trainer.engine import Engine
from trainer.metrics import read_metrics

BATCH, STEPS = 16, 3  # 50 images


@pytest.fixture
def data(sample, tmp_path):
    return shutil.copytree(sample, tmp_path / "data")


def rows_of(data, epoch, step):
    """The images of a global batch in a run of seed 0."""
    loader = ViewLoader(DatasetIndex.scan(data / "train"), batch_size=BATCH, image_size=16, num_threads=1)
    loader.load_state_dict({"epoch": epoch, "step": step, "global_batch": BATCH})
    return next(iter(loader)).indices.tolist()


@pytest.fixture
def damaged_at(monkeypatch, data):
    """Truncates a file after that step of the training: `path = damaged_at(step, row)`."""

    def arrange(step, row):
        path, train_step = Path(DatasetIndex.scan(data / "train").paths[row]), Engine.train_step

        def damaging(engine, *batch):
            loss = train_step(engine, *batch)
            if engine.step == step:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            return loss

        monkeypatch.setattr(Engine, "train_step", damaging)
        return path

    return arrange


def failed_in(out):
    file, _ = checkpoint.newest(out)
    assert file is not None
    return checkpoint.load(file)["loader"]["failed"]


def test_a_file_truncated_during_training(train, data, losses, damaged_at, tmp_path, capsys):
    assert train("--no-knn", "--data", data, out="undisturbed") == 0
    victim = rows_of(data, 2, 1)[5]  # served in the third epoch's second step: step 8 of 9
    path = damaged_at(3, victim)
    capsys.readouterr()
    assert train("--data", data) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("warning")]
    assert str(path) in line
    assert "truncated" in line
    assert "k-NN" in printed  # judged without it

    met = next(row["step"] for row in read_metrics(tmp_path / "run") if row["failed_images"])
    counts = [row["failed_images"] for row in read_metrics(tmp_path / "run")]
    assert counts == [0] * (met - 1) + [1] * (10 - met)
    assert failed_in(tmp_path / "run") == [victim]
    ours, theirs = losses(), losses("undisturbed")
    assert {step: ours[step] for step in range(1, met)} == {step: theirs[step] for step in range(1, met)}
    assert ours[met] != theirs[met]


@pytest.mark.parametrize("stop", [5, 8])
def test_the_run_is_continued_exactly_after_a_failure(train, data, losses, damaged_at, tmp_path, capsys, stop):
    """Stopped right after the damage, before or after it is met: a new scan has other rows, and the run its own."""
    # Met in step 8, and in its second epoch by step 5: however slowly steps 6 and 7 are read ahead, it is in neither.
    before = {*rows_of(data, 1, 0), *rows_of(data, 1, 1)}
    victim = next(row for row in rows_of(data, 2, 1) if row in before)
    damaged_at(5, victim)
    shutil.copytree(data, tmp_path / "again")
    assert train("--no-knn", "--data", data, out="whole") == 0
    shutil.rmtree(data)
    (tmp_path / "again").rename(data)
    assert train("--no-knn", "--data", data, "--max-steps", stop) == 0
    capsys.readouterr()
    assert train("--data", data) == 0
    assert "1 images went bad since the run started" in capsys.readouterr().out
    assert losses() == losses("whole")
    assert failed_in(tmp_path / "run") == failed_in(tmp_path / "whole") == [victim]
    assert read_metrics(tmp_path / "run")[-1]["failed_images"] == 1


def test_a_new_folder_goes_on_from_a_checkpoint_of_such_a_run(train, data, tmp_path):
    assert train("--no-knn", "--data", data, "--max-steps", 4, out="first") == 0
    Path(DatasetIndex.scan(data / "train").paths[7]).unlink()
    resumed = ["--no-knn", "--data", data, "--resume", tmp_path / "first" / "checkpoint_00000004.pt"]
    assert train(*resumed) == 0
    assert failed_in(tmp_path / "run") == [7]


def test_more_missing_images_than_may_fail_are_told(train, data, capsys):
    flags = ["--no-knn", "--data", data, "--batch-size", 4]
    assert train(*flags, "--max-steps", 1) == 0
    victims = sorted((data / "train").rglob("*.jpg"))[:11]  # ten are tolerated in a small dataset
    for path in victims:
        path.unlink()
    assert train(*flags) == 2
    said = f"11 images went bad since the run started, first {victims[0]}: no longer there; at most 10 may"
    assert said in capsys.readouterr().err
    assert train(*flags, "--max-failed", 11, "--max-steps", 2) == 0
    assert train(*flags, "--max-failed", 3) == 2
    capsys.readouterr()
    assert train(*flags, "--max-failed", -1) == 2
    assert "--max-failed -1 is negative" in capsys.readouterr().err


def test_a_file_that_was_set_aside_may_be_mended(train, data, losses, tmp_path, capsys):
    victim = sorted((data / "train").rglob("*.jpg"))[7]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    flags = ["--no-knn", "--data", data]
    assert train(*flags, out="undisturbed") == 0
    assert train(*flags, "--max-steps", 4) == 0
    victim.write_bytes(whole)
    capsys.readouterr()
    assert train(*flags, "--max-steps", 6) == 0
    assert "1 files were set aside when the run started; they can be read now" in capsys.readouterr().out
    Path(DatasetIndex.scan(data / "train").paths[30]).touch()
    assert train(*flags) == 0
    assert losses() == losses("undisturbed")
    assert (
        (tmp_path / "run" / "set_aside.txt").read_text().startswith(f"{victim}: was set aside at first, and stays so")
    )


def test_files_that_another_program_wrote_anew_are_those_of_the_run(train, data, tmp_path, capsys):
    """Their sizes are others, their pixels not: no reason to fail them, also when an image is gone besides."""
    flags = ["--no-knn", "--data", data]
    assert train(*flags, "--max-steps", 4) == 0
    images = sorted((data / "train").rglob("*.jpg"))
    for path in images:
        path.write_bytes(path.read_bytes() + b"more")
    images[7].unlink()
    assert train(*flags) == 0
    assert len(failed_in(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "set_aside.txt").read_text() == f"{images[7]}: no longer there\n"


def test_a_class_called_train_is_not_taken_for_all_without_a_word(train, data, tmp_path, capsys):
    assert train("--no-knn", "--data", data / "train", out="whole") == 0
    assert "no class folders" not in capsys.readouterr().out
    first = sorted((data / "train").iterdir())[0]
    for path in sorted((data / "train").rglob("*.jpg")):
        shutil.copy(path, first / f"{path.parent.name}{path.name}")
    first.rename(first.with_name("train"))
    assert train("--no-knn", "--data", data / "train") == 0
    other = next(folder.name for folder in sorted((data / "train").iterdir()) if folder.name != "train")
    assert f"no class folders; not read is {other}/ beside it, and 8 more" in capsys.readouterr().out


def test_too_many_bad_files_stop_the_run_with_one_line(train, data, monkeypatch, capsys):
    victims = DatasetIndex.scan(data / "train").paths[:45]
    train_step = Engine.train_step

    def damaging(engine, *batch):
        if engine.step == 2:
            for path in victims:
                Path(path).write_bytes(b"")
        return train_step(engine, *batch)

    monkeypatch.setattr(Engine, "train_step", damaging)
    assert train("--no-knn", "--data", data) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_ddp.py: error")]
    assert len(errors) == 1
    assert "images that passed the scan cannot be used, and at most 10 may fail" in errors[0]


def test_two_ranks_share_what_failed(data, start, losses, tmp_path):
    """Damage that the scan does not see, met by either rank: named once, known to all, and the trace of one process."""
    index = DatasetIndex.scan(data / "train")
    first, second = rows_of(data, 0, 1), rows_of(data, 1, 0)
    victims = sorted({*first[3:5], second[1]})  # slots go to the ranks in turn
    for row in victims:
        png = bytearray(encoded(Image.open(index.paths[row]), "PNG"))
        png[len(png) // 2] ^= 0xFF
        Path(index.paths[row]).write_bytes(png)
    flags = ["--no-knn", "--data", data, "--dtype", "float64", "--warmup-epochs", 0]
    for out, ranks in (("two", 2), ("one", None)):
        process = start(*flags, "--out", tmp_path / out, ranks=ranks)
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        for row in victims:
            assert printed.count(index.paths[row]) == 1
        assert failed_in(tmp_path / out) == victims
        assert read_metrics(tmp_path / out)[-1]["failed_images"] == 3
    assert list(losses("two").values()) == pytest.approx(list(losses("one").values()), abs=1e-9, rel=0)


def test_a_rank_that_meets_too_many_says_so_alone(start, sample, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    victim = sorted((data / "train").rglob("*.jpg"))[7]
    victim.write_bytes(broken_inside(0))
    process = start("--data", data, "--out", tmp_path / "run", "--no-knn", "--max-failed", 0, "--timeout", 60, ranks=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("train_ddp.py: error: ") == 1, errors
    assert "no sign of life" not in errors
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    assert str(victim) in status["reason"]
