"""What the trainer shows while it looks at a dataset's files, and that a second start does not look again."""

import io
import os

from rich.console import Console

from dali_pipes import DatasetIndex
from trainer import metrics
from trainer.metrics import Display


def shown(display, monkeypatch, terminal):
    """The display's output, on a terminal or not."""
    out = io.StringIO()
    display.console = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    monkeypatch.setattr(display, "_live", terminal)
    return out


def test_a_terminal_shows_one_live_line(sample, monkeypatch):
    display = Display(shown=True)
    out = shown(display, monkeypatch, terminal=True)
    with display.counting("looking at the images in [tree]") as progress:
        DatasetIndex.scan(sample / "train", progress=progress)
    assert "looking at the images in [tree]" in out.getvalue()
    assert "50/50" in out.getvalue()


def test_elsewhere_a_line_now_and_then(monkeypatch):
    display, now = Display(shown=True), [0.0]
    out = shown(display, monkeypatch, terminal=False)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with display.counting("looking") as progress:
        for done in range(1, 101):
            now[0] += 1.0
            progress(done, 100)
    assert out.getvalue().splitlines() == ["looking: 31 of 100", "looking: 62 of 100", "looking: 93 of 100"]


def test_a_second_start_opens_no_image_to_look_at_it(train, sample, monkeypatch):
    for path in sample.rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))
    assert train("--no-knn", "--max-steps", 1) == 0
    looked: list[str] = []
    monkeypatch.setattr("dali_pipes.index.check_file", lambda path, level: looked.append(path))
    assert train("--no-knn", "--max-steps", 2) == 0
    assert looked == []
