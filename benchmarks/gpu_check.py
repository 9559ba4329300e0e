"""Does everything run on this machine's GPU, and how fast, in one command and one file?

    python -m benchmarks.gpu_check [--out DIR]

Runs the GPU tests, 200 steps of training on generated JPEGs, the equality table with the decoder, and short forms of
the benchmarks, each as a process of its own: one that fails or hangs leaves the others alone. Uses this Python as it
stands. Exit code 0: all passed; 1: a part failed or found no time; 2: wrong use.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.environment import ROOT, environment, now
from benchmarks.generated import FOLDER, generated
from trainer.config import ConfigError
from trainer.distributed import World, choose_device
from trainer.metrics import read_metrics

TAIL = 4000  # characters of output that are kept of a part
PRESETS = {"vit_small": "vit-s-300ep", "vit_base": "vit-b-300ep", "resnet50": "r50-100ep"}


@dataclass(frozen=True)
class GpuCheck:
    """Run everything that needs a GPU, in short."""

    out: Path = Path("benchmarks/results")
    """Folder of the JSON."""
    minutes: float = 9.0
    """Parts that have not begun by then are left out; what runs is ended."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: only to see whether the check itself works."""
    images: int = 256
    """Generated JPEGs."""


@dataclass(frozen=True)
class Part:
    """One process, what it may take, and what it left to look at."""

    name: str
    arguments: Sequence[str]  # of this Python
    seconds: float  # at most
    findings: Callable[[str], dict[str, Any]]  # from its output; raises ValueError where it did not do its job


@dataclass(frozen=True)
class Outcome:
    """What came of a part; `reason` says why it is not ok."""

    name: str
    command: str
    ok: bool
    seconds: float
    reason: str = ""
    findings: dict[str, Any] = field(default_factory=dict)
    output: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    flags = tyro.cli(GpuCheck, prog="python -m benchmarks.gpu_check", args=argv)
    try:
        device = choose_device(flags.device, World())
        flags.out.mkdir(parents=True, exist_ok=True)
    except (ConfigError, OSError) as error:
        print(f"benchmarks.gpu_check: error: {error}", file=sys.stderr)
        return 2
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    deadline = time.monotonic() + 60 * flags.minutes
    started, env = now(), environment(device)
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = []
        for part in parts(flags, Path(scratch)):
            outcome = _run(part, deadline)
            outcomes.append(outcome)
            console.print(f"{'ok  ' if outcome.ok else 'FAIL'} {part.name}: {outcome.seconds:.0f} s {outcome.reason}")
    record = {"schema": 1, "created": started, "environment": env, "parts": [asdict(o) for o in outcomes]}
    hardware = re.sub(r"[^a-z0-9]+", "_", env["hardware"].lower())
    file = flags.out / f"gpu_check-{hardware}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    failed = [o.name for o in outcomes if not o.ok]
    print(f"{file}: " + (f"{len(failed)} of {len(outcomes)} failed: {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


def parts(flags: GpuCheck, scratch: Path) -> list[Part]:
    """Everything to run, what matters most first."""
    cpu = flags.device == "cpu"
    where = ["--device", flags.device, "--images", str(flags.images)]
    quick = ["--quick", *where]
    small = ["--batch-size", "2", "--image-size", "32"] if cpu else []
    # The trainer takes a folder as the user has it; made here, so that its own part does not pay for it.
    tree = generated(FOLDER, flags.images).tree
    steps = 10 if cpu else 200
    training = ["train_ddp.py", "demo" if cpu else "vit-s-300ep", "--data", str(tree), "--out", str(scratch / "run")]
    training += ["--device", flags.device, "--batch-size", "16" if cpu else "64", "--max-steps", str(steps), "--no-knn"]
    # A schedule that gets to work within so few steps.
    training += ["--epochs", "100", "--warmup-epochs", "5"]
    equality = ["-m", "dali_pipes.equality", "--data", str(ROOT / "tests" / "photos"), "--device", flags.device]
    equality += ["--draws", "24", "--sizes", *(["32"] if cpu else ["224", "96", "32"])]
    equality += ["--json", str(scratch / "equality.json")]
    found = [
        Part("doctor", ["-m", "benchmarks.doctor"], 30, lambda output: {"lines": output.splitlines()}),
        Part("GPU tests", ["-m", "pytest", "-m", "gpu", "-rf"], 240, passed),
        Part("equality", equality, 60, partial(_result, scratch, "equality")),
        Part(f"{steps} training steps", training, 150, partial(trained, scratch / "run", steps)),
    ]
    for arch, preset in PRESETS.items():
        arguments = ["-m", "benchmarks.step", "--preset", preset, *small, *quick, "--out", str(scratch)]
        found.append(Part(f"step {arch}", arguments, 120, partial(_result, scratch, f"step-{arch}*")))
    for name in ("loader", "ablation"):
        arguments = ["-m", f"benchmarks.{name}", *quick, "--out", str(scratch)]
        found.append(Part(name, arguments, 90, partial(_result, scratch, f"{name}*")))
    # Last: it compiles each model once more, from the cache that the steps above left.
    for arch, preset in PRESETS.items():
        out = scratch / f"variants_{arch}"
        arguments = ["-m", "benchmarks.variants", "--presets", preset, *small, *quick, "--out", str(out)]
        arguments += ["--compile", "off"] if cpu else []
        found.append(Part(f"variants {arch}", arguments, 120, partial(_result, out, "variants*")))
    return found


def passed(output: str) -> dict[str, Any]:
    """Counts of pytest's last line.

    Raises:
        ValueError: no test ran, or one did not pass.
    """
    lines = output.strip().splitlines()
    counts = {
        kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1] if lines else "")
    }
    if not counts.get("passed"):
        raise ValueError(f"no GPU test ran: {lines[-1] if lines else 'no output'}")
    if counts.keys() & {"failed", "error", "errors"}:
        raise ValueError(lines[-1])
    return counts


