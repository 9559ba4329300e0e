"""`status.json`: what became of a run, for the scheduler that has to decide whether to start it again."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from dali_pipes.replacing import write_atomically
from trainer.run_folder import STATUS
from trainer.signals import Stopped

State = Literal["running", "preempted", "finished", "failed"]


def write_status(folder: Path, status: State, step: int | None, reason: str = "") -> None:
    """Replace `status.json`.

    running: a process trains, or was killed before it could say more. preempted: asked to stop, saved; the same command
    goes on. finished: nothing is left to do. failed: `reason` says why; starting again as it is will not help, except
    after a rank or a machine was lost. step: done, None if not known.

    Raises:
        OSError: it could not be written.
    """
    content = {
        "status": status,
        "step": step,
        "reason": reason,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    write_atomically(folder / STATUS, (json.dumps(content, indent=2) + "\n").encode())


class Status:
    """The status of the run that this process trains; a folder that cannot be written costs a warning."""

    def __init__(self, folder: Path, warn: Callable[[str], None], step: Callable[[], int], leads: bool) -> None:
        """`step`: that the run is at. `leads`: on rank 0; the others tell of failures only."""
        self._folder, self._warn, self._step, self._leads = folder, warn, step, leads

    def write(self, status: State, reason: str = "") -> None:
        """Replace `status.json`; but the first failure of any rank stays, as what follows on the others is its work.

        So does a stop of rank 0: to the other ranks it looks like a lost connection.
        """
        if not self._leads and (status != "failed" or self._now() != "running"):
            return
        if status in ("failed", "preempted") and self._now() == "failed":
            return
        try:
            write_status(self._folder, status, self._step(), reason)
        except OSError as error:
            self._warn(f"{self._folder / STATUS} could not be written: {error.strerror}")

    def _now(self) -> str:
        try:
            return str(json.loads((self._folder / STATUS).read_bytes())["status"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    @contextmanager
    def during(self) -> Iterator[None]:
        """`running` from here, and what became of it if the block does not reach its end."""
        self.write("running")
        try:
            yield
        except Stopped:
            self.write("preempted")
            raise
        except Exception as error:
            self.write("failed", str(error))
            raise
