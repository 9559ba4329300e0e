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
from tests.trainer.conftest import TINY, write_lists
from trainer import run
from trainer.config import ConfigError, replace
from trainer.evaluation_commands import Finetune
from trainer.evaluator import tunable
from trainer.export import open_run

ROOT = Path(__file__).parents[2]
TUNE = "finetune --epochs 2 --warmup-epochs 1 --batch-size 16 --device cpu --workers 1".split()
NO_SIZES = {"embed_dim": None, "depth": None, "num_heads": None}
PROBE = "linear --epochs 3 --batch-size 16 --lr 0.1 3 30 --device cpu --workers 1".split()


@pytest.fixture
def evaluate(trained, sample):
    """Evaluate the run in this process; returns the JSON of that name."""

    def call(*flags, name):
        assert main([*map(str, flags), "--run", str(trained), "--data", str(sample)]) == 0
        return json.loads((trained / "eval" / f"{name}.json").read_text())

    return call


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


def test_what_cannot_drop_paths_is_refused(trained, sample):
    source = open_run(trained)
    resnet = dataclasses.replace(source, config=replace(source.config, arch="resnet18", **NO_SIZES))
    with pytest.raises(ConfigError, match=r"--drop-path 0\.2: torchvision's resnet18 has none; use 0"):
        tunable(Finetune(run=trained, data=sample, drop_path=0.2), resnet)
    assert tunable(Finetune(run=trained, data=sample), resnet).feature_dim == 512


