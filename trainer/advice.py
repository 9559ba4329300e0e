"""When the step waits for data: one line that says what to change."""

import math

WORTH_SAYING = 0.1  # of the time; below it a mend would not be felt
WINDOW = 60.0  # seconds that a share is taken over: shorter waits, at a start or a checkpoint, are no bottleneck
SILENCE = 1800.0  # seconds until it is said again


def data_advice(wait: float, threads: int, cores: int) -> str:
    """What to do about a data wait of this share (0 to 1) of the time, in a line; "" where it is not worth it.

    To make the wait vanish the loader has to be 1 / (1 - wait) times as fast, and it is as fast as it has threads, up
    to the `cores` of this rank.
    """
    if wait < WORTH_SAYING:
        return ""
    smaller = "store the images smaller (256 px on the shorter side halves the decoding)"
    wanted = math.ceil(threads / max(1 - wait, 1 / 64))
    if threads < cores:
        return f"data wait {100 * wait:.0f} %: raise --workers to {min(wanted, cores)}, or {smaller}"
    return (
        f"data wait {100 * wait:.0f} %: all {cores} cores of this rank are at work already; {smaller}, "
        "or give it more cores"
    )


class DataAdvisor:
    """Hears of every read of the metrics, and speaks at most once in `SILENCE` seconds."""

    def __init__(self, threads: int, cores: int) -> None:
        self._threads, self._cores = threads, cores
        self._waited, self._elapsed, self._since = 0.0, 0.0, SILENCE

    def hear(self, waited: float, elapsed: float) -> str:
        """Seconds waited of seconds elapsed since the last call; the advice, or ""."""
        self._waited, self._elapsed, self._since = self._waited + waited, self._elapsed + elapsed, self._since + elapsed
        if self._elapsed < WINDOW:
            return ""
        line = data_advice(self._waited / self._elapsed, self._threads, self._cores)
        self._waited = self._elapsed = 0.0
        if not line or self._since < SILENCE:
            return ""
        self._since = 0.0
        return line
