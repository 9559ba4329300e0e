import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dali_pipes import MOCO_V3, DatasetError, preview, sample_params


def test_picture_of_a_folder(tmp_path, photos, capsys):
    out = tmp_path / "views.png"
    preview.main(Path(photos.tree), out, count=3, image_size=32)
    assert "3 of 12 images" in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.width > 1000
        assert np.asarray(image.convert("L")).std() > 20


def test_a_list_of_images_elsewhere_needs_to_be_allowed(tmp_path, photos, capsys):
    (tmp_path / "list.txt").write_text("\n".join(photos.paths[:2]))
    with pytest.raises(DatasetError, match="allow it with --outside"):
        preview.main(tmp_path / "list.txt", tmp_path / "views.png", image_size=32)
    preview.main(tmp_path / "list.txt", tmp_path / "views.png", image_size=32, outside=True)
    assert "2 of 2 images" in capsys.readouterr().out


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
