"""What the trainer's tests share: generated images, and the real command, in this process or under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dali_pipes import DatasetIndex
from dali_pipes.synthetic import generate
from trainer import run
from trainer.judgement import Judge
from trainer.metrics import read_metrics

ROOT = Path(__file__).parents[2]

TINY = (
    "demo --device cpu --image-size 32 --embed-dim 32 --depth 1 --num-heads 2 --moco-dim 16 --moco-mlp-dim 32 "
    "--lr 1e-3 --moco-m 0.99 --epochs 3 --warmup-epochs 1 --batch-size 16 --log-every 1 --workers 1"
).split()


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A folder with train/ (50 images) and val/ (20), ten classes."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    generate(folder, seed=0, train_per_class=5, val_per_class=2)
    return folder


def write_lists(data, folder):
    """The images of `data` as train.txt and val.txt in a folder, which name them outside of it."""
    for part in ("train", "val"):
        index = DatasetIndex.scan(data / part)
        lines = [f"{path} {label}\n" for path, label in zip(index.paths, index.labels.tolist(), strict=True)]
        (folder / f"{part}.txt").write_text("".join(lines))


@pytest.fixture
def train(sample, tmp_path):
    """Run a tiny training in this process: `code = train("--flag", …)`; data and out are set unless named."""

    def call(*flags, out="run"):
        chosen = [str(flag) for flag in flags]
        if "--data" not in chosen:
            chosen += ["--data", str(sample)]
        return run([*TINY, "--out", str(tmp_path / out), *chosen])

    return call


@pytest.fixture
def losses(tmp_path):
    """Loss of each step of a run: `losses("run")`."""

    def read(out="run"):
        return {row["step"]: row["loss"] for row in read_metrics(tmp_path / out)}

    return read


@pytest.fixture
def judging_stopped_at(monkeypatch):
    """`with judging_stopped_at(step):` a SIGTERM comes as soon as the features of that step are judged."""

    @contextmanager
    def call(step):
        measure = Judge._measure

        def signalled(judge, bank, queries):
            if judge.engine.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return measure(judge, bank, queries)

        with monkeypatch.context() as patch:
            patch.setattr(Judge, "_measure", signalled)
            yield

    return call


def status(out):
    """What stands in a run's status.json."""
    return json.loads((out / "status.json").read_text())


def command(*flags, ranks=None, torchrun=("--standalone",), script=ROOT / "train_ddp.py"):
    """The command line of `train_ddp.py`, or a script in its place, under torchrun if `ranks` is given."""
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", *torchrun, f"--nproc-per-node={ranks}"]
    return [*launcher, str(script), *TINY, *map(str, flags)]


@pytest.fixture
def start():
    """Start it as a process of its own, as a user would: `start("--flag", …, ranks=2)`; none outlives the test."""
    started = []

    def call(*flags, **launch):
        process = subprocess.Popen(
            command(*flags, **launch),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},  # for scripts elsewhere
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        with suppress(ProcessLookupError):  # ranks outlive a torchrun that was killed
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_row(file, process, rows=2, seconds=120):
    """Wait until a run has written so many rows of metrics."""
    deadline = time.monotonic() + seconds
    while not file.exists() or len(file.read_text().splitlines()) < rows:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no metrics in time"
        time.sleep(0.05)


def rank_processes(torchrun):
    """Process ids of the ranks that a torchrun process has started, in the order of the ranks."""
    pids = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids}
    ranks = {pid: int(value[5:]) for pid, values in environments.items() for value in values if value[:5] == b"RANK="}
    return sorted(ranks, key=ranks.__getitem__)


def lives(pid):
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def refused(train, tmp_path, capsys):
    """Check that a command is refused with a line and leaves no trace; returns the line."""

    def call(*flags, out="run"):
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        assert train(*flags, out=out) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert errors[0].startswith("train_ddp.py: error: ")
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
        return errors[0]

    return call
