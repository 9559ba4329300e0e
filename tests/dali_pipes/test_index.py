import os
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dali_pipes import DatasetError, DatasetIndex
from dali_pipes.file_check import FileCheck
from tests.dali_pipes.odd_files import BAD, GOOD, encoded, picture, write_odd_files


@pytest.fixture
def tree(tmp_path):
    """Three classes; nested folders, a link, other files, upper case, a loose image."""
    root = tmp_path / "tree"
    names = ["b/2.jpg", "b/10.jpg", "b/deep/er/1.PNG", "a/x.JPEG", "a/y.jpg", "B/z.webp", "loose.jpg"]
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"PNG": "PNG", "webp": "WEBP"}.get(name.rsplit(".")[-1], "JPEG")
        path.write_bytes(encoded(picture(seed, 40 + seed, 50), kind))
    (root / "a" / "notes.txt").write_text("no image by its name")
    (root / "a" / "linked").symlink_to("../b/deep")
    return root


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


@pytest.mark.parametrize("level", ["header", "full"])
def test_odd_files(tmp_path, pictures, level):
    write_odd_files(tmp_path / "odd", pictures[0])
    index = DatasetIndex.scan(tmp_path, level=level)
    assert [name.split("/")[1] for name in index.names] == sorted(GOOD)
    reasons = {path.rsplit("/")[-1]: reason for path, reason in index.rejected}
    assert reasons.keys() == BAD.keys()
    for name, expected in BAD.items():
        assert expected in reasons[name], (name, reasons[name])
    at = index.names.index("odd/exif_rotated.jpg")
    assert (index.widths[at], index.heights[at]) == pictures[0].size


