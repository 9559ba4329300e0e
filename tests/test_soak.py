"""Faults at random points, in their short form: the run ends as if nothing had happened."""

import subprocess
import sys

import pytest

from tests.soak import OUTCOMES
from tests.trainer.conftest import ROOT


@pytest.mark.slow
def test_a_run_that_is_hit_by_every_fault_ends_as_an_undisturbed_one():
    line = [sys.executable, "-m", "tests.soak", "--minutes", "2", "--ranks", "1", "2"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("trace and weights identical, bit for bit") == 2
    untried = [line for line in done.stdout.splitlines() if "not tried" in line]
    assert len(untried) == ("lets nobody mount" in done.stdout)
    assert all(f"| {fault} |" in done.stdout for fault in OUTCOMES)
