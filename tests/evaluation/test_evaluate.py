"""`evaluate.py`: the same k-NN accuracy as the run's own, the probe alone and under torchrun, wrong use in one line."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from timm.layers import DropPath

from evaluate import main
from tests.dali_pipes.odd_files import broken_inside
from tests.trainer.conftest import write_lists
from trainer.config import replace
from trainer.evaluation_commands import Finetune
from trainer.evaluator import tunable
from trainer.export import open_run

ROOT = Path(__file__).parents[2]
TUNE = "finetune --epochs 2 --warmup-epochs 1 --batch-size 16 --device cpu --workers 1".split()
NO_SIZES = {"embed_dim": None, "depth": None, "num_heads": None}
PROBE = "linear --epochs 3 --batch-size 16 --lr 0.1 3 30 --device cpu --workers 1".split()


def under_torchrun(*flags, ranks=2):
    # Without "--" torchrun takes --run for its own --run-path (argparse of Python 3.11).
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--"]
    command = [*launcher, str(ROOT / "evaluate.py"), *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def said(process):
    """What the command printed; torchrun adds its own traceback."""
    return process.stdout + process.stderr.split("torch.distributed.elastic")[0].split("torch/distributed")[0]


def test_knn_is_the_accuracy_that_the_run_itself_found(evaluate, trained):
    summary = json.loads((trained / "summary.json").read_text())
    found = evaluate("knn", "--device", "cpu", "--workers", 1, name="knn")
    assert found["accuracy"] == summary["knn_after"]
    assert (found["kind"], found["step"], found["ranks"]) == ("knn", 9, 1)
    assert found["images"] == {"train": 51, "val": 19, "classes": 10}
    before = evaluate("knn", "--untrained", "--device", "cpu", "--workers", 1, name="knn-untrained")
    assert (before["accuracy"], before["step"]) == (summary["knn_before"], 0)


def test_k_and_temperature_reach_the_vote(evaluate, monkeypatch):
    seen = []

    def accuracy(*_, k, temperature):
        seen.append((k, temperature))
        return 0.5

    monkeypatch.setattr("evaluation.knn.accuracy", accuracy)
    found = evaluate("knn", "--k", 3, "--temperature", 0.5, "--device", "cpu", "--name", "three", name="three")
    assert seen == [(3, 0.5)]
    assert (found["accuracy"], found["flags"]["k"], found["flags"]["temperature"]) == (0.5, 3, 0.5)


def test_the_probe_under_torchrun_is_the_probe_alone(evaluate, trained, sample, capsys):
    alone = evaluate(*PROBE, name="linear")
    printed = capsys.readouterr().out
    assert [each["lr"] for each in alone["outcomes"]] == [0.1, 3.0, 30.0]
    assert all(each["last"]["epoch"] == 3 for each in alone["outcomes"])
    assert all(each["best"]["top1"] >= each["last"]["top1"] for each in alone["outcomes"])
    assert "epoch 3/3" in printed
    assert "lr 30 " in printed
    # An even number of images, so that both train on the same ones: with ranks an odd one sits an epoch out.
    even = trained.parent / "even"
    shutil.copytree(sample, even)
    next((even / "train").rglob("more*")).unlink()
    assert main([*PROBE, "--run", str(trained), "--data", str(even), "--name", "alone"]) == 0
    alone = json.loads((trained / "eval" / "alone.json").read_text())
    process = under_torchrun(*PROBE, "--run", trained, "--data", even, "--name", "ranks")
    assert process.returncode == 0, process.stderr
    together = json.loads((trained / "eval" / "ranks.json").read_text())
    assert together["ranks"] == 2
    assert together["images"]["val"] == 19
    for mine, theirs in zip(alone["outcomes"], together["outcomes"], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert abs(theirs["last"]["top1"] - mine["last"]["top1"]) < 1.01 / 19  # one image may sit on the fence
    assert process.stdout.count("epoch 3/3") == 1


def test_fine_tuning_starts_from_the_run_and_repeats_itself(evaluate, trained, sample, capsys):
    found = evaluate(*TUNE, name="finetune")
    assert "epoch 2/2  top-1" in capsys.readouterr().out
    assert found["outcome"]["last"]["epoch"] == 2
    assert (found["flags"]["layer_decay"], found["step"]) == (0.65, 9)
    assert evaluate(*TUNE, "--name", "again", name="again")["outcome"] == found["outcome"]
    untrained = evaluate(*TUNE, "--untrained", name="finetune-untrained")
    assert untrained["outcome"]["loss"] != found["outcome"]["loss"]
    deeper = open_run(trained)
    deeper = dataclasses.replace(deeper, config=replace(deeper.config, depth=3))
    network = tunable(Finetune(run=trained, data=sample, drop_path=0.2), deeper).module
    assert max(part.drop_prob for part in network.modules() if isinstance(part, DropPath)) == pytest.approx(0.2)


@pytest.mark.slow
def test_fine_tuning_under_torchrun(trained, sample):
    process = under_torchrun(*TUNE, "--run", trained, "--data", sample, "--name", "tuned-ranks")
    assert process.returncode == 0, process.stderr
    found = json.loads((trained / "eval" / "tuned-ranks.json").read_text())
    assert (found["ranks"], found["images"]["val"]) == (2, 19)
    assert process.stdout.count("epoch 2/2") == 1


def test_a_result_that_cannot_be_written_in_the_end_is_printed(trained, sample, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluate.write_atomically", full)
    flags = ["--run", str(trained), "--data", str(sample), "--device", "cpu", "--name", "full"]
    assert main(["knn", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.err.endswith("full.json cannot be written: No space left on device; the result stands above\n")
    assert "accuracy" in json.loads(printed.out[printed.out.index("{\n") :])


def test_a_checkpoint_that_went_while_the_images_were_looked_at(trained, sample, monkeypatch):
    opened = []

    def opening(folder):
        run = open_run(folder)
        opened.append(run.file)
        return dataclasses.replace(run, file=folder / "gone.pt") if len(opened) == 1 else run

    monkeypatch.setattr("evaluate.open_run", opening)
    flags = ["--run", str(trained), "--data", str(sample), "--device", "cpu", "--name", "later"]
    assert main(["knn", *flags]) == 0
    assert len(opened) == 2


def test_the_same_images_by_another_path(evaluate, trained, sample, tmp_path):
    evaluate("knn", "--device", "cpu", "--name", "path", name="path")
    (tmp_path / "link").symlink_to(sample)
    flags = ["knn", "--device", "cpu", "--name", "path", "--run", str(trained)]
    assert main([*flags, "--data", str(tmp_path / "link")]) == 0


@pytest.fixture
def broken(sample, tmp_path):
    """The sample with images, so many in train/ and in val/, whose damage a scan does not look for."""

    def call(train, val):
        data = tmp_path / "broken"
        shutil.copytree(sample, data)
        files = [*sorted((data / "train").rglob("*.jpg"))[:train], *sorted((data / "val").rglob("*.jpg"))[:val]]
        for seed, file in enumerate(files):
            file.write_bytes(broken_inside(seed))
        return data, files

    return call


def test_images_broken_inside_are_left_out(trained, broken, capsys):
    data, files = broken(train=2, val=1)
    (data / "val" / "empty.jpg").write_bytes(b"")
    flags = ["--run", str(trained), "--data", str(data), "--device", "cpu", "--workers", "1"]
    for command in ("knn", "linear --epochs 2 --batch-size 16 --lr 1", "finetune --epochs 1 --warmup-epochs 0 -b 16"):
        assert main([*command.split(), *flags, "--name", "broken"]) == 0
        found = json.loads((trained / "eval" / "broken.json").read_text())
        printed = capsys.readouterr().out
        for file in files:
            assert sum(str(file) in line for line in found["failed"]) == 1
            assert printed.count(f"warning: {file}: ") == 1
        assert len(found["failed"]) == 3
        assert found["set_aside"] == [
            f"{data / 'val' / 'empty.jpg'}: lies beside the class folders and so is of no class; move it into one"
        ]


def test_too_little_memory_is_one_line(trained, sample, monkeypatch, capsys):
    def too_much(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("trainer.evaluator.Evaluator.evaluate", too_much)
    mends = {"knn": "the features of all images have to fit", "linear -b 16": "use a smaller --batch-size"}
    for kind, mend in mends.items():
        assert (
            main([*kind.split(), "--run", str(trained), "--data", str(sample), "--device", "cpu", "--name", "none"])
            == 2
        )
        assert capsys.readouterr().err == f"evaluate.py: error: cpu is out of memory; {mend}\n"


def test_too_many_broken_images_are_one_line(trained, broken, monkeypatch, capsys):
    data, _ = broken(train=0, val=11)
    assert main(["knn", "--run", str(trained), "--data", str(data), "--device", "cpu", "--name", "many"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "11 images that passed the scan cannot be used, and at most 10 may fail" in line
    assert not (trained / "eval" / "many.json").exists()
    # A run that may do without as many is evaluated without as many.
    source = open_run(trained)
    lenient = dataclasses.replace(source, config=replace(source.config, max_failed=11))
    monkeypatch.setattr("evaluate.open_run", lambda folder: lenient)
    assert main(["knn", "--run", str(trained), "--data", str(data), "--device", "cpu", "--name", "many"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["knn", "linear --epochs 1 --batch-size 16 --lr 1"])
def test_too_many_broken_images_are_one_line_under_torchrun(command, trained, broken):
    data, _ = broken(train=24, val=0)  # of 51: more than ten on one of two ranks at least
    process = under_torchrun(*command.split(), "--run", trained, "--data", data, "--device", "cpu", "--name", "none")
    assert process.returncode != 0
    printed = said(process)
    assert printed.count("evaluate.py: error: ") == 1, printed
    assert "11 images that passed the scan cannot be used" in printed
    assert "Traceback" not in printed


def test_lists_are_evaluated_as_the_folders_are(trained, sample, evaluate, tmp_path, refused):
    write_lists(sample, tmp_path)
    folders = evaluate("knn", "--device", "cpu", "--name", "folders", name="folders")
    train, val = tmp_path / "train.txt", tmp_path / "val.txt"
    flags = ["knn", "--run", str(trained), "--device", "cpu", "--name", "lists", "--data", str(train), "--outside"]
    assert main(flags) == 0
    found = json.loads((trained / "eval" / "lists.json").read_text())
    assert (found["accuracy"], found["images"]) == (folders["accuracy"], folders["images"])
    assert "--outside" in refused("knn", data=train)
    # Of numbers the queries need not have all.
    val.write_text("".join(line for line in val.open() if not line.endswith(" 9\n")))
    assert main(flags) == 0
    val.write_text(val.read_text().replace(" 8\n", " 10\n"))
    assert "class 10 is in val and not in train" in refused("knn", "--outside", data=train)
    assert "evaluation needs a list train.txt, with val.txt beside it" in refused("knn", data=val)
    val.unlink()
    assert "evaluation needs a list train.txt, with val.txt beside it" in refused("knn", data=train)
