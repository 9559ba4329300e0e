"""The check of a GPU machine: what counts as passed, and that one part never takes the others with it."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tyro

from benchmarks import ablation, gpu_check, loader, results, step, variants
from benchmarks.gpu_check import GpuCheck, Part, parts, passed, trained


def part(code, seconds=30.0, findings=lambda output: {"said": output.strip()}):
    return Part("part", ["-c", code], seconds, findings)


def outcome(*arguments, deadline=60.0, **options):
    return gpu_check._run(part(*arguments, **options), time.monotonic() + deadline)


def test_a_part_that_works():
    found = outcome("print('hello')")
    assert found.ok
    assert found.findings == {"said": "hello"}


def test_a_part_that_fails_says_how_and_what_it_printed():
    found = outcome("import sys; print('why'); sys.exit(3)")
    assert not found.ok
    assert found.reason == "exit code 3"
    assert "why" in found.output


def test_a_part_that_did_not_do_its_job():
    def refuse(output):
        raise ValueError("it wrote no result")

    assert outcome("pass", findings=refuse).reason == "it wrote no result"
    assert outcome("pass", findings=lambda output: next(iter(()))).reason == "StopIteration"


def test_a_part_that_hangs_is_ended_with_its_children():
    code = (
        "import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'], "
        "start_new_session=True)"
    )
    started = time.monotonic()
    found = outcome(code, seconds=1.0)
    assert not found.ok
    assert found.reason.startswith("ended after 1 s")
    assert "begun" in found.output
    assert time.monotonic() - started < 20


def test_after_the_deadline_nothing_begins_and_what_runs_is_ended():
    late = outcome("print(1)", deadline=-1.0)
    assert late.reason == "not run: the time was over"
    ended = outcome("import time; time.sleep(60)", deadline=0.5)
    assert ended.reason == "ended after 0 s: the time was over"
    assert late.late
    assert ended.late
    assert not outcome("import time; time.sleep(60)", seconds=0.5).late


@pytest.mark.parametrize(
    ("last", "counts"),
    [("5 passed in 2.1s", {"passed": 5}), ("5 passed, 2 skipped, 9 deselected in 1s", {"passed": 5, "skipped": 2})],
)
@pytest.mark.parametrize("after", ["", "[rank0]:[W123] destroy_process_group() was not called\n"])
def test_what_counts_as_passed(last, counts, after):
    assert passed(f"...\n=== {last} ===\n{after}") == counts


def test_tests_that_were_cut_off_are_counted():
    lines = [
        f"tests/gpu/test_a.py::test_{i} {verdict} [ 1%]" for i, verdict in enumerate(["PASSED", "PASSED", "FAILED"])
    ]
    with pytest.raises(ValueError, match=r"not all GPU tests ran \(2 passed, 1 failed\): tests/gpu/test_b"):
        passed("\n".join([*lines, "tests/gpu/test_b.py::test_hangs "]))


@pytest.mark.parametrize(
    "last", ["3 skipped in 0.1s", "419 deselected in 5s", "no tests ran in 0.1s", "1 failed, 4 passed in 3s", ""]
)
def test_what_does_not(last):
    with pytest.raises(ValueError, match=r"ran|failed"):
        passed(last)


def write_metrics(folder, losses):
    rows = [{"step": i + 1, "loss": loss, "images_per_second": 7.0, "data_wait": 0.1} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_training_is_judged_by_its_rows(tmp_path):
    write_metrics(tmp_path, [3.0, 2.0])
    assert trained(tmp_path, 2, "")["loss_last"] == 2.0
    with pytest.raises(ValueError, match="2 of 3 steps"):
        trained(tmp_path, 3, "")
    write_metrics(tmp_path, [2.0, 2.5])
    with pytest.raises(ValueError, match="learned nothing"):
        trained(tmp_path, 2, "")
    write_metrics(tmp_path, [3.0, None])  # as JSON has it
    with pytest.raises(ValueError, match="not finite"):
        trained(tmp_path, 2, "")


def test_the_parts_are_all_there():
    found = {p.name: p for p in parts(GpuCheck(), Path("scratch"))}
    benchmarks = [f"{kind} {arch}" for arch in gpu_check.PRESETS for kind in ("step", "variants")]
    benchmarks += ["loader", "ablation"]
    others = {"doctor", "GPU tests: views", "GPU tests: training", "equality", "200 training steps"}
    assert found.keys() == {*benchmarks, *others}
    # Each part's result is looked for where the part writes it.
    for name in benchmarks:
        findings, arguments = found[name].findings, found[name].arguments
        assert isinstance(findings, partial)
        assert arguments[arguments.index("--out") + 1] == str(findings.args[0])


@pytest.mark.slow
def test_every_gpu_test_is_in_one_part():
    commands = [p.arguments for p in parts(GpuCheck(), Path("scratch")) if p.name.startswith("GPU tests")]
    collected = []
    for command in commands:
        done = subprocess.run([sys.executable, *command, "--collect-only", "-qqq"], capture_output=True, text=True)
        collected += [line for line in done.stdout.splitlines() if "::" in line]
    whole = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q"]
    expected = subprocess.run(whole, capture_output=True, text=True).stdout.splitlines()
    assert sorted(collected) == sorted(line for line in expected if "::" in line)


def test_every_part_takes_its_flags():
    modules = {"loader": loader.Loader, "ablation": ablation.Ablation, "step": step.Step, "variants": variants.Variants}
    for device in ("cuda", "cpu"):
        for p in parts(GpuCheck(device=device), Path("scratch")):
            name = p.arguments[1].removeprefix("benchmarks.")
            if name in modules:
                flags: Any = tyro.cli(modules[name], args=p.arguments[2:], config=(tyro.conf.OmitArgPrefixes,))
                assert flags.common.quick


def test_without_a_gpu_it_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_part_that_is_not_there_is_told_before_anything_is_made(capsys, tmp_path):
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path / "out"), "--only", "loader", "steps"]) == 2
    error = capsys.readouterr().err
    assert "--only 'steps': one of doctor, " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def call_with(monkeypatch, tmp_path, names, only=(), code="print(1)"):
    """`main` with parts that only print; returns what its file says, by name."""
    code += "; import time; time.sleep(0.1)"
    chosen = [Part(name, ["-c", code], 30.0, lambda output: {"said": output.strip()}) for name in names]
    monkeypatch.setattr(gpu_check, "parts", lambda flags, scratch: chosen)
    flags = ["--device", "cpu", "--images", "1", "--out", str(tmp_path)]
    gpu_check.main([*flags, *(["--only", *only] if only else [])])
    (file,) = tmp_path.glob("gpu_check-*.json")
    return {part["name"]: part["findings"]["said"] for part in json.loads(file.read_text())["parts"]}


def test_calls_for_some_parts_share_one_file(monkeypatch, tmp_path):
    machine = {"hardware": "GPU", **dict.fromkeys(gpu_check.FREE, "a")}
    monkeypatch.setattr(gpu_check, "_link", lambda *arguments: None)
    monkeypatch.setattr(gpu_check, "generated", lambda *arguments: None)
    monkeypatch.setattr(gpu_check, "environment", lambda device: {**machine, "busy_cores": 0.1})
    call = partial(call_with, monkeypatch, tmp_path, ["doctor", "loader", "step"])
    assert call(only=["loader"]) == {"loader": "1"}
    monkeypatch.setattr(gpu_check, "environment", lambda device: {**machine, "busy_cores": 0.3, "os": "b"})
    found = call(only=["doctor", "loader"], code="print(2)")
    assert found == {"doctor": "2", "loader": "2"}
    assert list(call(only=["step"], code="print(3)").items()) == [("doctor", "2"), ("loader", "2"), ("step", "3")]
    assert call(code="print(4)") == {"doctor": "4", "loader": "4", "step": "4"}
    # What finds no time leaves what is known.
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "-1", "--only", "step"]) == 3
    assert call(only=["doctor"]) == {"doctor": "1", "loader": "4", "step": "4"}
    # Of other code nothing is kept.
    monkeypatch.setattr(gpu_check, "code_digest", lambda: "other")
    assert call(only=["step"]) == {"step": "1"}
    *_, old = sorted(tmp_path.glob("gpu_check-gpu.*.json.old"))
    assert "loader" in old.read_text()


def test_a_disk_that_is_full_ends_no_part(monkeypatch, tmp_path, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_check, "_link", lambda *arguments: None)
    monkeypatch.setattr(gpu_check, "generated", lambda *arguments: None)
    monkeypatch.setattr(gpu_check, "write_atomically", full)
    chosen = [Part(name, ["-c", "pass"], 30.0, lambda output: {}) for name in ("doctor", "loader")]
    monkeypatch.setattr(gpu_check, "parts", lambda flags, scratch: chosen)
    assert gpu_check.main(["--device", "cpu", "--images", "1", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "ok   doctor" in told.err
    assert "ok   loader" in told.err
    assert "the file could not be written: No space left on device" in told.out


def test_a_benchmark_is_judged_by_the_file_it_wrote(result, tmp_path):
    with pytest.raises(ValueError, match="no result"):
        gpu_check._result(tmp_path, "loader*", "")
    results.write(result(quick=True), tmp_path)
    assert gpu_check._result(tmp_path, "loader*", "")["benchmark"] == "loader"
