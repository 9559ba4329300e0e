"""Does everything run on this machine's GPU, and how fast, in one command and one file?

    python -m benchmarks.gpu_check [--out DIR] [--only "GPU tests: training" "step resnet50" …]

Runs the GPU tests, 200 steps of training on generated JPEGs, the equality table with the decoder, and short forms of
the benchmarks, each as a process of its own: one that fails or hangs leaves the others alone, and the file holds what
is done so far. Uses this Python as it stands. Exit code 0: all passed; 1: a part failed, or the file could not be
written; 2: wrong use; 3: none failed, but for some the time was over.

Where the GPU is lent for minutes, `--only` spreads the parts over several calls: the file keeps those of earlier calls
as long as code, versions and kind of machine are the same.
"""

import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.environment import ROOT, environment, now
from benchmarks.generated import FOLDER, first, generated
from dali_pipes import DatasetError, DatasetIndex
from dali_pipes.replacing import write_atomically
from trainer.config import ConfigError
from trainer.distributed import World, choose_device
from trainer.metrics import read_metrics

TAIL = 12000  # characters of output that are kept of a part
ROOMS = ("benchmarks", "dali_pipes", "evaluation", "model", "tests", "trainer")
TRAINING = {"cuda": (200, 64), "cpu": (10, 16)}  # steps, batch
IMAGES = "images"  # what the training reads, in the scratch folder
FREE = ("busy_cores", "commit", "dirty", "os", "memory_gb", "cpu", "driver")  # facts in which calls may differ
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
    only: tuple[str, ...] = ()
    """Names of parts to run; none: all. Others stay in the file if code and kind of machine are the same."""


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
    created: str  # UTC, ISO 8601
    ok: bool
    seconds: float
    reason: str = ""
    late: bool = False  # the time was over, before it began or before it was done
    findings: dict[str, Any] = field(default_factory=dict)
    output: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    flags = tyro.cli(GpuCheck, prog="python -m benchmarks.gpu_check", args=argv)
    deadline = time.monotonic() + 60 * flags.minutes
    try:
        device = choose_device(flags.device, World())
        names = [part.name for part in parts(flags, Path())]
        if unknown := set(flags.only) - set(names):
            raise ConfigError(f"--only {min(unknown)!r}: one of {', '.join(names)}")
        if flags.images < 1:
            raise ConfigError(f"--images {flags.images} is too small; use 1 or more")
        flags.out.mkdir(parents=True, exist_ok=True)
        images = generated(FOLDER, flags.images)  # here, so that no part pays for it
    except (ConfigError, DatasetError, OSError) as error:
        print(f"benchmarks.gpu_check: error: {error}", file=sys.stderr)
        return 2
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    env = environment(device)
    hardware = re.sub(r"[^a-z0-9]+", "_", env["hardware"].lower())
    file = flags.out / f"gpu_check-{hardware}.json"
    digest = code_digest()
    records = earlier(file, env, digest) if flags.only else {}
    if file.exists() and not records:
        kept = file.with_suffix(f".{time.strftime('%Y%m%d-%H%M%S', time.localtime(file.stat().st_mtime))}.json.old")
        try:
            file.rename(kept)
        except OSError as error:
            print(
                f"benchmarks.gpu_check: error: --out {flags.out} cannot be written: {error.strerror}", file=sys.stderr
            )
            return 2
        console.print(f"what was in {file.name} is in {kept.name}: it is replaced, or of other code or another machine")
    unwritten = ""
    with tempfile.TemporaryDirectory() as scratch:
        _link(images, math.prod(TRAINING[flags.device]), Path(scratch, IMAGES))
        outcomes = []
        for part in parts(flags, Path(scratch)):
            if part.name not in (flags.only or names):
                continue
            outcome = _run(part, deadline)
            outcomes.append(outcome)
            console.print(f"{'ok  ' if outcome.ok else 'FAIL'} {part.name}: {outcome.seconds:.0f} s {outcome.reason}")
            if not outcome.late or part.name not in records:
                records[part.name] = {**asdict(outcome), "machine": {name: env[name] for name in FREE}}
            done = [records[name] for name in names if name in records]
            record = {"schema": 2, "environment": env, "code": digest, "parts": done}
            # Each time: whoever lends the GPU may end this, too.
            try:
                write_atomically(file, (json.dumps(record, indent=1) + "\n").encode())
                unwritten = ""
            except OSError as error:
                unwritten = f"the file could not be written: {error.strerror}"
    late = [o.name for o in outcomes if o.late]
    failed = [o.name for o in outcomes if not o.ok and not o.late]
    verdict = [f"{len(failed)} of {len(outcomes)} failed: {', '.join(failed)}"] if failed else []
    verdict += [f"the time was over for {', '.join(late)}; run them with --only"] if late else []
    verdict += [unwritten] if unwritten else []
    print(f"{file}: " + ("; ".join(verdict) or "all passed"))
    return 1 if failed or unwritten else 3 if late else 0


