"""Saving while training goes on: the state is copied aside, and a thread writes the copy."""

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint


class Saver:
    """The checkpoints of a run, one at a time.

    A save that fails (disk full, read-only) is told to `warn` and costs nothing but itself: the next one tries again.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_steps: int | None,
        minutes: float | None,
        warn: Callable[[str], None],
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """`first`: called by the thread before it writes."""
        self._first = first
        self._folder, self._keep, self._keep_steps, self._warn = folder, keep, keep_steps, warn
        self._seconds = None if minutes is None else minutes * 60
        self._copy: dict[str, Any] = {}  # kept from save to save: pinned memory is slow to get
        self._writer: threading.Thread | None = None
        self._error: OSError | None = None
        self._last, self._said_due = time.monotonic(), False

    def due(self) -> bool:
        """Whether the minutes between two saves are over; said once, as the ranks need a step to agree on it."""
        due = not self._said_due and self._seconds is not None and time.monotonic() - self._last >= self._seconds
        self._said_due |= due
        return due

    def save(self, state: dict[str, Any]) -> float:
        """Begin to write `state`; returns the seconds for which training had to wait.

        A save that is still being written is waited for: there is one copy, and the newest should win.
        """
        started = time.monotonic()
        self.wait()
        self._copy = copy_aside(state, self._copy)
        self._last, self._said_due = time.monotonic(), False
        self._writer = threading.Thread(target=self._write, name="checkpoint")
        self._writer.start()
        return self._last - started

    def wait(self) -> OSError | None:
        """Wait until the last save is written; returns why it failed, if it did."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        return self._error

    def _write(self) -> None:
        try:
            self._first()
            checkpoint.save(self._folder, self._copy, self._keep, self._keep_steps)
            self._error = None
        except checkpoint.NotRemoved as error:
            self._error = None
            self._warn(f"{error}; the next save tries again")
        except Exception as error:  # a save that failed, whatever the reason, must not count as one
            self._error = error if isinstance(error, OSError) else OSError(repr(error))
            self._warn(f"{error}; training goes on, and the next save tries again")


def copy_aside(value: Any, before: Any) -> Any:
    """A copy on the CPU of nested containers of tensors and plain values, into the memory of an earlier copy if alike.

    The device is waited for once, after all copies were asked for.
    """
    copied = _copied(value, before)
    if torch.cuda.is_initialized():  # a run on the CPU is not to open the GPU for it
        torch.cuda.current_stream().synchronize()
    return copied


def _copied(value: Any, before: Any) -> Any:
    if isinstance(value, Tensor):
        return _into(before, value.detach())
    if isinstance(value, dict):
        known = before if isinstance(before, dict) else {}
        return {key: _copied(item, known.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        old = list(before) if isinstance(before, list | tuple) and len(before) == len(value) else [None] * len(value)
        return type(value)(_copied(item, place) for item, place in zip(value, old, strict=True))
    return copy.deepcopy(value)


def _into(place: Any, value: Tensor) -> Tensor:
    alike = isinstance(place, Tensor) and place.dtype == value.dtype and place.shape == value.shape
    if not alike or place.stride() != value.stride():
        place = _beside(value)
    return place.copy_(value, non_blocking=True)


def _beside(value: Tensor) -> Tensor:
    """Memory on the CPU for a tensor: pinned for a GPU's, where the system grants it, or training would wait longer."""
    try:
        return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    except RuntimeError:
        return torch.empty_like(value, device="cpu")
