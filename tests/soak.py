"""A run that is hit by one fault after another until time is up; its trace must be that of an undisturbed run.

    python -m tests.soak [--minutes 10] [--ranks 1 2 4] [--seed 0]

Prints the table of faults, how often each struck, and what became of the run. Takes longer on a machine that is too
slow for each fault to strike once. Where the system lets nobody mount a small file system to fill, the disk is never
full, which is said.
"""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from dali_pipes.synthetic import generate
from tests.trainer.conftest import ROOT, command, lives, rank_processes
from trainer import checkpoint
from trainer.metrics import read_metrics

SAVE_EVERY = 5
# Gradients of more than DDP's first bucket of 1 MiB: with one bucket the order of summation could not change.
FLAGS = f"--no-knn --moco-mlp-dim 384 --epochs 1000 --save-every {SAVE_EVERY} --timeout 60".split()
PATIENCE = 300.0  # seconds for anything to happen, on a busy machine

REQUEUED = "step finished, saved, `preempted`; the same command goes on"
PASSED_OVER = "named at the start and passed over; goes on from the one before"
OUTCOMES = {
    "SIGTERM": REQUEUED,
    "SIGINT": REQUEUED,
    "kill -9 of one rank": "torchrun starts all ranks again; they go on from the newest checkpoint",
    "kill -9 of torchrun": "the ranks notice, finish the step and save, `preempted`; the same command goes on",
    "kill -9 of everything": "the same command goes on from the newest checkpoint",
    "disk full": "said once a save, training goes on; saved again when there is room",
    "newest checkpoint cut off": PASSED_OVER,
    "newest checkpoint with a bit flipped": PASSED_OVER,
}
# The signals to torchrun after which nothing may be lost.
ASKED_BY = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "kill -9 of torchrun": signal.SIGKILL}


class Struck(NamedTuple):
    """A fault that the run got over, and how many steps it took twice."""

    fault: str
    ranks: int
    repeated: int


class Wrong(Exception):
    """What the run should have done, and did not."""


class Run:
    """A training under torchrun that may be started again and again."""

    def __init__(self, data: Path, out: Path, ranks: int) -> None:
        self.out, self.ranks, self._data = out, ranks, data
        self._log = data.with_name(f"{out.name}.log")  # not on the disk that is filled
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> None:
        line = command(
            *FLAGS, "--data", self._data, "--out", self.out, *flags,
            ranks=self.ranks, torchrun=("--standalone", "--max-restarts=1"),
        )  # fmt: skip
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def starts(self) -> list[int]:
        """The step that each start went on from."""
        return [int(step) for step in re.findall(r", step (\d+) of \d+", self.said())]

    def step(self) -> int:
        rows = read_metrics(self.out) if self.out.exists() else []
        return rows[-1]["step"] if rows else 0

    def status(self) -> str:
        return json.loads((self.out / "status.json").read_text())["status"]

    def until(self, happened: Callable[[], bool], what: str, alive: bool = True) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if alive and self.process.poll() is not None:
                raise Wrong(f"ended with exit code {self.process.returncode} instead of: {what}")
            if time.monotonic() > deadline:
                raise Wrong(f"not within {PATIENCE:.0f} s: {what}")
            time.sleep(0.05)

    def finish(self, steps: int) -> None:
        self.start("--max-steps", str(steps))
        self.until(lambda: self.process.poll() is not None, f"the end at step {steps}", alive=False)
        if self.process.returncode or self.status() != "finished":
            raise Wrong(f"exit code {self.process.returncode}, {self.status()} instead of finished")

    def ask_to_stop(self, number: signal.Signals) -> None:
        """Send a signal to torchrun, which hands on what it can, and see the run saved and ended in time."""
        ranks, asked = rank_processes(self.process), time.monotonic()
        self.process.send_signal(number)
        self.process.wait(PATIENCE)
        self.until(lambda: not any(map(lives, ranks)), f"the end of the ranks after {number.name}", alive=False)
        if time.monotonic() - asked > 25:
            raise Wrong(f"{time.monotonic() - asked:.0f} s from {number.name} to the end; torchrun kills after 30")
        if self.status() != "preempted":
            raise Wrong(f"{self.status()} instead of preempted after {number.name}")
        if checkpoint.newest(self.out)[0] != self.out / f"checkpoint_{self.step():08d}.pt":
            raise Wrong(f"no checkpoint of step {self.step()}, which {number.name} ended")

    def kill(self) -> None:
        """SIGKILL to everything that is there, torchrun first, or it would start the others again."""
        if self._process is None:
            return
        ranks = rank_processes(self._process) if self._process.poll() is None else []
        self._process.kill()
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        self._process.wait()
        self.until(lambda: not any(map(lives, ranks)), "the end of ranks that were killed", alive=False)