def trained(run: Path, steps: int, output: str) -> dict[str, Any]:
    """First and last loss and the rate at the end of a run.

    Raises:
        ValueError: it stopped early, or a loss is not finite.
    """
    rows = read_metrics(run)
    if not rows or rows[-1]["step"] != steps:
        raise ValueError(f"{rows[-1]['step'] if rows else 0} of {steps} steps were logged")
    if not all(math.isfinite(row["loss"]) for row in rows):
        raise ValueError("a loss is not finite")
    return {
        "loss_first": rows[0]["loss"],
        "loss_last": rows[-1]["loss"],
        "images_per_second": rows[-1]["images_per_second"],
        "data_wait": rows[-1]["data_wait"],
    }


def _result(folder: Path, pattern: str, output: str) -> dict[str, Any]:
    files = sorted(folder.glob(f"{pattern}.json"))
    if not files:
        raise ValueError("it wrote no result")
    return dict(json.loads(files[-1].read_text()))


def _run(part: Part, deadline: float) -> Outcome:
    command = " ".join(["python", *part.arguments])
    limit = min(part.seconds, deadline - time.monotonic())
    if limit <= 0:
        return Outcome(part.name, command, ok=False, seconds=0.0, reason="not run: the time was over")
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *part.arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that worker processes end with it
    )
    try:
        output, _ = process.communicate(timeout=limit)
        reason = "" if process.returncode == 0 else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        reason = f"ended after {limit:.0f} s"
    seconds, findings = round(time.monotonic() - started, 1), {}
    try:
        findings = part.findings(output)
    except ValueError as error:
        reason = f"{reason}; {error}" if reason else str(error)
    return Outcome(part.name, command, not reason, seconds, reason, findings, output[-TAIL:])


if __name__ == "__main__":
    torch.set_num_threads(1)  # this process only waits
    sys.exit(main())