def code_digest() -> str:
    """Of all Python files of this checkout, 16 hexadecimal digits; a lent machine may have no git to ask."""
    digest = hashlib.sha256()
    for file in sorted([*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def earlier(file: Path, env: dict[str, Any], digest: str) -> dict[str, dict[str, Any]]:
    """The parts of a file by their names; none if it is of another kind of machine, other versions or other code."""
    free = {name: env[name] for name in FREE}
    try:
        record = json.loads(file.read_text())
        if {**record["environment"], **free} != env or record["code"] != digest:
            return {}
        return {part["name"]: part for part in record["parts"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def parts(flags: GpuCheck, scratch: Path) -> list[Part]:
    """Everything to run, what matters most first."""
    cpu = flags.device == "cpu"
    where = ["--device", flags.device, "--images", str(flags.images)]
    quick = ["--quick", *where]
    small = ["--batch-size", "2", "--image-size", "32"] if cpu else []
    # One epoch, so that what is timed is not the checkpoints; ten rows, to see it learn.
    steps, batch = TRAINING[flags.device]
    training = ["train_ddp.py", "demo" if cpu else "vit-s-300ep", "--data", str(scratch / IMAGES)]
    training += ["--out", str(scratch / "run"), "--device", flags.device, "--batch-size", str(batch), "--no-knn"]
    training += ["--epochs", "1", "--warmup-epochs", "0", "--log-every", str(steps // 10)]
    equality = ["-m", "dali_pipes.equality", "--data", str(ROOT / "tests" / "photos"), "--device", flags.device]
    equality += ["--draws", "24", "--sizes", *(["32"] if cpu else ["224", "96", "32"])]
    equality += ["--json", str(scratch / "equality.json")]
    # One that hangs is named: the line of a test begins with it, and its stacks are printed.
    pytest = ["-m", "pytest", "-m", "gpu", "-vv", "-rf", "--durations=10", "-o", "faulthandler_timeout=60"]
    pixels = ["tests/gpu/test_views.py", "tests/gpu/test_fused.py"]
    others = ["tests/gpu", *(f"--ignore={file}" for file in pixels)]

    def step(arch: str) -> Part:
        arguments = ["-m", "benchmarks.step", "--preset", PRESETS[arch], *small, *quick, "--out", str(scratch)]
        return Part(f"step {arch}", arguments, 200, partial(_result, scratch, f"step-{arch}*"))

    def variants(arch: str) -> Part:
        out = scratch / f"variants_{arch}"
        arguments = ["-m", "benchmarks.variants", "--presets", PRESETS[arch], *small, *quick, "--out", str(out)]
        arguments += ["--compile", "off"] if cpu else []
        return Part(f"variants {arch}", arguments, 300, partial(_result, out, "variants*"))

    def short(name: str) -> Part:
        arguments = ["-m", f"benchmarks.{name}", *quick, "--out", str(scratch)]
        return Part(name, arguments, 240, partial(_result, scratch, f"{name}*"))

    vit_small, *larger = PRESETS
    return [
        Part("doctor", ["-m", "benchmarks.doctor"], 30, lambda output: {"lines": output.splitlines()}),
        Part("GPU tests: views", [*pytest, *pixels], 300, passed),
        Part("equality", equality, 120, partial(_result, scratch, "equality")),
        Part(f"{steps} training steps", training, 180, partial(trained, scratch / "run", steps)),
        step(vit_small),
        short("loader"),
        short("ablation"),
        Part("GPU tests: training", [*pytest, *others], 480, passed),
        *map(step, larger),
        # Last: each compiles its model several times over.
        *map(variants, PRESETS),
    ]


def _link(index: DatasetIndex, count: int, folder: Path) -> None:
    """A folder of `count` links to the images, over and over: the trainer takes a folder, as the user has it."""
    folder.mkdir()
    for i, path in enumerate(first(index, count).paths):
        (folder / f"{i:06d}{Path(path).suffix}").symlink_to(Path(path).absolute())


def passed(output: str) -> dict[str, Any]:
    """Counts of pytest's summary.

    Raises:
        ValueError: no test ran, or one did not pass.
    """
    lines = output.strip().splitlines() or ["no output"]
    # Libraries print after it, when the process ends.
    summary = next((line for line in reversed(lines) if re.search(r"\d+ \w+.* in [\d.]+s", line)), "")
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", summary)}
    if not summary:
        verdicts = re.findall(r" (PASSED|FAILED|ERROR)\b", output)
        so_far = ", ".join(f"{verdicts.count(kind)} {kind.lower()}" for kind in dict.fromkeys(verdicts))
        raise ValueError(f"not all GPU tests ran ({so_far or 'none'}): {lines[-1]}")
    if counts.keys() & {"failed", "error", "errors"}:
        raise ValueError(summary)
    if not counts.get("passed"):
        raise ValueError(f"no GPU test ran: {summary}")
    return counts


def trained(run: Path, steps: int, output: str) -> dict[str, Any]:
    """The losses that a run began and ended with, means over a quarter of it, and the rate at its end.

    Raises:
        ValueError: it stopped early, a loss or a gradient is not finite, or it learned nothing.
    """
    rows = read_metrics(run)
    if not rows or rows[-1]["step"] != steps:
        raise ValueError(f"{rows[-1]['step'] if rows else 0} of {steps} steps were logged")
    if any(row["loss"] is None for row in rows) or any(row.get("bad_steps") for row in rows):
        raise ValueError("a loss or a gradient is not finite")
    quarter = -(-len(rows) // 4)
    at_first, at_last = (statistics.fmean(row["loss"] for row in part) for part in (rows[:quarter], rows[-quarter:]))
    if at_last >= at_first:
        raise ValueError(f"it learned nothing: loss {at_first:.4f} at first, {at_last:.4f} at last")
    return {
        "loss_first": at_first,
        "loss_last": at_last,
        "images_per_second": rows[-1]["images_per_second"],
        "data_wait": rows[-1]["data_wait"],
    }


def _result(folder: Path, pattern: str, output: str) -> dict[str, Any]:
    files = sorted(folder.glob(f"{pattern}.json"))
    if not files:
        raise ValueError("it wrote no result")
    return dict(json.loads(files[-1].read_text()))


def _run(part: Part, deadline: float) -> Outcome:
    command, created = " ".join(["python", *part.arguments]), now()
    limit = min(part.seconds, deadline - time.monotonic())
    if limit <= 0:
        return Outcome(part.name, command, created, False, 0.0, "not run: the time was over", late=True)
    started, reason, late = time.monotonic(), "", False
    # A file, no pipe, which a process that outlives the part would hold open.
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # what a part printed before it was ended is not lost
        )
        try:
            if code := process.wait(timeout=limit):
                reason = f"exit code {code}"
        except subprocess.TimeoutExpired:
            for each in list(_family(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            process.wait()
            late = limit < part.seconds
            reason = f"ended after {limit:.0f} s" + (": the time was over" if late else "")
        output = os.pread(printed.fileno(), os.fstat(printed.fileno()).st_size, 0).decode(errors="replace")
    seconds, findings = round(time.monotonic() - started, 1), {}
    try:
        findings = part.findings(output)
    except Exception as error:  # of what a part left behind: whatever it is, the other parts are to run
        reason = "; ".join(filter(None, (reason, str(error) or type(error).__name__)))
    return Outcome(part.name, command, created, not reason, seconds, reason, late, findings, output[-TAIL:])


def _family(process: int) -> Iterator[int]:
    """A process and all that it started, also those in sessions of their own, as torchrun's under test."""
    yield process
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            for child in file.read_text().split():
                yield from _family(int(child))


if __name__ == "__main__":
    torch.set_num_threads(1)  # this process only waits
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
