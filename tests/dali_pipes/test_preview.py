import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dali_pipes import MOCO_V3, DatasetError, ViewLoader, preview, sample_params


def test_picture_of_a_folder(tmp_path, photos, capsys):
    out = tmp_path / "views.png"
    preview.main(Path(photos.tree), out, count=3, image_size=32)
    assert "3 of 12 images" in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.width > 1000
        assert np.asarray(image.convert("L")).std() > 20


def test_each_view_stands_under_what_was_drawn_for_it(photos):
    rows = np.array([3, 7])
    batch = next(iter(ViewLoader(photos.at(rows), MOCO_V3, 2, seed=0, image_size=32)))
    chosen, order = photos.at(rows), batch.indices.numpy()
    sizes = chosen.heights[order], chosen.widths[order]
    drawn = [sample_params(spec, view, 0, 0, order, *sizes) for view, spec in enumerate(MOCO_V3.views)]
    figure = preview.picture(chosen, MOCO_V3, batch, drawn)
    cells = [cell for part in figure.subfigs for cell in part.axes]
    for i in range(2):
        original, *views = cells[3 * i : 3 * i + 3]
        assert Path(chosen.path(int(order[i]))).name in original.get_title(loc="left")
        for view, (cell, params) in enumerate(zip(views, drawn, strict=True)):
            shown = np.asarray(cell.images[0].get_array())
            assert np.array_equal(shown, batch.views[view][i].permute(1, 2, 0).numpy())
            assert preview.applied(params, i) in cell.get_title(loc="left")
            frame: Any = original.patches[view]
            box = (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height())
            assert box == (params.left[i], params.top[i], params.width[i], params.height[i])


def test_a_list_of_images_elsewhere_needs_to_be_allowed(tmp_path, photos, capsys):
    (tmp_path / "list.txt").write_text("\n".join(photos.paths[:2]))
    with pytest.raises(DatasetError, match="allow it with --outside"):
        preview.main(tmp_path / "list.txt", tmp_path / "views.png", image_size=32)
    preview.main(tmp_path / "list.txt", tmp_path / "views.png", image_size=32, outside=True)
    assert "2 of 2 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("out", "message"),
    [("views.jpeg.txt", "its ending names no type of picture"), ("none/views.png", "there is no folder")],
)
def test_a_picture_that_cannot_be_written_is_told_before_the_work(out, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        preview.main(tmp_path / "no such data", tmp_path / out)


def test_a_picture_stays_as_it_was_if_the_next_cannot_be_written(tmp_path, photos, monkeypatch):
    def full(figure, stream, **_):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "views.PNG").write_bytes(b"before")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left"):
        preview.main(Path(photos.tree), tmp_path / "views.PNG", count=1, image_size=32)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("views.PNG", b"before")]


def test_names_of_any_kind(tmp_path, photos):
    for name in ("cost$s and $.jpg", "caf\udce9.jpg"):
        shutil.copy(photos.paths[0], tmp_path / name)
    preview.main(tmp_path, tmp_path / "views.png", image_size=32)


def test_titles_say_what_was_applied():
    p = sample_params(MOCO_V3.views[1], 1, 7, 3, [0, 1, 1_281_166], [375, 500, 40], [500, 375, 1200])
    assert preview.applied(p, 0) == "brightness 1.05, saturation 0.96\ncontrast 0.92, hue -0.10\nflip"
    p.jitter[1] = False
    p.blur[1] = p.solarize[1] = True
    assert preview.applied(p, 1) == "blur 1.27, solarize"


def test_a_missing_folder_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["preview", "--data", str(tmp_path / "none"), "--out", "views.png"])
    monkeypatch.delitem(sys.modules, "dali_pipes.preview")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("dali_pipes.preview", run_name="__main__")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such folder\n"