@pytest.fixture
def refused(trained, sample, tmp_path, capsys):
    """Check that a command is refused with one line and leaves no result; returns the line."""

    def call(*flags, run=trained, data=sample):
        before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
        assert main([*map(str, flags), "--run", str(run), "--data", str(data), "--device", "cpu"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("evaluate.py: error: ")
        assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == before
        return line

    return call


def test_what_is_no_run_is_refused(refused, trained, tmp_path):
    assert "nowhere: no such folder" in refused("knn", run=tmp_path / "nowhere")
    assert "holds no run" in refused("linear", run=tmp_path)
    assert "summary.json: is a file; name the run's folder" in refused("knn", run=trained / "summary.json")
    assert "File name too long" in refused("knn", run=tmp_path / ("n" * 300))


def test_a_result_that_could_not_be_written_is_told_before_the_work(refused, trained, monkeypatch):
    (trained / "eval").mkdir(exist_ok=True)
    assert f"{'n' * 252}.json cannot be written: File name too long" in refused("knn", "--name", "n" * 252)

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert f"{trained / 'eval' / 'knn.json'} cannot be written: Read-only file system" in refused("knn")


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


def test_a_result_of_other_images_is_not_replaced(evaluate, refused, trained, sample, tmp_path, monkeypatch):
    found = evaluate("knn", "--k", 5, "--device", "cpu", "--name", "kept", name="kept")
    shutil.copytree(sample, tmp_path / "other")
    line = refused("knn", "--name", "kept", data=tmp_path / "other")
    assert f"kept.json is of --data {sample}; give this one another --name" in line
    assert evaluate("knn", "--k", 5, "--device", "cpu", "--name", "kept", name="kept")["accuracy"] == found["accuracy"]
    # Whatever the place from which the images are named.
    monkeypatch.chdir(sample.parent)
    flags = ["knn", "--run", str(trained), "--device", "cpu", "--name", "kept", "--data"]
    assert main([*flags, sample.name]) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").rename(tmp_path / sample.name)
    assert f"kept.json is of --data {sample}" in refused("knn", "--name", "kept", data=sample.name)
    assert main([*flags, str(sample)]) == 0


def test_the_same_images_by_another_path(evaluate, trained, sample, tmp_path):
    evaluate("knn", "--device", "cpu", "--name", "path", name="path")
    (tmp_path / "link").symlink_to(sample)
    flags = ["knn", "--device", "cpu", "--name", "path", "--run", str(trained)]
    assert main([*flags, "--data", str(tmp_path / "link")]) == 0


def test_two_at_a_time_do_not_make_the_same_result(evaluate, refused, trained, monkeypatch):
    """The second begins while the first is at its vote."""
    said = []

    def accuracy(*_, **__):
        said.append(refused("knn", "--name", "once"))
        return 0.5

    monkeypatch.setattr("evaluation.knn.accuracy", accuracy)
    evaluate("knn", "--device", "cpu", "--name", "once", name="once")
    assert f"{trained / 'eval' / 'once.json'} is being made by another process" in said[0]


def test_more_than_the_images_that_there_are(refused, sample):
    said = f"--batch-size 52, but {sample / 'train'} has 51 images; use at most 51"
    assert said in refused("linear", "--batch-size", 52)
    assert said in refused("finetune", "--batch-size", 52, "--mixup", 0, "--cutmix", 0)
    assert "use at most 50" in refused("finetune", "--batch-size", 52)  # it mixes pairs


def test_a_torchrun_that_says_half_is_one_line(trained, sample, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main(["knn", "--run", str(trained), "--data", str(sample)]) == 2
    assert capsys.readouterr().err.startswith("evaluate.py: error: RANK is set but LOCAL_RANK")


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


def test_data_that_cannot_be_evaluated_on(refused, sample, tmp_path):
    assert "nowhere: no such folder" in refused("knn", data=tmp_path / "nowhere")
    assert "has no train/" in refused("knn", data=sample / "train")
    shutil.copytree(sample, tmp_path / "data")
    first, *others = sorted((tmp_path / "data" / "val").iterdir())
    first.rename(first.with_name("zebra"))
    assert f"class {first.name} is in train and not in val" in refused("linear", data=tmp_path / "data")
    shutil.rmtree(first.with_name("zebra"))
    for each in others[1:]:
        shutil.rmtree(each)
    for each in sorted((tmp_path / "data" / "train").iterdir()):
        if each.name != others[0].name:
            shutil.rmtree(each)
    assert "has 1 classes" in refused("knn", data=tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val")
    assert "has no val/" in refused("knn", data=tmp_path / "data")


def test_images_without_labels_are_judged_by_nobody(refused, sample, tmp_path, capsys):
    """Where all are of class 0, the accuracy would be the share of what is taken for class 0."""
    data, lists = tmp_path / "data", tmp_path / "lists"
    shutil.copytree(sample, data)
    for file in sorted((data / "val").rglob("*.jpg")):
        file.rename(data / "val" / file.name)
    assert "val/ has no class folders" in refused("knn", data=data)
    lists.mkdir()
    write_lists(sample, lists)
    (lists / "val.txt").write_text("".join(f"{line.split()[0]}\n" for line in (lists / "val.txt").open()))
    assert "val.txt has no labels" in refused("linear", "--outside", data=lists / "train.txt")
    assert run([*TINY, "--data", str(data), "--out", str(tmp_path / "run"), "--max-steps", "1"]) == 0
    assert "no k-NN accuracy: training and validation images do not have the same classes" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["knn_after"] is None


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("knn --k 0", "--k 0 is not"),
        ("knn --temperature -1", "--temperature -1.0 is not"),
        ("knn --workers 0", "--workers 0 is not"),
        ("knn --name ../knn", "--name ../knn is not"),
        ("linear --lr 3 0", "--lr 0.0 is not"),
        ("linear --lr inf", "--lr inf is not"),
        ("linear --epochs 0", "--epochs 0 is not"),
        ("linear --batch-size -8", "--batch-size -8 is not"),
        ("linear --momentum -0.1", "--momentum -0.1 is not"),
        ("linear --seed -1", "--seed -1 is not"),
        ("finetune --layer-decay 0", "--layer-decay 0.0 is not above 0 and at most 1"),
        ("finetune --drop-path 1", "--drop-path 1.0 is not at least 0 and below 1"),
        ("finetune --label-smoothing 1", "--label-smoothing 1.0 is not"),
        ("finetune --epochs 3", "--warmup-epochs 5 is not between 0 and --epochs 3"),
        ("finetune --mixup -1", "--mixup -1.0 is not"),
        ("finetune -b 15", "--batch-size 15 is 15 images a rank, and --mixup and --cutmix mix pairs; use 16"),
        ("finetune --seed 4294967296", "--seed 4294967296 is not between 0 and 4294967295"),
    ],
)
def test_values_that_cannot_work(flags, message, refused):
    assert message in refused(*flags.split())


def test_an_unknown_kind_of_evaluation_exits_with_2(capsys):
    assert main(["segmentation"]) == 2
    assert "segmentation" in "".join(capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "line"),
    [("linear --batch-size 17", "--batch-size 17 is"), ("linear --epochs many", "many"), ("knn --k -3", "--k -3 is")],
)
def test_under_torchrun_the_line_is_printed_once(flags, line, trained, sample):
    process = under_torchrun(*flags.split(), "--run", trained, "--data", sample, "--device", "cpu")
    assert process.returncode != 0
    printed = said(process)
    assert printed.count(line) == 1, printed
    assert "Traceback" not in printed
