"""Wrong use of every command but train_ddp.py (tests/trainer): one line that says what is wrong, code 2, no trace."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with what commands could be given by mistake."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("not an image\n")
    (tmp_path / "norun").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"flags": {}, "fingerprint": "0"}))
    (tmp_path / "broken" / "checkpoint_00000001.pt").write_bytes(b"PK\3\4 of nothing")
    monkeypatch.chdir(tmp_path)
    return tmp_path


CASES = [
    ("evaluate.py", "knn --run nowhere --data empty", "--run nowhere: no such folder"),
    ("evaluate.py", "knn --run norun --data empty", "holds no run"),
    ("evaluate.py", "linear --run broken --data empty", "checkpoint_00000001.pt cannot be read"),
    ("evaluate.py", "knn --run broken --data empty --k 0", "--k 0"),
    ("evaluate.py", "linear --run broken --data empty --lr -1", "--lr -1"),
    ("evaluate.py", "finetune --run broken --data empty --epochs 0", "--epochs 0"),
    ("evaluate.py", "finetune --run broken --data empty --layer-decay 2", "--layer-decay 2"),
    ("trainer.export", "--run nowhere --out a.safetensors", "--run nowhere: no such folder"),
    ("trainer.export", "--run broken --out a.safetensors", "checkpoint_00000001.pt cannot be read"),
    ("dali_pipes.preview", "--data nowhere --out views.png", "nowhere"),
    ("dali_pipes.preview", "--data empty --out views.png", "empty"),
    ("dali_pipes.equality", "--data nowhere", "nowhere"),
    ("dali_pipes.equality", "--data empty", "empty"),
    ("dali_pipes.equality", f"--data {ROOT}/tests/photos --json nowhere/a.json", "nowhere/a.json"),
    ("dali_pipes.synthetic", "--out text", "text"),
    ("benchmarks.loader", "--device cpu --data nowhere", "nowhere"),
    ("benchmarks.loader", "--device cpu --batch-size 0", "--batch-size"),
    ("benchmarks.loader", "--device cpu --out text", "--out text"),
    ("benchmarks.communication", "--json nowhere/a.json", "--json nowhere/a.json"),
    ("benchmarks.step", "--device cpu --preset nonsense", "nonsense"),
    ("benchmarks.step", f"--device cpu --data {ROOT}/tests/photos --trace empty", "empty"),
    ("benchmarks.ablation", "--device cpu --data empty", "empty"),
    ("benchmarks.ablation", "--device cpu --augment dali fused", "--augment fused"),
    ("benchmarks.variants", "--device cpu --presets nonsense", "nonsense"),
    ("benchmarks.variants", "--device cpu --presets", "--presets"),
    ("benchmarks.parity", "--device cpu --steps 0", "--steps"),
    ("benchmarks.microbatch", "--device cpu --chunks 0", "--chunks"),
    ("benchmarks.communication", "--preset nonsense", "nonsense"),
    ("benchmarks.coverage", "--device cpu --reruns 0", "--reruns"),
    ("benchmarks.coverage", "--device cpu --seconds nan", "--seconds"),
    ("benchmarks.report", "--results nowhere", "nowhere"),
    ("benchmarks.report", "--compare text text", "text"),
    ("benchmarks.gpu_check", "--device cpu --out text", "text"),
    ("benchmarks.gpu_check", "--device cpu --images 0", "--images 0"),
]


def start(command):
    if command.endswith(".py"):
        runpy.run_path(str(ROOT / command), run_name="__main__")
    else:
        runpy.run_module(command, run_name="__main__")


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # it is run within this process
@pytest.mark.parametrize(("command", "flags", "said"), CASES, ids=lambda value: str(value).replace(" ", "_"))
def test_is_refused_in_a_line(command, flags, said, place, monkeypatch, capsys):
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    monkeypatch.setattr(sys, "argv", [command, *flags.split()])
    with pytest.raises(SystemExit) as ended:
        start(command)
    printed, errors = capsys.readouterr()
    assert ended.value.code == 2, printed + errors
    assert said in errors
    assert "Traceback" not in errors
    if "─" not in errors:  # tyro frames what it does not understand
        assert len([line for line in errors.splitlines() if "rror" in line]) == 1
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before
