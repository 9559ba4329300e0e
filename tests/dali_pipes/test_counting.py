"""What is shown while a dataset's files are looked at."""

import io

from rich.console import Console

from dali_pipes import counting
from tests.dali_pipes.conftest import PHOTOS


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def test_a_terminal_shows_one_live_line():
    shown = console(terminal=True)
    with counting.counting("looking at the images in [tree]", shown) as progress:
        progress(12, 12)
    assert "looking at the images in [tree]" in shown.file.getvalue()
    assert "12/12" in shown.file.getvalue()


def test_elsewhere_a_line_now_and_then(monkeypatch):
    shown, now = console(terminal=False), [0.0]
    monkeypatch.setattr(counting.time, "monotonic", lambda: now[0])
    with counting.counting("looking", shown) as progress:
        for done in range(1, 101):
            now[0] += 1.0
            progress(done, 100)
    assert shown.file.getvalue().splitlines() == ["looking: 31 of 100", "looking: 62 of 100", "looking: 93 of 100"]


def test_a_scan_is_counted():
    shown = console(terminal=True)
    assert len(counting.scan_shown(PHOTOS, console=shown)) == 12
    assert f"looking at the images in {PHOTOS}" in shown.file.getvalue()
    assert "12/12" in shown.file.getvalue()
