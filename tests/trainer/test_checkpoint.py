"""Checkpoints are whole or not there, and nothing in them runs."""

import os
import pickle

import pytest
import torch

from trainer import checkpoint
from trainer.config import ConfigError


def state(step):
    return {"step": step, "model": {"weight": torch.full((3,), float(step))}}


def test_newest_returns_what_was_saved(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, state(step), keep=0)
    file = tmp_path / "checkpoint_00000010.pt"
    assert checkpoint.newest(tmp_path) == (file, [])
    found = checkpoint.load(file)
    assert found["step"] == 10
    assert found["model"]["weight"].tolist() == [10.0] * 3
    assert (tmp_path / "latest").read_text().strip() == file.name


def test_keep_drops_the_oldest_and_zero_keeps_all(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, state(step), keep=0)
    assert len(list(tmp_path.glob("checkpoint_*.pt"))) == 5
    checkpoint.save(tmp_path, state(5), keep=2)
    assert sorted(file.name for file in tmp_path.glob("*.pt")) == ["checkpoint_00000004.pt", "checkpoint_00000005.pt"]


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


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "checkpoint_00000001.pt"
    torch.save({"format": checkpoint.FORMAT, "step": 1, "model": Payload()}, file)
    with pytest.raises(ConfigError, match=r"checkpoint_00000001\.pt cannot be read"):
        checkpoint.load(file)
    file.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.load(file)
    assert not (tmp_path / "executed").exists()


def test_another_programs_file_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="is no checkpoint"):
        checkpoint.load(tmp_path / "other.pt")