def strike(fault: str, run: Run, chance: random.Random, disk: Path | None) -> Struck:
    """Let the run get past two checkpoints and some, hit it, and see it go on."""
    target = run.step() + 2 * SAVE_EVERY + chance.randint(1, 15)
    run.until(lambda: run.step() >= target, f"step {target}")
    time.sleep(chance.uniform(0, 0.3))  # anywhere in a step, or in the writing of a checkpoint
    starts = len(run.starts())
    if fault == "disk full":
        assert disk is not None
        _fill(run, disk)
        return Struck(fault, run.ranks, 0)
    asked = ASKED_BY.get(fault)
    if asked is not None:
        run.ask_to_stop(asked)
        reached = run.step()
    elif fault == "kill -9 of one rank":
        victim = chance.choice(rank_processes(run.process))
        reached = run.step()
        os.kill(victim, signal.SIGKILL)
    else:
        run.kill()
        reached = run.step()
    damaged = _damage(run.out, fault, chance) if fault.startswith("newest checkpoint") else None
    if run.process.poll() is not None:
        run.start()
    run.until(lambda: len(run.starts()) > starts, "a new start")
    resumed = run.starts()[-1]
    run.until(lambda: run.step() > reached + 1, f"more than the {reached} steps from before")
    if damaged is not None and not re.search(rf"warning: checkpoint \S*{damaged} cannot be read", run.said()):
        raise Wrong(f"the damaged {damaged} was not named")
    if asked is not None and resumed != reached:
        raise Wrong(f"went on from step {resumed}, not from {reached}, where {fault} ended it")
    return Struck(fault, run.ranks, max(0, reached - resumed))


def _damage(out: Path, fault: str, chance: random.Random) -> str:
    file = max(out.glob("checkpoint_*.pt"))
    content = bytearray(file.read_bytes())
    if fault.endswith("flipped"):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    else:
        del content[chance.randrange(len(content)) :]
    file.write_bytes(content)
    return file.name


