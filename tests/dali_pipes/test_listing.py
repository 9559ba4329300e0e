"""Which files a dataset consists of: folders of classes, a flat folder, a list."""

import os

import pytest
from PIL import Image

from dali_pipes import DatasetError, DatasetIndex
from tests.dali_pipes.odd_files import encoded, picture


def test_a_hidden_folder_without_images_is_no_class(tree):
    """ImageFolder would refuse it; many a tool leaves one."""
    before = DatasetIndex.scan(tree)
    (tree / ".ipynb_checkpoints" / "deep").mkdir(parents=True)
    (tree / ".ipynb_checkpoints" / "notes.txt").write_text("no image by its name")
    after = DatasetIndex.scan(tree)
    assert (after.classes, after.fingerprint) == (before.classes, before.fingerprint)
    (tree / "lost").mkdir()
    assert DatasetIndex.scan(tree).classes == (*before.classes, "lost")


def test_a_flat_folder_has_no_classes(photos):
    assert photos.classes == ()
    assert len(photos) == 12
    assert not photos.labels.any()


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


def test_links_that_lead_in_circles_give_each_image_once_a_way(tmp_path):
    folders = "abc"
    for seed, name in enumerate(folders):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.jpg").write_bytes(encoded(picture(seed), "JPEG"))
        for other in folders.replace(name, ""):
            (tmp_path / name / other).symlink_to(f"../{other}")
    ways = ["image.jpg", "b/image.jpg", "b/c/image.jpg", "c/image.jpg", "c/b/image.jpg"]
    index = DatasetIndex.scan(tmp_path)
    assert index.classes == tuple(folders)
    assert sorted(name for name in index.names if name.startswith("a/")) == sorted(f"a/{way}" for way in ways)


def test_a_link_to_itself_is_no_folder(tree):
    before = DatasetIndex.scan(tree).fingerprint
    (tree / "loop").symlink_to("loop")
    assert DatasetIndex.scan(tree).fingerprint == before


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


def test_a_name_that_cannot_be(tmp_path):
    with pytest.raises(DatasetError, match="cannot be read: File name too long"):
        DatasetIndex.scan(tmp_path / ("n" * 300))


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
