"""`evaluate.py` where it cannot do what is asked: one line, exit code 2, and nothing touched."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from evaluate import main
from tests.evaluation.test_evaluate import NO_SIZES, said, under_torchrun
from tests.trainer.conftest import TINY, write_lists
from trainer import run
from trainer.config import ConfigError, replace
from trainer.evaluation_commands import Finetune
from trainer.evaluator import tunable
from trainer.export import open_run


def test_what_is_no_run_is_refused(refused, trained, tmp_path):
    assert "nowhere: no such folder" in refused("knn", run=tmp_path / "nowhere")
    assert "holds no run" in refused("linear", run=tmp_path)
    assert "summary.json: is a file; name the run's folder" in refused("knn", run=trained / "summary.json")
    assert "File name too long" in refused("knn", run=tmp_path / ("n" * 300))


def test_what_cannot_drop_paths_is_refused(trained, sample):
    source = open_run(trained)
    resnet = dataclasses.replace(source, config=replace(source.config, arch="resnet18", **NO_SIZES))
    with pytest.raises(ConfigError, match=r"--drop-path 0\.2: torchvision's resnet18 has none; use 0"):
        tunable(Finetune(run=trained, data=sample, drop_path=0.2), resnet)
    assert tunable(Finetune(run=trained, data=sample), resnet).feature_dim == 512


def test_a_result_that_could_not_be_written_is_told_before_the_work(refused, trained, monkeypatch):
    (trained / "eval").mkdir(exist_ok=True)
    assert f"{'n' * 252}.json cannot be written: File name too long" in refused("knn", "--name", "n" * 252)

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert f"{trained / 'eval' / 'knn.json'} cannot be written: Read-only file system" in refused("knn")


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
