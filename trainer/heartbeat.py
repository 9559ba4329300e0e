"""Whether all ranks are alive and move on, and which one is to blame when a step does not end."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch.distributed as dist

from trainer.distributed import World
from trainer.signals import Stopped

_LEFT = "moco_v3/left"
# What a rank does with the steps that it has taken, in this order: it judges them, waits for its batch, takes a step.
_JUDGES, _DATA, _STEP = range(3)
_OF = {_JUDGES: "the features of", _DATA: "the next batch of", _STEP: "the end of the step of"}


class Beat(NamedTuple):
    """What a rank last said of itself."""

    pulse: int
    step: int
    phase: int
    batches: int = 0  # that were judged


class Heartbeat:
    """Each rank says once a second, through torchrun's store, where it is; a step that lasts too long is looked into.

    A collective that times out names the neighbour in its ring at best, and NCCL's names nobody. Here the ranks that
    say nothing any more are to blame, or else those that are behind the others. Only the CPU takes part.
    """

    INTERVAL = 1.0

    def __init__(
        self,
        world: World,
        store: dist.Store | None,
        timeout: int,
        ended: Callable[[str], None],
        lost: Callable[[], None],
    ) -> None:
        """Start saying where this rank is; nothing for a single process.

        Args:
            timeout: seconds after which a step is hung; the process then ends with exit code 1.
            ended: told why, just before, on one rank.
            lost: called once if torchrun, whose store it is, is gone.
        """
        self._world, self._timeout, self._ended, self._lost = world, timeout, ended, lost
        self._where = Beat(0, 0, _DATA)
        self._started: float | None = None  # of the step under way
        self._names: list[str] = []
        self._asked, self._answered = threading.Event(), threading.Event()
        self._snapshots: list[list[Beat]] = []
        self._reporting, self._closing = threading.Lock(), threading.Event()
        # A connection of its own: one that waits for a key holds up all who use it.
        self._store = store.clone() if store is not None else None
        if self._store is not None:
            for target in (self._beat, self._watch):
                threading.Thread(target=target, name="heartbeat", daemon=True).start()

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around a step, from before its batch is there. `step`: those taken so far."""
        self._where, self._started = Beat(0, step, _DATA), time.monotonic()
        yield
        self._started = None  # not after an error: what it was is still to be found out

    @contextmanager
    def judging(self, step: int) -> Iterator[None]:
        """Around the features after so many steps, which may take longer than a step while they go on; see `judged`."""
        self._where, self._started = Beat(0, step, _JUDGES), time.monotonic()
        try:
            yield
        finally:
            self._started = None  # also after an error, which a run outlives
        self._where = Beat(0, step, _DATA)

    def judged(self) -> None:
        """Another batch is there to be judged."""
        self._where = self._where._replace(batches=self._where.batches + 1)
        self._started = time.monotonic()

    def fetched(self) -> None:
        """The batch is there."""
        self._where = self._where._replace(phase=_STEP)

    def close(self) -> None:
        """Stop saying and watching."""
        self._closing.set()

    def leave(self) -> str:
        """Say that this rank ends because of a signal, so that the others do not take it for lost.

        Returns who is lost, of whom torchrun's signal may have told; empty if nobody is, or no one can tell.
        """
        self._ask(lambda store: store.set(f"{_LEFT}/{self._world.rank}", "1"))
        if self._world.size > 1 and (lost := self._lost_ranks()):
            return f"no sign of life from {self._named(lost)}"
        self._ask(lambda store: store.set(_LEFT, "1"))
        return ""

    def report(self, error: str) -> None:
        """End the process because of an error of a collective; one rank says which rank is to blame.

        Raises:
            Stopped: none is: a rank has left because of a signal.
        """
        if self._ask(lambda store: store.check([_LEFT])):
            raise Stopped
        self._end(error)

    def _beat(self) -> None:
        assert self._store is not None
        key, count = f"beat/{self._world.rank}", 0
        try:
            self._store.set(f"who/{self._world.rank}", self._name())
            while not self._closing.is_set():
                count += 1
                self._store.set(key, " ".join(map(str, (count, *self._where[1:]))))
                if count == 1:
                    names = self._store.multi_get([f"who/{rank}" for rank in range(self._world.size)])
                    self._names = [name.decode() for name in names]
                # Reading all ranks is for when there is a question: N ranks that read N ranks each second are many.
                if self._asked.is_set():
                    self._snapshots.append(self._read())
                    self._answered.set()
                self._closing.wait(self.INTERVAL)
        except (RuntimeError, dist.DistError):
            if not self._closing.is_set():
                self._lost()

    def _read(self) -> list[Beat]:
        assert self._store is not None
        beats = self._store.multi_get([f"beat/{rank}" for rank in range(self._world.size)])
        return [Beat(*map(int, beat.split())) for beat in beats]

    def _watch(self) -> None:
        # The question takes some seconds, and torch's own timeout must not come first.
        patience = self._timeout - min(10.0, self._timeout / 3)
        while not self._closing.wait(self.INTERVAL / 2):
            started = self._started
            if started is not None and time.monotonic() - started > patience:
                self._end(f"{self._doing()} does not end; all ranks are alive and in it")

    def _diagnose(self) -> str:
        """Who is to blame; empty if nobody is."""
        place = self._doing()
        if self._started is not None:
            place += f", after {time.monotonic() - self._started:.0f} s"
        looks = self._looks()
        if not looks:
            return f"{place}: torchrun's store at {_master()} does not answer; {self._far()}"
        if silent := self._silent(looks):
            return f"{place}: no sign of life from {self._named(silent)}"
        last = looks[-1]
        places = [beat[1:] for beat in last]
        behind = [rank for rank, reached in enumerate(places) if reached == min(places)]
        if len(behind) == len(places):
            return ""
        return f"{place}: all wait for {_OF[last[behind[0]].phase]} {self._named(behind)}"

    def _looks(self) -> list[list[Beat]]:
        """What all ranks say of themselves, three times; empty if the store does not answer."""
        self._snapshots.clear()
        self._asked.set()
        for _ in range(3):
            self._answered.clear()
            if not self._answered.wait(2 * self.INTERVAL):
                return []
        return self._snapshots

    def _lost_ranks(self) -> list[int]:
        """Those that say nothing, for longer than a call that keeps Python's lock may take, and have not left."""
        lost: list[int] = []
        for _ in range(4):
            lost = self._without_leave(self._silent(self._looks()))
            if not lost:
                break
        return lost

    def _without_leave(self, ranks: list[int]) -> list[int]:
        return self._ask(lambda store: [rank for rank in ranks if not store.check([f"{_LEFT}/{rank}"])]) or []

    def _silent(self, looks: list[list[Beat]]) -> list[int]:
        """The ranks that have said nothing meanwhile."""
        first, last = (looks[0], looks[-1]) if looks else ([], [])
        return [rank for rank, (a, b) in enumerate(zip(first, last, strict=True)) if a.pulse == b.pulse]

    def _doing(self) -> str:
        step = self._where.step
        return f"judging after step {step}" if self._where.phase == _JUDGES else f"step {step + 1}"

    def _named(self, ranks: list[int]) -> str:
        return " and ".join(f"rank {rank} ({self._names[rank] if self._names else 'unknown'})" for rank in ranks)

    def _name(self) -> str:
        return f"node {self._world.node}: {socket.gethostname()}, pid {os.getpid()}"

    def _far(self) -> str:
        here = self._name().split(":")[0]
        far = [rank for rank, name in enumerate(self._names) if name.split(":")[0] != here]
        return f"this node is cut off from {self._named(far)}" if far else "is torchrun still there?"

    def _end(self, otherwise: str) -> None:
        with self._reporting:  # the other thread that may come here waits for the end of the process
            error = self._diagnose() or otherwise
            if self.claim():
                self._ended(f"{error}; start the same command again, it goes on from the newest checkpoint")
            sys.stderr.flush()
            os._exit(1)

    def claim(self) -> bool:
        """Whether this rank is to say why the run ends: one does, of those that still reach each other."""
        return self._ask(lambda store: store.add("moco_v3/hung", 1) == 1) is not False

    def _ask(self, question: Callable[[dist.Store], Any]) -> Any:
        """What the store says; None without one, or if it does not answer."""
        answers: list[Any] = []

        def ask(store: dist.Store) -> None:
            with suppress(RuntimeError, dist.DistError):  # the store is gone
                answers.append(question(store))

        if self._store is not None:
            asking = threading.Thread(target=ask, args=(self._store,), daemon=True)
            asking.start()
            asking.join(2 * self.INTERVAL)
        return answers[0] if answers else None


def _master() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
