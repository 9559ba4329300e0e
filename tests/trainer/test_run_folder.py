"""`--out`: whose a folder is, who may write there now, and what is said where it cannot be had."""

import errno
import fcntl
import os
import signal

import pytest

from trainer import config as configuration
from trainer import distributed, launch, preparation
from trainer.config import ConfigError
from trainer.run_folder import RunFolder
from trainer.status import write_status


def test_a_name_that_tensorboard_cannot_take(train, tmp_path, capsys):
    assert train(out="n\udcffme") == 2
    assert "is no UTF-8, which TensorBoard asks for; rename it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_out_of_another_run(train, refused, capsys):
    assert train("--no-knn", "--max-steps", 1) == 0
    capsys.readouterr()
    assert "--seed is 0 there, 5 here" in refused("--seed", 5)
    assert "--amp is off there, bf16 here" in refused("--amp", "bf16")


def test_out_of_a_run_on_other_images(train, refused, sample, capsys):
    assert train("--no-knn", "--max-steps", 1) == 0
    capsys.readouterr()
    assert "the images are others" in refused("--data", sample / "val")


def test_out_that_holds_something_else(refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    assert "is not empty and holds no run" in refused(out="thesis")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "film.part").write_text("half, and not ours")
    assert "is not empty and holds no run" in refused(out="downloads")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(out="file")
    assert "cannot be used: File name too long" in refused(out="n" * 300)


def test_a_damaged_configuration(train, refused, tmp_path, capsys):
    assert train("--no-knn", "--max-steps", 1) == 0
    capsys.readouterr()
    (tmp_path / "run" / "config.json").write_text('{"flags": ')
    assert "config.json is damaged" in refused()


def test_a_filesystem_without_locks_is_said(train, monkeypatch, capsys):
    def none(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    assert train("--no-knn", "--max-steps", 1) == 0
    assert "has no locks; start only one run in that folder" in capsys.readouterr().out


def test_out_in_use_by_another_process(train, refused, tmp_path, capsys):
    assert train("--no-knn", "--max-steps", 1) == 0
    capsys.readouterr()
    lock = os.open(tmp_path / "run" / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert "is in use by another process" in refused()
    finally:
        os.close(lock)


def test_a_lock_of_a_machine_that_is_gone_is_waited_for_in_slurm(tmp_path, monkeypatch):
    gone, here = RunFolder(tmp_path), RunFolder(tmp_path)
    gone.lock()
    pauses: list[float] = []
    said: list[str] = []
    monkeypatch.setattr("trainer.lock.time.sleep", pauses.append)
    with pytest.raises(ConfigError, match="is in use by another process"):
        here.lock(said.append)
    assert pauses == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match="is in use by another process"):
        here.lock(said.append)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert (pauses, said) == ([], [])
    with pytest.raises(ConfigError, match="is in use by another process"):
        here.lock(said.append)
    assert sum(pauses) == 180
    assert said == [
        f"another process has {tmp_path / 'lock'}; waiting up to 180 s, should it be one of a machine that is gone"
    ]
    monkeypatch.setattr("trainer.lock.time.sleep", lambda seconds: gone.release())
    here.lock(said.append)
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(ConfigError):
        gone.lock(said.append)
    here.release()


def test_a_start_that_is_stopped_while_it_waits_says_nothing_of_the_run_that_goes_on(train, tmp_path, monkeypatch):
    assert train("--no-knn", "--max-steps", 1) == 0
    write_status(tmp_path / "run", "running", 4000)
    before = (tmp_path / "run" / "status.json").read_bytes()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("trainer.lock.time.sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    running = RunFolder(tmp_path / "run")
    running.lock()
    assert train("--no-knn") == 0
    assert (tmp_path / "run" / "status.json").read_bytes() == before
    running.release()
    assert train("--no-knn", "--max-steps", 2) == 0


def test_what_a_run_is_was_not_read_before_it_was_waited_for(train, refused, tmp_path, monkeypatch, capsys):
    """Its configuration may have been written meanwhile."""
    assert train("--no-knn", "--max-steps", 1, "--seed", 1, out="other") == 0
    assert train("--no-knn", "--max-steps", 1) == 0
    (tmp_path / "run" / "checkpoint_00000001.pt").unlink()  # nothing binds yet
    other = RunFolder(tmp_path / "run")
    other.lock()

    def trains(seconds):
        for name in ("config.json", "checkpoint_00000001.pt"):
            (tmp_path / "other" / name).rename(tmp_path / "run" / name)
        other.release()

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("trainer.lock.time.sleep", trains)
    capsys.readouterr()
    assert train("--no-knn") == 2
    assert "--seed is 1 there, 0 here" in capsys.readouterr().err


def test_what_a_start_without_a_checkpoint_has_told_is_forgotten(train, losses, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    assert train("--no-knn", "--max-steps", 4, out="first") == 0
    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop._save", killed)
        with pytest.raises(Killed):
            train("--no-knn", "--seed", 1)
    assert losses()
    events = list((tmp_path / "run").glob("events.out.tfevents.*"))
    assert train("--no-knn", "--resume", tmp_path / "first" / "checkpoint_00000004.pt") == 0
    assert list(losses()) == [5, 6, 7, 8, 9]
    assert not any(file.exists() for file in events)


def test_a_damaged_index_of_the_run_is_said_with_the_mend(train, refused, tmp_path, capsys):
    assert train("--no-knn", "--max-steps", 1) == 0
    capsys.readouterr()
    (tmp_path / "run" / "train_index.npz").write_bytes(b"rubbish")
    assert "train_index.npz is damaged; restore it, or remove it" in refused("--no-knn")
    (tmp_path / "run" / "train_index.npz").unlink()
    assert train("--no-knn", "--max-steps", 2) == 0


def test_a_node_that_does_not_see_the_run_folder_says_so(tmp_path):
    start = preparation.Start(configuration.parse(["demo", "--data", str(tmp_path), "--out", str(tmp_path)]), None)
    with pytest.raises(configuration.ConfigError, match="rank 1 does not see what rank 0 wrote"):
        launch._indices(start, distributed.World(rank=1, size=2))


def test_a_run_that_another_process_made_meanwhile_is_not_replaced(train, capsys, tmp_path, monkeypatch):
    """The images are looked at for minutes, before the folder is claimed."""
    scan = preparation._scan

    def beside(*arguments):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "checkpoint_00000300.pt").write_bytes(b"of another process")
        return scan(*arguments)

    monkeypatch.setattr(preparation, "_scan", beside)
    assert train() == 2
    assert "another process has trained there meanwhile" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint_00000300.pt").read_bytes() == b"of another process"
