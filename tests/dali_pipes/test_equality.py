"""The table that tells a user how far the augmentations are from torchvision's, on any folder."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dali_pipes import MOCO_V3, DatasetError, equality
from dali_pipes.equality import decoder_rows, main, table
from dali_pipes.gap import Gap
from tests.dali_pipes.conftest import PHOTOS
from tests.dali_pipes.odd_files import broken_inside, encoded, picture

OPERATORS = [
    *("crop and resize", "brightness", "contrast", "saturation", "hue", "jitter in its own order"),
    *("grayscale", "blur", "solarize", "flip", "view 1", "view 2"),
]


def test_the_gap_of_images():
    a, b = np.array([[0, 10], [255, 7]], np.uint8), np.array([[0, 11], [250, 7]], np.uint8)
    gap = Gap.between([a, a], [b, a])
    assert (gap.mean, gap.most, gap.differ, gap.by_more) == (6 / 8, 5, 2 / 8, 1 / 8)
    again = Gap.between([a], [b]) + Gap.between([a], [a])
    assert str(again) == str(gap)
    with pytest.raises(ValueError, match="cannot be compared"):
        Gap.between([a], [b[:1]])


def test_every_operator_and_view_is_within_the_limits(photos):
    (decoder,) = decoder_rows(photos, draws=20)
    assert (decoder.size, decoder.what, decoder.most) == (None, "decoder", 0)
    rows = table(photos, MOCO_V3, (96, 32), draws=20)
    assert [(row.size, row.what) for row in rows] == [(size, what) for size in (96, 32) for what in OPERATORS]
    for row in rows:
        assert row.mean < 0.05, row
        assert row.by_more < 0.005, row
        assert row.mean <= row.most


def test_the_table_and_the_file(tmp_path, capsys):
    main(PHOTOS, sizes=(32,), draws=3, recipe="multi-crop", file=tmp_path / "equality.json")
    printed = capsys.readouterr().out
    for what in ("decoder", "hue", "view 4", "off by more than 1"):
        assert what in printed
    written = json.loads((tmp_path / "equality.json").read_text())
    assert (written["images"], written["draws"], written["device"]) == (12, 3, "cpu")
    assert written["versions"].keys() == {"pillow", "torchvision", "nvidia-dali-cuda120"}
    assert (written["augment"], len(written["decoder"])) == ("dali", 1)
    assert written["rows"][-1].keys() == {"size", "what", "mean", "most", "differ", "by_more"}


@pytest.mark.parametrize("reader", ["Pillow", "DALI"])
def test_a_file_that_cannot_be_decoded_is_named(reader, tmp_path, monkeypatch):
    def decode(paths, device):
        if any(path.endswith("b.png") for path in paths):
            raise RuntimeError("Error in CPU operator\n`fn.decoders.image`")
        return decode_all(paths, device)

    decode_all = equality.decode
    for name in "abc":
        content = broken_inside(0) if name == "b" and reader == "Pillow" else encoded(picture(0), "PNG")
        (tmp_path / f"{name}.png").write_bytes(content)
    if reader == "DALI":
        monkeypatch.setattr(equality, "decode", decode)
    with pytest.raises(DatasetError, match=f"^{tmp_path / 'b.png'} cannot be decoded [^\n]*move it away"):
        main(tmp_path, sizes=(32,), draws=3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--data", "/nowhere"], "/nowhere: no such folder"), (["--data", PHOTOS, "--draws", 0], "--draws 0")],
)
def test_wrong_use_is_one_line(flags, message):
    command = [sys.executable, "-m", "dali_pipes.equality", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