def _fill(run: Run, disk: Path) -> None:
    failed = "could not be written: "
    before, filler = run.said().count(failed), disk / "filler"
    with open(filler, "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(1 << 16))
        except OSError:
            pass
    try:
        run.until(lambda: run.said().count(failed) > before, "a warning that the disk is full")
    finally:
        filler.unlink()
    saved = run.step()
    run.until(lambda: max(map(checkpoint._step_of, run.out.glob("*.pt"))) > saved, "a save after the disk was full")


def soak_on(
    ranks: int, seconds: float, least: int, faults: Iterator[str], data: Path, runs: Path, chance: random.Random,
    disk: Path | None,
) -> list[Struck]:  # fmt: skip
    """Disturb a run for so long, at least so often; raise `Wrong` unless it ends as an undisturbed one."""
    until = time.monotonic() + seconds
    struck: list[Struck] = []
    run, whole = Run(data, runs / f"disturbed{ranks}", ranks), Run(data, runs / f"undisturbed{ranks}", ranks)
    try:
        run.start()
        while time.monotonic() < until or len(struck) < least:
            fault = next(faults)
            struck.append(strike(fault, run, chance, disk))
            print(f"{ranks} ranks, step {run.step()}: {fault}, {struck[-1].repeated} steps repeated", flush=True)
        run.ask_to_stop(signal.SIGTERM)
        steps = run.step() + SAVE_EVERY
        run.finish(steps)
        whole.finish(steps)
    except Wrong as wrong:
        raise Wrong(f"{ranks} ranks: {wrong}\n{run.said()[-6000:]}") from None
    finally:
        run.kill()
        whole.kill()
    _compare(run, whole, steps)
    print(f"{ranks} ranks: {steps} steps, {len(struck)} faults: trace and weights identical, bit for bit", flush=True)
    return struck


def _compare(run: Run, whole: Run, steps: int) -> None:
    """Each step once, each loss and the last weights equal to the last bit."""
    rows, expected = ([(row["step"], row["loss"]) for row in read_metrics(r.out)] for r in (run, whole))
    if [step for step, _ in expected] != list(range(1, steps + 1)):
        raise Wrong(f"{whole.out} has not each of {steps} steps once")
    if rows != expected:
        raise Wrong(f"{run.ranks} ranks: the losses differ: {sorted(set(rows) ^ set(expected))[:4]} …")
    ours, theirs = (checkpoint.load(r.out / f"checkpoint_{steps:08d}.pt")["model"] for r in (run, whole))
    unequal = [name for name, weight in theirs.items() if not torch.equal(ours[name], weight)]
    if unequal:
        raise Wrong(f"{run.ranks} ranks: weights differ: {', '.join(unequal)}")


def table(struck: list[Struck]) -> str:
    """Faults, times on each number of ranks, and outcomes, in Markdown."""
    counts = sorted({s.ranks for s in struck})
    lines = [f"| fault | times on {' / '.join(map(str, counts))} ranks | outcome | steps repeated, at most |"]
    lines.append("|---|---|---|---|")
    for fault in OUTCOMES:
        times = [sum(s.fault == fault and s.ranks == count for s in struck) for count in counts]
        worst = max((str(s.repeated) for s in struck if s.fault == fault), key=int, default="-")
        outcome = OUTCOMES[fault] if any(times) else "not tried"
        lines.append(f"| {fault} | {' / '.join(map(str, times))} | {outcome} | {worst} |")
    return "\n".join(lines)


def _dealt(faults: list[str], chance: random.Random) -> Iterator[str]:
    """The faults in random order, again and again, each as often as the others."""
    for _ in itertools.count():
        yield from chance.sample(faults, len(faults))


def soak(minutes: float = 10, ranks: tuple[int, ...] = (1, 2, 4), seed: int = 0, disk: Path | None = None) -> None:
    """Disturb a small run at random points and compare it with an undisturbed one.

    Args:
        minutes: for all numbers of ranks together, roughly.
        ranks: numbers of ranks to run on.
        seed: of the faults and their moments.
        disk: a small file system to run on and to fill; by default one is mounted.
    """
    with tempfile.TemporaryDirectory(prefix="moco-v3-soak-") as name:
        folder = Path(name)
        if disk is None and not subprocess.run(_mounting(folder, "true"), capture_output=True).returncode:
            again = ["-m", "tests.soak", "--minutes", minutes, "--seed", seed, "--disk", folder, "--ranks", *ranks]
            sys.exit(subprocess.run(_mounting(folder, sys.executable, *again)).returncode)
        faults = list(OUTCOMES)
        if disk is None:
            faults.remove("disk full")
            print("this system lets nobody mount a file system of their own: the disk will not be full")
        generate(folder / "data", seed=0, train_per_class=16, val_per_class=1)
        chance = random.Random(seed)
        dealt, least = _dealt(faults, chance), -(-len(faults) // len(ranks))
        share = minutes * 60 / len(ranks) * 0.65  # the rest is for the undisturbed run
        struck: list[Struck] = []
        try:
            for count in ranks:
                struck += soak_on(count, share, least, dealt, folder / "data", disk or folder, chance, disk)
        except Wrong as wrong:
            sys.exit(f"soak: error: {wrong}")
        print(table(struck))


def _mounting(folder: Path, *command: object) -> list[str]:
    script = 'mount -t tmpfs -o size=128m tmpfs "$0" && exec "$@"'
    return ["unshare", "-Urm", "sh", "-c", script, str(folder), *map(str, command)]


if __name__ == "__main__":
    tyro.cli(soak)
