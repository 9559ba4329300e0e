"""The table of a dataset: its rows, scanned, saved and loaded."""

import dataclasses
import os
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dali_pipes import DatasetError, DatasetIndex
from dali_pipes.file_check import MOST_PIXELS, FileCheck
from tests.dali_pipes.odd_files import encoded, picture, write_odd_files


def test_classes_and_rows_are_those_of_image_folder(tree):
    index, folder = DatasetIndex.scan(tree), ImageFolder(str(tree))
    assert list(index.classes) == folder.classes == ["B", "a", "b"]
    assert list(zip(index.paths, index.labels.tolist(), strict=True)) == folder.samples
    assert len(index) == 7  # six files, one of them reached by two ways; the loose one belongs to no class
    ((path, reason),) = index.rejected
    assert path == str(tree / "loose.jpg")
    assert "beside the class folders" in reason


def test_sizes_are_those_of_the_files(tree):
    index = DatasetIndex.scan(tree)
    sizes = [Image.open(path).size for path in index.paths]
    assert list(zip(index.widths.tolist(), index.heights.tolist(), strict=True)) == sizes


def test_ctrl_c_does_not_wait_for_all_that_was_begun(tmp_path, monkeypatch):
    for i in range(400):
        (tmp_path / f"{i:03d}.jpg").write_bytes(b"")
    looked, pressed = [], threading.Event()

    def look(path, level):
        looked.append(path)
        if Path(path).stem >= "025":  # all but the first portion are slow
            pressed.wait(20)
            time.sleep(0.2)
        return FileCheck(1, 1)

    def stop(done, count):
        pressed.set()
        raise KeyboardInterrupt

    monkeypatch.setattr("dali_pipes.index.check_file", look)
    monkeypatch.setattr("dali_pipes.index.CALLS", 16)
    with pytest.raises(KeyboardInterrupt):
        DatasetIndex.scan(tmp_path, progress=stop)
    assert len(looked) < 200


def test_progress_counts_up_to_all_files(photos, tree):
    seen: list[tuple[int, int]] = []
    DatasetIndex.scan(tree, progress=lambda done, count: seen.append((done, count)))
    assert seen == [(done, 7) for done in range(1, 8)]


def test_a_portion_of_many_files_keeps_each_reason_with_its_file(tmp_path, pictures, monkeypatch):
    write_odd_files(tmp_path / "odd", pictures[0].resize((96, 64)))
    one_by_one = DatasetIndex.scan(tmp_path / "odd", cache=tmp_path / "first")
    monkeypatch.setattr("dali_pipes.index.CALLS", 3)
    together = DatasetIndex.scan(tmp_path / "odd", cache=tmp_path / "second")
    assert together.rejected == one_by_one.rejected
    assert together.fingerprint == one_by_one.fingerprint


def test_what_a_later_scan_has_lost(tree):
    index = DatasetIndex.scan(tree)
    same = index.found_again(index)
    assert same is not None
    assert (same[0].fingerprint, same[1], same[0].rejected) == (index.fingerprint, [], index.rejected)
    (tree / "a" / "y.jpg").unlink()
    (tree / "b" / "2.jpg").write_bytes(encoded(picture(0, 9, 9), "JPEG"))
    (tree / "B" / "z.webp").write_bytes(b"")
    (tree / "a" / "x.JPEG").write_bytes(encoded(picture(3, 43, 50), "JPEG") + b"more")
    now = DatasetIndex.scan(tree)
    found = index.found_again(now)
    assert found is not None
    again, lost = found
    assert again.fingerprint == index.fingerprint
    assert sorted(index.names[row] for row in lost) == ["B/z.webp", "a/y.jpg", "b/2.jpg"]
    reasons = {os.path.relpath(path, tree): reason for path, reason in again.rejected}
    assert reasons["a/y.jpg"] == "no longer there"
    assert reasons["b/2.jpg"] == "another image than before"
    assert reasons["B/z.webp"] == "empty file"
    kept = [row for row in range(len(index)) if row not in lost]
    assert [again.file_sizes[row] for row in kept] == [os.path.getsize(again.path(row)) for row in kept]
    assert index.without(lost).names == [index.names[row] for row in kept]
    assert len(index.without(lost).labels) == len(index) - 3
    (tree / "a" / "y.jpg").write_bytes(encoded(picture(4, 44, 50), "JPEG"))  # it is back
    restored = again.found_again(DatasetIndex.scan(tree))
    assert restored is not None
    assert sorted(index.names[row] for row in restored[1]) == ["B/z.webp", "b/2.jpg"]
    assert str(tree / "a" / "y.jpg") not in dict(restored[0].rejected)
    (tree / "a" / "new.jpg").write_bytes(encoded(picture(0), "JPEG"))
    assert index.found_again(DatasetIndex.scan(tree)) is None  # not only lost


def test_what_was_set_aside_and_is_mended_stays_out(tree, tmp_path):
    bad = tree / "a" / "bad.jpg"
    bad.write_bytes(b"")
    index = DatasetIndex.scan(tree)
    index.save(tmp_path / "index.npz")
    moved = tree.rename(tmp_path / "moved")
    (moved / "a" / "bad.jpg").write_bytes(encoded(picture(0), "JPEG"))
    for _ in range(2):  # the second time it is known from what the first one saved
        now = DatasetIndex.scan(moved)
        found = DatasetIndex.load(tmp_path / "index.npz", tree=moved).found_again(now)
        assert found is not None
        again, lost = found
        assert (again.fingerprint, lost) == (index.fingerprint, [])
        assert now.fingerprint != index.fingerprint
        said = dict(again.rejected)[str(moved / "a" / "bad.jpg")]
        assert said == "was set aside at first, and stays so (empty file)"
        again.save(tmp_path / "index.npz")


