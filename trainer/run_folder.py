"""A run's own folder: whose it is, one process at a time, and the configuration that it goes on with."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dali_pipes.replacing import PART, write_atomically
from trainer.config import Config, ConfigError, disagreements
from trainer.lock import lock

CONFIG = "config.json"
LOCK = "lock"
STATUS = "status.json"


class RunFolder:
    """`--out`. Reading it changes nothing; `claim` makes it this process's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_locks = True
        self._lock: int | None = None

    def recorded(self) -> dict[str, Any] | None:
        """What `config.json` says of the run that is there; None for a new or empty folder.

        Raises:
            ConfigError: the path is no folder, holds something else than a run, or its configuration is damaged.
        """
        try:
            if not self.path.exists():
                return None
        except OSError as error:
            raise ConfigError(f"--out {self.path} cannot be used: {error.strerror}; name another folder") from None
        if not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a file; name a folder")
        file = self.path / CONFIG
        if not file.exists():
            if not all(_left_by_a_start(entry.name) for entry in self.path.iterdir()):
                raise ConfigError(f"--out {self.path} is not empty and holds no run; name another folder")
            return None
        try:
            recorded = json.loads(file.read_bytes())
            recorded["flags"].items()
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{file} is damaged; restore it or name another --out") from None
        return recorded

    def check(self, recorded: dict[str, Any], config: Config, fingerprint: str) -> None:
        """Raise `ConfigError` if this command would learn something else than the run that is there."""
        differ = disagreements(recorded["flags"], config.flags())
        if recorded.get("fingerprint") != fingerprint:
            differ.append(f"the images are others ({recorded.get('fingerprint')} there, {fingerprint} here)")
        if differ:
            raise ConfigError(
                f"--out {self.path} belongs to another run: {'; '.join(differ)}. Name another --out, or use its flags"
            )

    def lock(self, say: Callable[[str], None] | None = None) -> None:
        """Keep other processes out until `release`; creates the folder. `has_locks` says if its filesystem cannot.

        say: see `trainer.lock`.

        Raises:
            ConfigError: another process has it, or it cannot be written.
        """
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / LOCK, say)
        except BlockingIOError:
            raise ConfigError(f"--out {self.path} is in use by another process; wait for it or stop it") from None
        except OSError as error:
            raise ConfigError(f"--out {self.path} cannot be written: {error.strerror}; name another folder") from None
        self.has_locks = self._lock is not None

    def claim(self, config: Config, fingerprint: str) -> None:
        """Lock the folder and write `config.json` for a run that begins here.

        Raises:
            ConfigError: another process has it, or it cannot be written.
        """
        self.lock()
        recorded = {"flags": config.flags(), "fingerprint": fingerprint}
        try:
            write_atomically(self.path / CONFIG, (json.dumps(recorded, indent=2) + "\n").encode())
        except OSError as error:
            raise ConfigError(f"--out {self.path} cannot be written: {error.strerror}; name another folder") from None

    def sweep(self) -> None:
        """Remove the halves of files that a process which was killed left behind."""
        for file in self.path.glob(f"*{PART}"):
            file.unlink(missing_ok=True)

    def release(self) -> None:
        """Let another process have it; the end of the process does the same."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _left_by_a_start(name: str) -> bool:
    """Whether a start that was killed before it wrote the configuration leaves such a file."""
    half = name.endswith(PART) and name.startswith((f"{CONFIG}.", f"{STATUS}."))
    return half or name in (LOCK, STATUS)
