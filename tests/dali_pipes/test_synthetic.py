import io
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from torchvision.datasets import ImageFolder

from dali_pipes import synthetic
from dali_pipes.synthetic import CLASSES, MARKER, UNFINISHED, generate, main, render

TRAIN, VAL = 12, 3
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "data"
    assert generate(out, train_per_class=TRAIN, val_per_class=VAL, processes=2) == 10 * (TRAIN + VAL)
    return out


@pytest.fixture(scope="module")
def images(dataset):
    """Opened, with the properties of the files; and the label of each."""
    samples = ImageFolder(dataset / "train").samples + ImageFolder(dataset / "val").samples
    return [Image.open(path) for path, _ in samples], np.array([label for _, label in samples])


def test_any_number_of_processes_and_images_gives_the_same_bytes(dataset, tmp_path):
    generate(tmp_path / "one", train_per_class=3, val_per_class=1, processes=1)
    generate(tmp_path / "two", train_per_class=3, val_per_class=1, processes=2)
    files = contents(tmp_path / "one")
    assert files == contents(tmp_path / "two")
    assert len(files) == 41
    del files[MARKER]
    assert files.items() <= contents(dataset).items()


def test_an_image_depends_on_its_name_and_the_seed_alone(dataset):
    assert (dataset / "val" / "ring" / "ring_00002.jpg").read_bytes() == render("ring", "val", 2, seed=0)
    others = [("ring", "val", 2, 1), ("ring", "val", 1, 0), ("ring", "train", 2, 0), ("disc", "val", 2, 0)]
    assert len({render("ring", "val", 2, 0), *(render(*other) for other in others)}) == 5


def test_image_folder_finds_ten_classes(dataset):
    for split, number in {"train": TRAIN, "val": VAL}.items():
        folder = ImageFolder(dataset / split)
        assert tuple(folder.classes) == CLASSES
        assert Counter(label for _, label in folder.samples) == dict.fromkeys(range(10), number)
    assert {path.name for path in dataset.iterdir()} == {"train", "val", MARKER}


def test_sizes_cover_the_range_and_are_mostly_small(images):
    sizes = np.array([image.size for image in images[0]])
    assert sizes.min() == 160
    assert 480 < sizes.max() <= 640
    assert 240 < sizes.mean() < 320
    width, height = sizes.T
    assert 0.3 < (width > height).mean() < 0.7


def test_files_vary_as_photographs_do(images):
    assert {image.format for image in images[0]} == {"JPEG"}
    modes = Counter(image.mode for image in images[0])
    assert set(modes) == {"RGB", "L"}
    assert modes["RGB"] > 0.8 * len(images[0])
    four_four_four, four_two_zero, gray = 0, 2, -1
    assert {JpegImagePlugin.get_sampling(image) for image in images[0]} == {four_four_four, four_two_zero, gray}
    progressive = [bool(image.info.get("progressive")) for image in images[0]]
    assert 0.05 < np.mean(progressive) < 0.3


def luminance_table(image):
    return tuple(image.quantization[0])


def test_qualities_are_75_to_95(images):
    of_tables = {}
    for quality in range(1, 101):
        file = io.BytesIO()
        Image.new("L", (8, 8)).save(file, "JPEG", quality=quality)
        of_tables[luminance_table(Image.open(file))] = quality
    qualities = {of_tables[luminance_table(image)] for image in images[0]}
    assert min(qualities) >= 75
    assert max(qualities) <= 95
    assert len(qualities) > 15


def nearest_neighbour_accuracy(features, labels):
    """In %, each image against all others."""
    distance = np.abs(features[:, None] - features[None]).sum(axis=-1)
    np.fill_diagonal(distance, np.inf)
    return 100 * (labels[distance.argmin(axis=1)] == labels).mean()


def test_colour_tells_no_class(images):
    """Chance is 10 %; 25 % is more than six standard deviations above it."""
    labels = images[1]
    means, histograms = [], []
    for image in images[0]:
        ycc = np.asarray(image.convert("RGB").convert("YCbCr"))
        means.append(np.asarray(image.convert("RGB")).mean(axis=(0, 1)))
        counts = [np.histogram(ycc[..., channel], bins=32, range=(0, 256))[0] for channel in range(3)]
        histograms.append(np.concatenate(counts) / ycc[..., 0].size)
    assert nearest_neighbour_accuracy(np.array(means), labels) < 25
    assert nearest_neighbour_accuracy(np.array(histograms), labels) < 25
    assert nearest_neighbour_accuracy(np.array(histograms)[:, 32:], labels) < 25


