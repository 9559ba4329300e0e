"""examples/slurm.sbatch: queued again when preempted, and only then; srun and scontrol are stand-ins."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from trainer.status import write_status

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm.sbatch"
SCONTROL = 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> "$HERE/requeued"; exit "$REQUEUE"; fi'


@pytest.fixture
def job(tmp_path):
    """Start the script as SLURM would: `job("what srun does")`."""

    def start(srun, requeue=0):
        for name, does in {"srun": f'echo "$@" > "$HERE/srun.txt"\n{srun}', "scontrol": SCONTROL}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
            (tmp_path / name).chmod(0o755)
        (tmp_path / "run").mkdir(exist_ok=True)
        write_status(tmp_path / "new", "preempted", 7)
        slurm = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
        slurm |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": str(tmp_path), "PYTHON": "python"}
        own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": str(tmp_path), "REQUEUE": str(requeue)}
        line = ["bash", str(SCRIPT), "vit-s-300ep", "--batch-size", "4096"]
        return subprocess.Popen(
            line, env={**own, **slurm, "DATA": "my images", "RUN": "run"}, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    (tmp_path / "new").mkdir()
    return start


def says(status):
    """srun ends after the run has written this status."""
    return f"sed s/preempted/{status}/ new/status.json > run/status.json"


def test_it_is_sound_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("srun", "code", "requeued"),
    [
        (says("preempted") + "; exit 1", 0, True),  # torchrun's exit code after a signal
        (says("finished"), 0, False),
        (says("failed") + "; exit 1", 1, False),
        (says("running") + "; exit 137", 137, False),
        ("exit 3", 3, False),  # never started; what an earlier job left does not count
    ],
)
def test_queued_again_only_if_this_job_was_preempted(job, tmp_path, srun, code, requeued):
    (tmp_path / "run").mkdir()
    write_status(tmp_path / "run", "preempted", 3)
    job_process = job(srun)
    job_process.communicate(timeout=20)
    assert job_process.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 12345\n"


def test_a_signal_to_the_script_leaves_srun_alone_and_its_end_is_waited_for(job, tmp_path):
    """srun that gets SIGTERM kills all ranks with -9 (its source, _srun_signal_mgr), while they save."""
    process = job(
        "trap 'touch killed; exit 137' TERM; touch ready; while [ ! -e saved ]; do sleep 0.1; done; "
        + says("preempted")
        + "; exit 1"
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
    (tmp_path / "saved").touch()
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / "requeued").exists()


def test_a_requeue_that_fails_is_said(job):
    process = job(says("preempted"), requeue=1)
    assert "submit the same command again" in process.communicate(timeout=20)[1]
    assert process.returncode == 1


def test_all_nodes_meet_at_the_first(job, tmp_path):
    job(says("finished")).communicate(timeout=20)
    line = (tmp_path / "srun.txt").read_text().strip()
    assert "--nnodes=2 --nproc-per-node=8" in line
    assert "--rdzv-backend=c10d --rdzv-endpoint=node7:22345 --rdzv-id=12345" in line
    assert line.endswith("train_ddp.py vit-s-300ep --batch-size 4096 --data my images --out run")
