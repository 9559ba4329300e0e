"""A second scan of a tree opens only what is new or has changed, and never believes what it should not."""

import builtins
import os
import time
from pathlib import Path

import numpy as np
import pytest

from dali_pipes import DatasetError, DatasetIndex, scan_cache
from dali_pipes.scan_cache import default_file
from tests.dali_pipes.odd_files import BAD, encoded, picture, write_odd_files

REJECTED = ["empty.jpg", "text.jpg"]


def write(path, content):
    """As a file that was there for long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    age(path)


def age(path, seconds=1000.0):
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "moco-v3-dali"


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for i in range(6):
        write(root / f"class{i % 2}" / f"{i}.jpg", encoded(picture(i, 40 + i), "JPEG"))
    write(root / "class0" / "text.jpg", b"no picture")
    write(root / "class1" / "empty.jpg", b"")
    return root


@pytest.fixture
def opened(tree, monkeypatch):
    """opened(): names of the tree's files that were opened since it was last asked."""
    names: list[str] = []
    real = builtins.open

    def counting(file, *arguments, **options):
        if isinstance(file, str | os.PathLike) and Path(file).is_relative_to(tree):
            names.append(Path(file).name)
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", counting)

    def call():
        found = sorted(set(names))
        names.clear()
        return found

    return call


def content(index):
    return index.names, index.fingerprint, index.rejected, index.classes, index.widths.tolist(), index.heights.tolist()


def test_a_second_scan_opens_no_good_file_and_finds_the_same(tree, opened, home):
    first = DatasetIndex.scan(tree)
    assert len(opened()) == 8
    assert [reason for _, reason in first.rejected] == ["not an image", "empty file"]
    (file,) = home.iterdir()
    written = file.stat()
    seen: list[tuple[int, int]] = []
    again = DatasetIndex.scan(tree, progress=lambda done, count: seen.append((done, count)))
    assert opened() == ["empty.jpg", "text.jpg"]  # mended, they may be of the same size and time
    assert content(again) == content(first)
    assert seen == [(done, 8) for done in range(1, 9)]
    assert file.stat().st_mtime_ns == written.st_mtime_ns  # nothing to add
    assert file.stat().st_ino == written.st_ino


def test_changes_of_size_or_time_are_seen_and_the_rest_is_not_opened(tree, opened):
    DatasetIndex.scan(tree)
    opened()
    write(tree / "class0" / "0.jpg", encoded(picture(7, 30), "JPEG"))  # another size
    cut = tree / "class1" / "1.jpg"
    cut.write_bytes(bytes(len(cut.read_bytes())))  # the same size
    age(cut, 500.0)
    write(tree / "class0" / "text.jpg", encoded(picture(8), "JPEG"))  # mended
    write(tree / "class0" / "new.jpg", encoded(picture(9), "JPEG"))
    (tree / "class0" / "2.jpg").unlink()
    opened()
    index = DatasetIndex.scan(tree)
    assert opened() == ["0.jpg", "1.jpg", "empty.jpg", "new.jpg", "text.jpg"]
    assert index.names == ["class0/0.jpg", "class0/4.jpg", "class0/new.jpg", "class0/text.jpg", *class1_but_1()]
    assert index.heights[0] == 30
    assert [Path(path).name for path, _ in index.rejected] == ["1.jpg", "empty.jpg"]
    assert content(DatasetIndex.scan(tree)) == content(index)
    assert opened() == ["1.jpg", "empty.jpg"]


def class1_but_1():
    return ["class1/3.jpg", "class1/5.jpg"]


def test_a_file_that_was_restored_with_its_size_and_time_is_seen(tree):
    victim = tree / "class0" / "0.jpg"
    good = victim.read_bytes()
    victim.write_bytes(bytes(len(good)))
    os.utime(victim, (1e9, 1e9))
    assert "class0/0.jpg" not in DatasetIndex.scan(tree).names
    victim.write_bytes(good)
    os.utime(victim, (1e9, 1e9))
    assert "class0/0.jpg" in DatasetIndex.scan(tree).names


def test_a_file_of_a_far_future_is_looked_at_each_time(tree, opened):
    os.utime(tree / "class0" / "0.jpg", ns=(0, 10**19))  # the year 2286
    names = DatasetIndex.scan(tree).names
    opened()
    assert DatasetIndex.scan(tree).names == names
    assert "0.jpg" in opened()


def test_every_odd_file_has_its_reason_again(tmp_path, pictures):
    write_odd_files(tmp_path / "odd", pictures[0].resize((96, 64)))
    for path in (tmp_path / "odd").iterdir():
        age(path)
    first, again = (DatasetIndex.scan(tmp_path / "odd") for _ in range(2))
    assert len(again.rejected) == len(BAD)
    assert content(again) == content(first)


