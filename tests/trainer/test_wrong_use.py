"""Bad input: one line that says what, which value and how to mend it, exit code 2, and nothing touched."""

import errno
import json
import os

import pytest
import torch

from model import MoCoV3
from tests.trainer.conftest import TINY
from trainer import config as configuration
from trainer import distributed, preparation
from trainer.metrics import Display, MetricsLog


def test_missing_data_folder(refused, tmp_path):
    assert str(tmp_path / "nowhere") in refused("--data", tmp_path / "nowhere")


def test_empty_data_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused("--data", tmp_path / "empty")


def test_folder_without_an_image(refused, tmp_path):
    (tmp_path / "texts" / "train" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "train" / "a" / "b.jpg").write_text("no image")
    assert str(tmp_path / "texts") in refused("--data", tmp_path / "texts")


def test_batch_larger_than_the_dataset(refused):
    assert "--batch-size 64, but" in refused("--batch-size", 64)


@pytest.mark.parametrize(("ranks", "mend"), [(4, "use at most 48"), (64, "too few for 64 ranks")])
def test_batch_larger_than_the_dataset_of_several_ranks(ranks, mend, sample, tmp_path):
    argv = [*TINY, "--data", str(sample), "--out", str(tmp_path / "run"), "--batch-size", "64"]
    with pytest.raises(configuration.ConfigError, match=f"--batch-size 64, but .* has 50 images; {mend}$"):
        preparation.prepare(argv, distributed.World(size=ranks, local_size=ranks, torchrun=True), Display(False))


def test_unknown_architecture_suggests_the_nearest(refused):
    line = refused("--arch", "vit_smal")
    assert "vit_smal" in line
    assert "vit_small" in line


def test_image_size_that_the_patches_do_not_divide(refused):
    line = refused("--image-size", 40)
    assert "40" in line
    assert "16" in line


def test_cuda_without_a_gpu(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "_driver_without_torch", lambda: None)
    assert "--device cuda, but this machine has no CUDA GPU; use --device cpu" in refused("--device", "cuda")


def test_tf32_where_there_is_none(refused):
    assert "--amp tf32: cpu has none" in refused("--device", "cpu", "--amp", "tf32")