def test_saved_and_loaded(tree, tmp_path):
    (tree / "a" / "bad.jpg").write_bytes(b"")
    (tree / "a" / "n\udcffme.jpg").write_bytes(encoded(picture(9), "JPEG"))  # a byte that is no UTF-8
    index = DatasetIndex.scan(tree)
    index.save(tmp_path / "index.npz")
    again = DatasetIndex.load(tmp_path / "index.npz")
    for name in ("paths", "classes", "rejected", "fingerprint"):
        assert getattr(again, name) == getattr(index, name)
    for name in ("labels", "widths", "heights", "file_sizes"):
        assert np.array_equal(getattr(again, name), getattr(index, name))
    assert again.file_sizes.tolist() == [os.path.getsize(path) for path in again.paths]
    assert len(again.rejected) == 2

    moved = tree.rename(tmp_path / "moved")
    there = DatasetIndex.load(tmp_path / "index.npz", tree=moved)
    assert there.fingerprint == index.fingerprint
    assert there.paths == DatasetIndex.scan(moved).paths


def test_fingerprint_is_of_rows_and_their_order(tree):
    index = DatasetIndex.scan(tree)
    columns = {"names": index.names, "labels": index.labels, "widths": index.widths, "heights": index.heights}
    columns["file_sizes"] = index.file_sizes

    def fingerprint(**changed):
        return DatasetIndex(tree=tree, classes=index.classes, rejected=[], **{**columns, **changed}).fingerprint

    assert fingerprint() == index.fingerprint
    assert fingerprint(names=index.names[::-1]) != index.fingerprint
    assert fingerprint(labels=index.labels + 1) != index.fingerprint
    assert fingerprint(widths=index.heights, heights=index.widths) != index.fingerprint


def test_an_index_from_before_the_sizes_of_files_is_read(tree, tmp_path):
    index = DatasetIndex.scan(tree)
    index.save(tmp_path / "index.npz")
    with zipfile.ZipFile(tmp_path / "index.npz") as new, zipfile.ZipFile(tmp_path / "old.npz", "w") as old:
        for name in set(new.namelist()) - {"file_sizes.npy"}:
            old.writestr(name, new.read(name))
    older = DatasetIndex.load(tmp_path / "old.npz")
    assert older.fingerprint == index.fingerprint
    assert not older.file_sizes.any()


def test_a_file_that_is_no_index(tmp_path):
    (tmp_path / "index.npz").write_bytes(b"PK nothing")
    with pytest.raises(DatasetError, match="is not a dataset index; scan the images again"):
        DatasetIndex.load(tmp_path / "index.npz")
    with pytest.raises(DatasetError, match="no such index"):
        DatasetIndex.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("column", "first", "reason"),
    [
        ("labels", 3, "a label is of no class"),
        ("labels", -1, "a label is of no class"),
        ("widths", 0, "an image has no size that can be"),
        ("heights", -5, "an image has no size that can be"),
        ("widths", MOST_PIXELS // 45 + 1, "an image has no size that can be"),  # the first image is 45 px high
        ("file_sizes", -1, "less than no bytes"),
    ],
)
def test_an_index_that_no_scan_could_have_made_is_refused(column, first, reason, tree, tmp_path):
    index = DatasetIndex.scan(tree)
    assert len(index.classes) == 3
    assert index.heights[0] == 45
    values = getattr(index, column).copy()
    values[0] = first
    dataclasses.replace(index, **{column: values}).save(tmp_path / "index.npz")
    with pytest.raises(DatasetError, match=reason):
        DatasetIndex.load(tmp_path / "index.npz")


def test_an_image_of_the_most_pixels_is_one(tree, tmp_path):
    index = DatasetIndex.scan(tree)
    values = index.widths.copy()
    values[0] = MOST_PIXELS // 45
    dataclasses.replace(index, widths=values).save(tmp_path / "index.npz")
    assert DatasetIndex.load(tmp_path / "index.npz").widths[0] == MOST_PIXELS // 45


@pytest.mark.parametrize(
    ("own", "others", "same"),
    [
        (("cat", "dog"), ("cat", "dog"), True),
        (("cat", "dog"), ("dog", "cat"), False),
        (("cat",), ("cat", "dog"), False),  # folders are numbered in their order, so that a class less shifts labels
        (("0", "1"), ("0", "1", "2"), True),  # numbers of a list are labels themselves
        (("0", "1", "2"), ("0", "1"), False),
        ((), (), False),
        ((), ("0", "1"), False),
    ],
)
def test_labels_mean_the_same(own, others, same, tree):
    index = DatasetIndex.scan(tree)
    one, other = (dataclasses.replace(index, classes=classes) for classes in (own, others))
    assert one.labelled_as(other) is same


def test_an_index_is_whole_readable_by_others_or_not_there(tree, tmp_path, monkeypatch):
    index, file = DatasetIndex.scan(tree), tmp_path / "index.npz"
    index.save(file)
    (tmp_path / "any").touch()
    assert file.stat().st_mode == (tmp_path / "any").stat().st_mode
    before = file.read_bytes()

    def full(*arguments, **columns):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        index.save(file)
    assert file.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_an_index_that_cannot_be_read_says_why(tmp_path):
    (tmp_path / "index.npz").mkdir()
    with pytest.raises(DatasetError, match=r"index\.npz cannot be read: Is a directory"):
        DatasetIndex.load(tmp_path / "index.npz")
