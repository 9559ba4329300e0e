"""Training over a folder with one of each odd file that real datasets contain: all named, and the run goes through."""

import math
from pathlib import Path

from PIL import Image

from dali_pipes.reference import load_image
from tests.dali_pipes.odd_files import BAD, GOOD, write_odd_files
from trainer.metrics import read_metrics
from trainer.preparation import SET_ASIDE

PHOTO = Path(__file__).parents[1] / "photos" / "chelsea.jpg"


def test_each_is_named_with_its_reason_and_training_runs(train, tmp_path, capsys):
    folder = tmp_path / "odd"
    write_odd_files(folder, load_image(str(PHOTO)))
    (folder / "missing.jpg").symlink_to(tmp_path / "nowhere.jpg")
    Image.new("1", (10_000, 9_000)).save(folder / "bomb.png")
    expected = BAD | {"missing.jpg": "No such file", "bomb.png": "10000 x 9000 is over the limit"}

    steps = 3
    assert train("--data", folder, "--no-knn", "--batch-size", len(GOOD), "--max-steps", steps) == 0
    assert f"{len(expected)} files set aside" in capsys.readouterr().out
    lines = (tmp_path / "run" / SET_ASIDE).read_text().splitlines()
    reasons = {Path(path).name: reason for path, reason in (line.split(": ", 1) for line in lines)}
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name], (name, reasons[name])
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["failed_images"] == 0  # every image that was kept is one that DALI decodes
