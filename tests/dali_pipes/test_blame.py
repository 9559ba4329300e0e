"""Whose fault a failure is: a file's, DALI's, the memory's or the disk's. Only a file's costs an image."""

import re
import shutil

import pytest
import torch

from dali_pipes import DatasetError, DatasetIndex, EvalLoader
from dali_pipes.file_check import FileCheck
from tests.dali_pipes.failing import COUNT, STEPS, check_slots, copied, make, reader, sixteen_bits, truncate


def test_a_disk_that_stumbles_is_read_once_more(index, undisturbed, monkeypatch):
    """The file is whole again when it is looked at: nothing explains the failure, so nothing is set aside."""
    path = index.tree / index.names[4]
    whole = path.read_bytes()
    truncate(path)
    monkeypatch.setattr("dali_pipes.failures._look", lambda index, row: path.write_bytes(whole) and FileCheck())
    loader = make(index)
    assert check_slots(copied(loader), undisturbed[:STEPS], failed=set()) == 0
    assert loader.failed == []


@pytest.mark.parametrize("train", [True, False])
def test_what_only_dali_cannot_read_is_found_and_named(original, tmp_path, train):
    """From the start: it passes the scan, and Pillow has nothing against it."""
    shutil.copytree(original, tmp_path / "images")
    sixteen_bits(tmp_path / "images" / "05.jpg")
    index = DatasetIndex.scan(tmp_path / "images")
    lines: list[str] = []
    assert len(index) == COUNT
    if train:
        copied(make(index, on_failed=lines.append))
    else:
        rows = [batch.indices for batch in EvalLoader(index, 4, resize=16, crop=16, on_failed=lines.append)]
        assert torch.cat(rows).tolist() == [row for row in range(COUNT) if row != 5]
    (line,) = lines
    assert line.startswith(f"{tmp_path / 'images' / '05.jpg'}: the decoder cannot read it, although Pillow can")


def test_trouble_of_dalis_own_is_raised(index, monkeypatch):
    truncate(index.tree / index.names[4])
    monkeypatch.setattr("dali_pipes.failures._look", lambda index, row: FileCheck())
    monkeypatch.setattr("dali_pipes.failures._undecoded", lambda index, rows, stream: {})
    with pytest.raises(DatasetError, match="DALI failed on a batch of readable files"):
        copied(make(index))


def test_a_decoder_that_fails_on_everything_blames_no_image(index, monkeypatch):
    """As after an error of the GPU, which every later call repeats."""
    loader = make(index, on_failed=lambda line: pytest.fail(line))
    batches = iter(loader)
    next(batches)

    def broken(*_, **__):
        raise RuntimeError("CUDA runtime API error cudaErrorIllegalAddress (700)")

    monkeypatch.setattr(type(loader._stream._pipeline), "outputs", broken)
    monkeypatch.setattr("dali_pipes.stream.decode", broken)
    with pytest.raises(DatasetError, match=r"DALI failed on .* cudaErrorIllegalAddress"):
        next(batches)
    assert loader.failed == []


def test_a_disk_that_was_away_for_a_moment_costs_no_image(index, undisturbed, monkeypatch):
    away = index.tree.with_name("away")
    pauses = []

    def back_at_the_second_look(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            away.rename(index.tree)

    monkeypatch.setattr("dali_pipes.failures.time.sleep", back_at_the_second_look)
    loader, batches = reader(index, undisturbed, STEPS - 1)
    index.tree.rename(away)
    loader.set_epoch(1)
    batches += copied(loader)
    assert check_slots(batches[STEPS - 1 :], undisturbed[STEPS : 2 * STEPS], failed=set()) == 0
    assert len(pauses) == 2
    assert loader.failed == []


def test_with_one_image_a_batch_the_disk_is_waited_for_as_well(index, monkeypatch):
    away = index.tree.with_name("away")
    index.tree.rename(away)
    monkeypatch.setattr("dali_pipes.failures.time.sleep", lambda seconds: away.rename(index.tree))
    loader = make(index, batch_size=1)
    assert len(copied(loader)) == COUNT
    assert loader.failed == []


def test_a_disk_that_stays_away_ends_the_run_without_blame(index, undisturbed, monkeypatch):
    monkeypatch.setattr("dali_pipes.failures.time.sleep", lambda seconds: None)
    loader, _ = reader(index, undisturbed, 2)
    index.tree.rename(index.tree.with_name("away"))
    with pytest.raises(DatasetError, match=r"none of \d+ files can be read, the first .*No such file.*their disk"):
        copied(loader)
    assert loader.failed == []


@pytest.mark.parametrize(
    "words",
    ["Can't allocate 4096 bytes on device 0.", "CUDA allocation failed", "cudaErrorMemoryAllocation (2)"],
)
def test_too_little_memory_is_no_trouble_of_the_images(words, index, monkeypatch):
    """The words are those of libdali_core and of what it passes on; a CPU never runs into them."""
    loader = make(index)
    batches = iter(loader)
    next(batches)

    def outputs(pipeline):
        raise RuntimeError(f"Critical error in pipeline:\n{words}")

    monkeypatch.setattr(type(loader._stream._pipeline), "outputs", outputs)
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(words)):
        next(batches)


def test_too_little_memory_to_build_the_pipeline(index, monkeypatch):
    def build(*args, **options):
        raise RuntimeError("Can't allocate 4096 bytes on device 0.")

    monkeypatch.setattr("dali_pipes.stream.build_pipeline", build)
    with pytest.raises(torch.OutOfMemoryError, match="Can't allocate 4096 bytes on device 0"):
        next(iter(make(index)))
