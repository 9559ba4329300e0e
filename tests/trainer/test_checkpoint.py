"""Checkpoints are whole or not there, and nothing in them runs."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from trainer import checkpoint
from trainer.config import ConfigError


def state(step):
    content = {"flags": {}, "notes": {"knn": [[0, 0.25]]}, "optimizer": {}, "scaler": {}, "loader": {}}
    weights = {"weight": torch.full((3,), float(step))}
    return {"step": step, "fingerprint": "0", "seconds": 0.0, "model": weights, **content}


def test_newest_returns_what_was_saved(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, state(step), keep=0)
    file = tmp_path / "checkpoint_00000010.pt"
    assert checkpoint.newest(tmp_path) == (file, [])
    found = checkpoint.load(file)
    assert found["step"] == 10
    assert found["notes"] == {"knn": [[0, 0.25]]}
    assert found["versions"]["torch"] == torch.__version__
    assert torch.load(file, weights_only=True).keys() == found.keys()  # without this program
    assert found["model"]["weight"].tolist() == [10.0] * 3
    assert (tmp_path / "latest").read_text().strip() == file.name


def test_keep_drops_the_oldest_and_zero_keeps_all(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, state(step), keep=0)
    assert len(list(tmp_path.glob("checkpoint_*.pt"))) == 5
    checkpoint.save(tmp_path, state(5), keep=2)
    assert sorted(file.name for file in tmp_path.glob("*.pt")) == ["checkpoint_00000004.pt", "checkpoint_00000005.pt"]


def test_every_so_many_steps_stay_for_good(tmp_path):
    for step in range(1, 10):
        checkpoint.save(tmp_path, state(step), keep=1, keep_steps=4)
    assert sorted(int(file.stem[-8:]) for file in tmp_path.glob("*.pt")) == [4, 8, 9]


def test_a_bit_flipped_anywhere_is_found(tmp_path):
    file = checkpoint.save(tmp_path, state(1), keep=0)
    whole = file.read_bytes()
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        file.write_bytes(flipped)
        with pytest.raises(ConfigError, match=r"checkpoint_00000001\.pt cannot be read"):
            checkpoint.load(file)


def test_what_is_being_written_is_nobody_elses(tmp_path, monkeypatch):
    modes = []
    seal = checkpoint._seal

    def looking(stream):
        modes.append(os.fstat(stream.fileno()).st_mode & 0o777)
        seal(stream)

    monkeypatch.setattr(checkpoint, "_seal", looking)
    checkpoint.save(tmp_path, state(1), keep=0)
    assert modes == [0o600]


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_newest_is_passed_over_and_named(tmp_path, damage):
    checkpoint.save(tmp_path, state(1), keep=0)
    file = checkpoint.save(tmp_path, state(2), keep=0)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage is None else damage)
    found, warnings = checkpoint.newest(tmp_path)
    assert found == tmp_path / "checkpoint_00000001.pt"
    assert len(warnings) == 1
    assert "checkpoint_00000002.pt" in warnings[0]


def test_a_damaged_newest_takes_no_place_of_those_to_keep(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), keep=2)
    (tmp_path / "checkpoint_00000009.pt").write_bytes(b"rubbish")
    checkpoint.save(tmp_path, state(3), keep=2)
    assert sorted(file.name for file in tmp_path.glob("*.pt")) == ["checkpoint_00000002.pt", "checkpoint_00000003.pt"]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(tmp_path):
    checkpoint.save(tmp_path, state(1), keep=0).write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole"):
        checkpoint.newest(tmp_path)


def test_a_folder_without_checkpoints_is_a_new_run(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, [])


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1), keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"checkpoint_00000002\.pt could not be written.*No space"):
        checkpoint.save(tmp_path, state(2), keep=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint_00000001.pt", "latest"]
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint_00000001.pt", [])


def test_an_older_one_that_cannot_be_removed_is_said(tmp_path, monkeypatch):
    first = checkpoint.save(tmp_path, state(1), keep=1)

    def refused(file, **_):
        raise PermissionError(1, "Operation not permitted", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with pytest.raises(OSError, match=f"^{first} could not be removed: .*not permitted"):
            checkpoint.save(tmp_path, state(2), keep=1)
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint_00000002.pt"


@pytest.mark.parametrize("change", [{"format": 1}, {"step": "two"}])
def test_a_file_of_another_format_is_refused(change, tmp_path):
    file = sealed(tmp_path / "old.pt", {"format": checkpoint.FORMAT, "versions": {}, **state(1), **change})
    with pytest.raises(ConfigError, match=r"old\.pt is no checkpoint of train_ddp\.py"):
        checkpoint.load(file)


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def sealed(file, content):
    """A file that an attacker wrote: its checksum is right."""
    with open(file, "w+b") as stream:
        torch.save(content, stream)
        checkpoint._seal(stream)
    return file


def test_a_pickle_with_code_is_refused_named_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = sealed(tmp_path / "checkpoint_00000001.pt", {"format": checkpoint.FORMAT, **state(1), "model": Payload()})
    with pytest.raises(
        ConfigError, match=r"checkpoint_00000001\.pt cannot be read: it refers to the code posix\.system"
    ):
        checkpoint.load(file)
    file.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ConfigError, match="cannot be read: cut off, or not written by"):
        checkpoint.load(file)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "is no checkpoint"),
        ([1], "is no checkpoint"),
        (
            {"format": checkpoint.FORMAT, **state(1), "model": 7, "step": "1"},
            "no step, no model, no versions of its kind",
        ),
    ],
)
def test_another_programs_file_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        checkpoint.load(sealed(tmp_path / "other.pt", content))


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    """Else the run would go on from the one before, and the next save would remove this one."""
    checkpoint.save(tmp_path, state(1), keep=0)
    checkpoint.save(tmp_path, state(2), keep=0)

    def no_memory(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(checkpoint.UnreadableNow, match="cannot be read now: out of memory; try again"):
        checkpoint.newest_state(tmp_path)
