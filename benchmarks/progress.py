"""What a benchmark says while it runs: one live line on a terminal, a plain line now and then elsewhere; on stderr."""

import time

from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts the parts of a run whose number is known once `expect` was called."""

    def __init__(self, name: str) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._name, self._total, self._done = name, 0, 0
        self._started = time.monotonic()
        self._said = float("-inf")

    def expect(self, parts: int) -> None:
        """So many more parts will come."""
        if not self._total:
            self._started = time.monotonic()
        self._total += parts

    def part(self, text: str) -> None:
        """A part begins."""
        now = time.monotonic()
        left = (now - self._started) / self._done * (self._total - self._done) if self._done else None
        eta = "" if left is None else f" · {left:.0f} s left"
        line = f"{self._name} {self._done + 1}/{self._total} {text}{eta}"
        self._done += 1
        if self._console.is_terminal:
            self._rewrite(line[: self._console.width - 1])
        elif now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            self._console.print(line, markup=False)

    def say(self, line: str) -> None:
        """A line that stays."""
        self.clear()
        self._console.print(line, markup=False)

    def clear(self) -> None:
        """Take the live line away."""
        if self._console.is_terminal:
            self._rewrite("")

    def _rewrite(self, line: str) -> None:
        self._console.file.write(f"\r\x1b[K{line}")
        self._console.file.flush()