def test_bf16_where_a_gpu_only_emulates_it(monkeypatch):
    config = configuration.parse(["demo", "--data", "data", "--out", "out", "--amp", "bf16"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(configuration.ConfigError, match=r"--amp bf16: cuda:0 has none, .*; use --amp fp16"):
        preparation.resolve(config, torch.device("cuda", 0), print)
    with pytest.raises(configuration.ConfigError, match=r"--amp bf16: cuda:0 has none, .*; use --amp fp16"):
        preparation.resolve(config, torch.device("cuda", 0), print, {"amp": "fp16"})
    config = configuration.replace(config, amp="auto", compile="off", augment="dali")
    with pytest.raises(configuration.ConfigError, match=r"--amp bf16: cuda:0 has none, .*; the run in --out out began"):
        preparation.resolve(config, torch.device("cuda", 0), print, {"amp": "bf16"})
    assert preparation.resolve(config, torch.device("cuda", 0), print).run.amp == "fp16"
    assert preparation.resolve(config, torch.device("cpu"), print, {"amp": "bf16"}).run.amp == "bf16"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_not_passed_over(device, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "470.57.02")
    line = refused("--device", device)
    assert "driver 470.57.02 has 2 GPU(s)" in line
    assert f"CUDA {torch.version.cuda}" in line


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = distributed.World(rank=0, local_rank=0, size=4, local_size=4, torchrun=True)
    with pytest.raises(ValueError, match="--nproc-per-node 4, but this machine has 2 GPUs"):
        distributed.choose_device("auto", world)


@pytest.mark.parametrize(("arch", "size", "own"), [("convnext_atto", 16, 224), ("crossvit_9_240", 224, 240)])
def test_an_architecture_that_cannot_read_images_of_that_size(refused, arch, size, own):
    sizes = ["--embed-dim", "None", "--depth", "None", "--num-heads", "None"]
    line = refused("--arch", arch, *sizes, "--image-size", size)
    assert f"--arch {arch} does not take --image-size {size}" in line
    assert line.endswith(f"; try {own}")


def test_a_disk_that_fails_is_named(train, monkeypatch, capsys):
    def failing(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/train/a.jpg")

    monkeypatch.setattr("trainer.preparation.training_tree", failing)
    assert train() == 1
    assert capsys.readouterr().err == "train_ddp.py: error: [Errno 5] Input/output error: '/data/train/a.jpg'\n"


def test_resume_of_a_missing_or_another_runs_checkpoint(train, refused, tmp_path, capsys):
    assert "nothing.pt is not there" in refused("--resume", tmp_path / "nothing.pt")
    assert train("--no-knn", "--max-steps", 1, "--seed", 3, out="other") == 0
    capsys.readouterr()
    own = tmp_path / "other" / "checkpoint_00000001.pt"
    assert "--seed is 3 there, 0 here" in refused("--resume", own)
    assert "other is a folder; name a checkpoint in it" in refused("--resume", tmp_path / "other")
    content = bytearray(own.read_bytes())
    content[len(content) // 2] ^= 1
    own.write_bytes(content)
    assert "damaged, its checksum does not match" in refused("--resume", own)


def test_a_run_that_goes_on_by_itself_takes_no_other_start(train, refused, tmp_path, capsys):
    assert train("--no-knn", "--max-steps", 2, "--save-every", 1, "--keep", 0) == 0
    first = tmp_path / "run" / "checkpoint_00000001.pt"
    capsys.readouterr()
    line = refused("--no-knn", "--resume", first)
    assert "began without one and goes on from its own newest checkpoint; leave --resume out" in line
    flags = ["--no-knn", "--resume", first]
    assert train(*flags, "--max-steps", 3, out="new") == 0
    assert train(*flags, "--max-steps", 4, out="new") == 0  # as a scheduler that starts the same command again
    capsys.readouterr()
    other = refused("--no-knn", "--resume", tmp_path / "run" / "checkpoint_00000002.pt", out="new")
    assert f"began from {first}" in other


def test_out_of_memory_says_which_batch_would_fit(train, monkeypatch, capsys):
    encode = MoCoV3.encode

    def limited(self, x1, x2):
        if len(x1) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, x1, x2)

    monkeypatch.setattr(MoCoV3, "encode", limited)
    assert train("--no-knn") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors == ["train_ddp.py: error: --batch-size 16: cpu is out of memory; a step fits with --batch-size 4"]

    # Nothing was learned there yet, so the mend can be followed as it stands.
    assert train("--no-knn", "--batch-size", 4, "--max-steps", 1) == 0


def test_too_little_memory_for_the_images_of_a_batch(train, monkeypatch, capsys):
    def too_large(*args, **kwargs):
        raise RuntimeError("Can't allocate 4096 bytes on device 0.")

    monkeypatch.setattr("dali_pipes.stream.build_pipeline", too_large)
    assert train("--no-knn") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--batch-size 16: cpu has no memory left for a batch's images; use --checkpoint-activations or more" in line
    assert line.endswith("or a smaller --batch-size")


@pytest.mark.parametrize(
    ("flags", "more", "advice"),
    [
        ("--arch vit_small", "--microbatch 2", "--checkpoint-activations or more GPUs"),
        ("", "", "--checkpoint-activations or more GPUs"),
        ("", "--checkpoint-activations", "more GPUs"),
    ],
    ids=["chunks, which were tried", "no chunks", "nothing else"],
)
def test_a_run_that_goes_on_is_told_only_what_it_may_change(flags, more, advice, train, monkeypatch, capsys):
    assert train(*flags.split(), "--no-knn", "--max-steps", 1) == 0
    capsys.readouterr()

    def limited(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MoCoV3, "encode", limited)
    monkeypatch.setattr(MoCoV3, "predict", limited)
    assert train(*flags.split(), *more.split(), "--no-knn") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith(f"--batch-size 16: cpu is out of memory; use {advice}")


def test_rank_without_torchrun(refused, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "RANK is set but LOCAL_RANK" in refused()


@pytest.mark.slow
def test_help_ends_every_rank(start):
    process = start("--help", ranks=2)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert printed.count("usage: train_ddp.py") == 1


def test_without_a_compiler_it_runs_eager_and_says_so(train, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert train("--no-knn", "--max-steps", 1, "--compile", "on") == 0
    assert "no C++ compiler" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(train, monkeypatch, capsys, tmp_path):
    real = os.fsync
    failures: list[int] = []

    def full_at_first(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name.startswith("checkpoint_") and not failures:
            failures.append(descriptor)
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_first)
    code = train("--no-knn")
    printed = capsys.readouterr().out
    assert code == 0
    assert "No space left on device; training goes on" in printed
    assert (tmp_path / "run" / "checkpoint_00000009.pt").exists()


def test_a_full_disk_ends_with_a_line(train, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(MetricsLog, "write", full)
    assert train("--no-knn") == 1
    assert "error: [Errno 28] No space left on device: 'metrics.jsonl'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        (["--batch-size", 17], "--batch-size 17 is not divisible by world size 2"),
        pytest.param(["--epochs", "many"], "many", marks=pytest.mark.slow),
    ],
)
def test_under_torchrun_the_line_is_printed_once(flag, line, start, sample, tmp_path):
    process = start("--data", sample, "--out", tmp_path / "run", *flag, ranks=2)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (printed + errors).count(line) == 1, errors
    assert "Traceback" not in errors.split("torch/distributed")[0]
    assert not (tmp_path / "run").exists()


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_would_run_code_is_named_and_does_not(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, tmp_path / "evil.pth.tar")
    line = refused("--resume", tmp_path / "evil.pth.tar")
    assert "evil.pth.tar" in line
    assert "posix.system" in line
    assert not (tmp_path / "executed").exists()


def test_heads_that_do_not_divide_the_width(refused):
    assert "num_heads" in refused("--num-heads", 3)
