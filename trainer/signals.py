"""SIGINT, SIGTERM and SIGHUP: the first asks the run to stop, the second ends the process."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A signal asked to stop where no step has to be finished first."""


class StopSignals:
    """Takes these signals from its making to `close`, in the main thread; but SIGHUP not under nohup, which ignores it.

    Outside of `patiently`, and until `ending`, the first one raises `Stopped`. Inside it only sets `asked`, for the
    loop to end after its step. A second one, later, ends the process at once, also while it waits inside a collective
    for a rank that is gone: a thread sees to that, as Python's own handlers only run between two instructions.
    """

    # Ctrl-C reaches the ranks from the terminal and again from torchrun.
    SAME_SIGNAL_SECONDS = 3.0

    def __init__(self) -> None:
        self.asked = False
        self._patient = False
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(self._read, True)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        taken = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # when a terminal goes away
            taken.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._ask) for number in taken}
        self._watch = threading.Thread(target=self._end_at_second, name="signals", daemon=True)
        self._watch.start()

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Around what notices `asked` by itself."""
        if self.asked:
            raise Stopped
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def ending(self) -> None:
        """The process is about to end: the first one changes nothing any more."""
        self._patient = True

    def ask(self) -> None:
        """Stop as after a signal; for `patiently`."""
        self.asked = True

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)
        self._watch.join()
        os.close(self._read)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        if first and not self._patient:
            raise Stopped

    def _end_at_second(self) -> None:
        first: float | None = None
        while True:
            number = os.read(self._read, 1)
            if not number:
                return
            if number[0] not in self._before:
                continue
            now = time.monotonic()
            first = first if first is not None else now
            if now - first > self.SAME_SIGNAL_SECONDS:
                os._exit(128 + number[0])