def test_all_images_have_one_distribution_of_colours(images):
    coloured = [(np.asarray(image), label) for image, label in zip(*images, strict=True) if image.mode == "RGB"]
    labels = np.array([label for _, label in coloured])
    means = np.array([pixels.mean(axis=(0, 1)) for pixels, _ in coloured])
    deciles = np.array([np.percentile(pixels.mean(axis=-1), range(10, 100, 10)) for pixels, _ in coloured])
    assert np.ptp(means, axis=0).max() < 3
    assert np.ptp(deciles, axis=0).max() < 12
    of_class = np.array([means[labels == label].mean(axis=0) for label in range(10)])
    assert np.ptp(of_class, axis=0).max() < 1


def test_a_complete_folder_is_left_alone(dataset):
    before = times(dataset)
    assert generate(dataset, train_per_class=TRAIN, val_per_class=VAL) == 0
    assert times(dataset) == before


def test_an_interrupted_folder_is_completed(tmp_path, monkeypatch):
    def disk_full(class_name, *args):
        if class_name == "ring":
            raise OSError("no space left on device")
        return render(class_name, *args)

    counts = {"train_per_class": 2, "val_per_class": 1}
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "render", disk_full)
        with pytest.raises(OSError, match="no space left"):
            generate(tmp_path / "broken", **counts, processes=1)
    assert not (tmp_path / "broken" / MARKER).exists()
    kept = {path: when for path, when in times(tmp_path / "broken").items() if path.suffix == ".jpg"}
    assert kept
    (tmp_path / "broken" / UNFINISHED / "train_star_00001.jpg").write_bytes(b"half")

    generate(tmp_path / "broken", **counts, processes=1)
    generate(tmp_path / "whole", **counts, processes=1)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert kept.items() <= times(tmp_path / "broken").items()
    assert not (tmp_path / "broken" / UNFINISHED).exists()


def test_two_at_once_do_not_disturb_each_other(tmp_path):
    words = ["--out", str(tmp_path / "both"), "--train-per-class", "3", "--val-per-class", "1"]
    started = [subprocess.Popen([sys.executable, "-m", "dali_pipes.synthetic", *words], **PIPES) for _ in range(2)]
    said = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sorted("complete" in out for out, _ in said) == [False, True]
    generate(tmp_path / "one", train_per_class=3, val_per_class=1, processes=1)
    assert contents(tmp_path / "both") == contents(tmp_path / "one")


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["synthetic", *map(str, words)])
    main()


def test_command_line_draws_once(tmp_path, monkeypatch, capsys):
    words = "--out", tmp_path / "new" / "data", "--seed", 3, "--train-per-class", 1, "--val-per-class", 1
    command(monkeypatch, *words)
    assert "20 images drawn" in capsys.readouterr().out
    command(monkeypatch, *words)
    assert "complete" in capsys.readouterr().out
    assert (tmp_path / "new" / "data" / "val" / "disc" / "disc_00000.jpg").read_bytes() == render("disc", "val", 0, 3)


def of_someone(folder):
    (folder / "train" / "cat").mkdir(parents=True)
    (folder / "train" / "cat" / "cat.jpg").write_bytes(b"mine")


def of_another_seed(folder):
    generate(folder, seed=1, train_per_class=1, val_per_class=1)


def begun_with_another_seed(folder):
    of_another_seed(folder)
    (folder / UNFINISHED).mkdir()
    (folder / MARKER).rename(folder / UNFINISHED / MARKER)


def a_file(folder):
    folder.write_text("notes")


@pytest.mark.parametrize("make", [of_someone, of_another_seed, begun_with_another_seed, a_file])
def test_a_folder_of_something_else_is_refused_and_not_touched(tmp_path, monkeypatch, capsys, make):
    out = tmp_path / "data"
    make(out)
    before = times(tmp_path), contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--out", out, "--train-per-class", 1, "--val-per-class", 1)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(out) in line
    assert "name a" in line
    assert (times(tmp_path), contents(tmp_path)) == before


@pytest.mark.parametrize("flag", ["--seed", "--train-per-class", "--val-per-class"])
def test_numbers_out_of_range_are_refused(tmp_path, monkeypatch, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--out", tmp_path, flag, -1)
    assert stop.value.code == 2
    assert f"{flag} -1 is too small; use" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