def test_full_level_finds_damage_inside(tmp_path, pictures):
    png = bytearray(encoded(pictures[0], "PNG"))
    png[len(png) // 2] ^= 0xFF
    (tmp_path / "damaged.png").write_bytes(png)
    (tmp_path / "good.jpg").write_bytes(encoded(pictures[0], "JPEG"))
    assert len(DatasetIndex.scan(tmp_path)) == 2
    assert DatasetIndex.scan(tmp_path, level="full").names == ["good.jpg"]


def test_whatever_pillow_raises_is_of_one_file(tmp_path):
    tiff = bytearray(encoded(picture(0), "TIFF"))
    offsets = tiff.index(struct.pack("<H", 273), struct.unpack_from("<I", tiff, 4)[0])
    struct.pack_into("<H", tiff, offsets + 2, 2)  # where the pixels are is said in letters: a TypeError
    (tmp_path / "letters.tif").write_bytes(tiff)
    start = b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 "
    (tmp_path / "huge.jpg").write_bytes(start + struct.pack(">I4sQ", 1, b"jp2h", 2**62) + b"ihdr")  # a MemoryError
    (tmp_path / "good.png").write_bytes(encoded(picture(0), "PNG"))
    index = DatasetIndex.scan(tmp_path)
    assert index.names == ["good.png"]
    assert {Path(path).name for path, _ in index.rejected} == {"letters.tif", "huge.jpg"}
    assert all(reason for _, reason in index.rejected)


def test_a_hidden_folder_without_images_is_no_class(tree):
    """ImageFolder would refuse it; many a tool leaves one."""
    before = DatasetIndex.scan(tree)
    (tree / ".ipynb_checkpoints" / "deep").mkdir(parents=True)
    (tree / ".ipynb_checkpoints" / "notes.txt").write_text("no image by its name")
    after = DatasetIndex.scan(tree)
    assert (after.classes, after.fingerprint) == (before.classes, before.fingerprint)
    (tree / "lost").mkdir()
    assert DatasetIndex.scan(tree).classes == (*before.classes, "lost")


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


def test_unreadable_and_missing_files_are_set_aside(tree):
    (tree / "a" / "dangling.jpg").symlink_to(tree / "nowhere.jpg")
    (tree / "flat").mkdir()
    (tree / "flat" / "good.jpg").write_bytes(encoded(picture(0), "JPEG"))
    (tree / "flat" / "dangling.jpg").symlink_to(tree / "nowhere.jpg")
    (tree / "loose.jpg").unlink()
    for folder, count in ((tree, 2), (tree / "flat", 1)):
        rejected = DatasetIndex.scan(folder).rejected
        assert len(rejected) == count
        for path, reason in rejected:
            assert path.endswith("dangling.jpg")
            assert "No such file" in reason


def test_too_many_pixels(tmp_path):
    (tmp_path / "good.png").write_bytes(encoded(picture(0), "PNG"))
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    Image.new("1", (20_000, 9_000)).save(tmp_path / "larger.png")
    index = DatasetIndex.scan(tmp_path)
    assert index.names == ["good.png"]
    assert "10000 x 9000 is over the limit" in index.rejected[0][1]
    assert "exceeds limit" in index.rejected[1][1]


def test_a_list_gives_the_rows_and_their_order(tree):
    (tree / "b" / "two words 3.jpg").write_bytes(encoded(picture(8), "JPEG"))
    (tree / "odd\udcff.jpg").write_bytes(encoded(picture(9), "JPEG"))
    lines = [b"b/10.jpg 3", b"", b"./a/x.JPEG\t0", b"b/two words 3.jpg\t1", b"  odd\xff.jpg 1  ", b"gone.jpg 2"]
    (tree / "list.txt").write_bytes(b"\n".join(lines))
    index = DatasetIndex.scan(tree / "list.txt")
    assert index.names == ["b/10.jpg", "a/x.JPEG", "b/two words 3.jpg", "odd\udcff.jpg"]
    assert index.labels.tolist() == [3, 0, 1, 1]
    assert index.classes == ("0", "1", "2", "3")
    assert index.tree == tree
    assert [path for path, _ in index.rejected] == [str(tree / "gone.jpg")]
    assert all(Image.open(path) for path in index.paths)


def test_a_list_without_labels(tree):
    (tree / "list.txt").write_text("b/2.jpg\nloose.jpg\n")
    index = DatasetIndex.scan(tree / "list.txt")
    assert (index.names, index.classes, index.labels.tolist()) == (["b/2.jpg", "loose.jpg"], (), [0, 0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("b/2.jpg\n../tree/a/y.jpg", r"list.txt, line 2: ../tree/a/y.jpg is outside of the list's folder"),
        ("b/../../x.jpg 1", r"line 1: ../x.jpg is outside"),
        ("/etc/x.jpg", "line 1: /etc/x.jpg is outside"),
        ("b/2.jpg 1\nb/10.jpg", "line 2: give a label in every line or in none"),
        ("b/2.jpg\nb/./2.jpg", "line 2: b/2.jpg was listed before"),
        ("b/2.jpg 20260101", "line 1: label 20260101 is not below 1000000"),
    ],
)
def test_a_wrong_line_is_named(tree, lines, message):
    (tree / "list.txt").write_text(lines)
    with pytest.raises(DatasetError, match=message):
        DatasetIndex.scan(tree / "list.txt")


def test_a_list_may_leave_its_folder_if_asked(tree):
    (tree / "a" / "list.txt").write_text(f"../b/2.jpg\n{tree}/b/10.jpg\n")
    with pytest.raises(DatasetError, match=r"\.\./b/2\.jpg is outside of the list's folder.*--outside"):
        DatasetIndex.scan(tree / "a" / "list.txt")
    index = DatasetIndex.scan(tree / "a" / "list.txt", outside=True)
    assert [Image.open(path).size for path in index.paths] == [(50, 40), (50, 41)]
    index.save(tree / "index.npz")
    assert DatasetIndex.load(tree / "index.npz").paths == index.paths


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_a_claimed_size_takes_no_memory(kind, tmp_path):
    """A header of the largest size that its type can claim, scanned by a process that may hardly grow."""
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb" / "large.img.png").write_bytes(bomb(kind))
    code = """
import resource, sys
from dali_pipes import DatasetError, DatasetIndex
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    DatasetIndex.scan(sys.argv[1], level="full")
except DatasetError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "bomb"], capture_output=True, text=True, check=True)
    message, grown = done.stdout.splitlines()
    assert "none of 1 images can be read" in message
    assert int(grown) < 64  # MiB; the picture would take 200 and more


def bomb(kind):
    """A small picture whose header claims 65,000 x 65,000 pixels, or what the type can at most."""
    content = bytearray(encoded(picture(0, 64, 48), kind))
    if kind == "PNG":
        content[16:24] = struct.pack(">II", 65_000, 65_000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "JPEG":
        at = content.index(b"\xff\xc0")
        content[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    elif kind == "BMP":
        content[18:26] = struct.pack("<ii", 65_000, 65_000)
    elif kind == "PPM":
        content = content.replace(b"48 64", b"65000 65000", 1)
    elif kind == "WEBP":
        at = content.index(b"VP8 ")
        frame = content[at:]
        frame[14:18] = struct.pack("<HH", 16_383, 16_383)
        content = bytearray(b"RIFF" + struct.pack("<I", 4 + len(frame)) + b"WEBP" + frame)
    elif kind == "TIFF":
        (count,) = struct.unpack_from("<H", content, start := struct.unpack_from("<I", content, 4)[0])
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            if struct.unpack_from("<H", content, entry)[0] in (256, 257):
                struct.pack_into("<HHII", content, entry, struct.unpack_from("<H", content, entry)[0], 4, 1, 65_000)
    else:
        at = content.index(b"ihdr")
        content[at + 4 : at + 12] = struct.pack(">II", 65_000, 65_000)
        at = content.index(b"\xff\x51")
        content[at + 6 : at + 14] = struct.pack(">II", 65_000, 65_000)
    return bytes(content)


def test_progress_counts_up_to_all_files(photos, tree):
    seen: list[tuple[int, int]] = []
    DatasetIndex.scan(tree, progress=lambda done, count: seen.append((done, count)))
    assert seen == [(done, 7) for done in range(1, 8)]


def test_what_a_later_scan_has_lost(tree):
    index = DatasetIndex.scan(tree)
    assert index.lost(index) == []
    (tree / "a" / "y.jpg").unlink()
    (tree / "b" / "2.jpg").write_bytes(encoded(picture(0, 9, 9), "JPEG"))
    (tree / "B" / "z.webp").write_bytes(b"")
    now = DatasetIndex.scan(tree)
    lost = index.lost(now)
    assert lost is not None
    assert sorted(index.names[row] for row in lost) == ["B/z.webp", "a/y.jpg", "b/2.jpg"]
    assert index.without(lost).names == [name for row, name in enumerate(index.names) if row not in lost]
    assert len(index.without(lost).labels) == len(index) - 3
    (tree / "a" / "new.jpg").write_bytes(encoded(picture(0), "JPEG"))
    assert index.lost(DatasetIndex.scan(tree)) is None  # not only lost


def test_a_flat_folder_has_no_classes(photos):
    assert photos.classes == ()
    assert len(photos) == 12
    assert not photos.labels.any()


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.write_text("x"), "none of 1 images can be read; .*x: .*No such file"),
        (lambda root: root.write_text("\n"), "no images in it"),
        (lambda root: root.write_bytes(encoded(picture(0), "JPEG")), "is neither a folder of images nor a list"),
        (lambda root: root.mkdir(), "no images in it"),
        (lambda root: (root.mkdir(), (root / "a.jpg").write_text("x")), "none of 1 images can be read; .*not an image"),
    ],
)
def test_a_tree_that_cannot_be_used_is_one_clear_line(tmp_path, make, message):
    root = tmp_path / "tree"
    make(root)
    with pytest.raises(DatasetError, match=message) as error:
        DatasetIndex.scan(root)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_index(tmp_path):
    (tmp_path / "index.npz").write_bytes(b"PK nothing")
    with pytest.raises(DatasetError, match="is not a dataset index; scan the images again"):
        DatasetIndex.load(tmp_path / "index.npz")
    with pytest.raises(DatasetError, match="no such index"):
        DatasetIndex.load(tmp_path / "none.npz")


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


def test_a_folder_that_cannot_be_listed_is_no_class_without_images(tree, monkeypatch):
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("b/deep"):
            raise OSError(116, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(DatasetError, match="b/deep: cannot be listed: Stale file handle"):
        DatasetIndex.scan(tree)


def test_a_link_back_up_is_not_followed(tree):
    before = DatasetIndex.scan(tree).names
    (tree / "a" / "here").symlink_to(".")
    (tree / "again").symlink_to(".")
    (tree / "b" / "deep" / "up").symlink_to("../..")
    assert DatasetIndex.scan(tree).names == before


def test_a_name_that_cannot_be(tmp_path):
    with pytest.raises(DatasetError, match="cannot be read: File name too long"):
        DatasetIndex.scan(tmp_path / ("n" * 300))


def test_a_pipe_is_not_waited_for(tree):
    os.mkfifo(tree / "a" / "pipe.jpg")
    assert (str(tree / "a" / "pipe.jpg"), "not a file") in DatasetIndex.scan(tree).rejected


def test_a_list_written_on_windows(tree):
    (tree / "list.txt").write_bytes(b"\xef\xbb\xbfb/2.jpg 0\r\na/y.jpg 1\r\n")
    index = DatasetIndex.scan(tree / "list.txt")
    assert (index.names, index.labels.tolist()) == (["b/2.jpg", "a/y.jpg"], [0, 1])


def test_a_label_of_any_length_is_refused_in_a_line(tree):
    (tree / "list.txt").write_text("b/2.jpg " + "9" * 5000)
    with pytest.raises(DatasetError, match=f"line 1: label {'9' * 20} is not below 1000000"):
        DatasetIndex.scan(tree / "list.txt")
    (tree / "list.txt").write_text("b/2.jpg " + "0" * 5000 + "1")
    assert DatasetIndex.scan(tree / "list.txt").labels.tolist() == [1]
