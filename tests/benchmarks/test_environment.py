"""The facts that go with every number: JSON-ready, and silent where git is not there."""

import json
import os
import re

import pytest
import torch

from benchmarks import environment


def test_facts_are_json_and_name_the_hardware():
    facts = json.loads(json.dumps(environment.environment(torch.device("cpu"))))
    assert facts["hardware"] == f"{facts['cpu']} {facts['cores']} cores"
    assert facts["gpu"] is None
    assert torch.__version__.startswith(facts["versions"]["torch"].partition("+")[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", environment.now())


def test_outside_of_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.commit() == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert environment.commit() == {"commit": None, "dirty": None}


def test_results_do_not_make_the_code_dirty(monkeypatch):
    asked = []

    def git(*arguments):
        asked.append(arguments)
        return ""

    monkeypatch.setattr(environment, "_git", git)
    assert environment.commit()["dirty"] is False
    assert ":!benchmarks/results" in asked[1]


def test_a_shared_machine_is_said():
    assert environment.busy({"busy_cores": 0.1, "cores": 2}) == ""
    assert "others used 1.6 of 2 cores" in environment.busy({"busy_cores": 1.6, "cores": 2})


@pytest.mark.parametrize(("quota", "busy"), [(2, 0.5), (1, 0.25)])
def test_the_load_is_what_other_processes_use_now_of_the_own_cores(quota, busy, monkeypatch):
    ticks = os.sysconf("SC_CLK_TCK")

    def stat(own, others):
        numbers = "{} 0 0 900 900 0 0 0 0 0"
        lines = ["cpu", *(f"cpu{core}" for core in range(3))]
        used = [own + others, own, 0, others]
        return (
            "".join(f"{line} {numbers.format(int(n * ticks))}\n" for line, n in zip(lines, used, strict=True))
            + "intr 5\n"
        )

    told = iter([stat(own=5.0, others=70.0), stat(own=5.5, others=71.0)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(environment.Path, "read_text", lambda file: next(told))
    monkeypatch.setattr(environment.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(environment, "usable_cores", lambda: quota)
    assert environment._busy_cores() == busy