def test_a_file_that_was_just_written_is_looked_at_again(tree, opened, monkeypatch):
    """It could change once more within a tick of the clock that gives it its time."""
    DatasetIndex.scan(tree)
    assert scan_cache._SETTLED >= 2e9  # the tick of the coarsest clock
    monkeypatch.setattr(scan_cache, "_SETTLED", 600 * 10**9)  # however slowly it is looked at
    age(tree / "class0" / "0.jpg", 300.0)
    for _ in range(2):
        opened()
        DatasetIndex.scan(tree)
        assert opened() == ["0.jpg", *REJECTED]


def test_a_reason_that_may_pass_is_not_remembered(tree, monkeypatch, opened):
    """A file that may not be read has the same size and time when it may; so has one behind a dangling link."""
    real = builtins.open

    def refusing(file, *arguments, **options):
        if str(file).endswith("0.jpg"):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *arguments, **options)

    (tree / "class0" / "link.jpg").symlink_to(tree / "target.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refusing)
        assert "class0/0.jpg" not in DatasetIndex.scan(tree).names
    write(tree / "target.jpg", encoded(picture(0), "JPEG"))
    opened()
    assert {"class0/0.jpg", "class0/link.jpg"} <= set(DatasetIndex.scan(tree).names)
    assert opened() == ["0.jpg", *REJECTED[:1], "link.jpg", *REJECTED[1:]]


def test_an_interrupted_scan_is_gone_on_with(tree, opened):
    def stop(done, count):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DatasetIndex.scan(tree, progress=stop)
    opened()
    DatasetIndex.scan(tree)
    assert len(opened()) == 8 - 3
    with pytest.raises(KeyboardInterrupt):
        DatasetIndex.scan(tree, progress=stop)  # what it did not come to stays known
    opened()
    DatasetIndex.scan(tree)
    assert opened() == REJECTED


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "flipped", "others"])
def test_a_damaged_cache_is_a_new_scan(tree, opened, home, damage):
    first = DatasetIndex.scan(tree)
    (file,) = home.iterdir()
    whole = file.read_bytes()
    if damage == "others":
        np.savez(file, names=np.zeros(3, np.uint8), text=np.frombuffer(b"[]", np.uint8))
    else:
        flipped = bytearray(whole)
        flipped[flipped.index(first.heights.tobytes()[:4])] ^= 1
        broken = {
            "empty": b"",
            "garbage": b"PK\3\4 nothing",
            "cut": whole[: len(whole) // 2],
            "flipped": bytes(flipped),
        }
        file.write_bytes(broken[damage])
    opened()
    assert content(DatasetIndex.scan(tree)) == content(first)
    assert len(opened()) == 8
    DatasetIndex.scan(tree)
    assert opened() == REJECTED


def test_what_another_pillow_found_is_looked_at_anew(tree, opened, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("PIL.__version__", "1.0")
        DatasetIndex.scan(tree)
    opened()
    DatasetIndex.scan(tree)
    assert len(opened()) == 8


def test_nothing_in_a_cache_is_executed(tree, opened, home):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tree / "executed",)

    first = DatasetIndex.scan(tree)
    (file,) = home.iterdir()
    with np.load(file) as stored:
        columns = dict(stored)
    for name in columns:
        np.savez(file, allow_pickle=True, **{**columns, name: np.array([Malicious()], object)})
        opened()
        assert content(DatasetIndex.scan(tree)) == content(first)
        assert len(opened()) == 8
    assert not (tree / "executed").exists()


def test_trees_and_levels_have_caches_of_their_own_for_this_user_alone(tree, opened, home, tmp_path):
    other = tmp_path / "other"
    write(other / "class0" / "0.jpg", encoded(picture(5, 99), "JPEG"))
    os.utime(other / "class0" / "0.jpg", ns=((tree / "class0" / "0.jpg").stat().st_mtime_ns,) * 2)
    DatasetIndex.scan(tree)
    assert DatasetIndex.scan(other).heights.tolist() == [99]
    opened()
    DatasetIndex.scan(tree, level="full")
    assert len(opened()) == 8
    assert len(list(home.iterdir())) == 3
    assert home.stat().st_mode & 0o777 == 0o700
    assert default_file(tree, "header") in list(home.iterdir())


def test_a_list_and_its_tree_by_name(tree, opened):
    (tree / "list.txt").write_text("class1/1.jpg 1\nclass0/0.jpg 0\n")
    DatasetIndex.scan(tree / "list.txt")
    opened()
    assert DatasetIndex.scan(tree / "list.txt").names == ["class1/1.jpg", "class0/0.jpg"]
    assert opened() == ["list.txt"]


def test_where_nothing_can_be_kept_the_scan_is_as_good(tree, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(DatasetIndex.scan(tree)) == 6
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert len(DatasetIndex.scan(tree)) == 6


def test_no_image_at_all_leaves_the_error_as_it_was(tmp_path):
    write(tmp_path / "tree" / "a.jpg", b"text")
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"none of 1 images can be read; .*not an image"):
            DatasetIndex.scan(tmp_path / "tree")
