"""Checkpoints: one file with all that a run needs to go on, written so that `latest` never names half a file."""

import os
from pathlib import Path
from typing import Any

import torch

from trainer.config import ConfigError
from trainer.run_folder import write_atomically

FORMAT = 1
LATEST = "latest"


def save(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as `checkpoint_<step>.pt`, point `latest` at it, and drop all but the newest `keep` (0: none).

    Raises:
        OSError: it could not be written (disk full, read-only); the older checkpoints and `latest` are untouched.
    """
    file = folder / f"checkpoint_{state['step']:08d}.pt"
    part = file.with_name(file.name + ".part")
    try:
        with open(part, "wb") as stream:
            torch.save({"format": FORMAT, **state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
        write_atomically(folder / LATEST, f"{file.name}\n".encode())
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written: {error}") from error
    files = _newest_first(folder)
    # What stands after this step was damaged, or the run would have gone on from there.
    later, kept = files[: files.index(file)], files[files.index(file) :]
    for old in [*later, *(kept[keep:] if keep else [])]:
        old.unlink(missing_ok=True)
    return file


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole (None in a folder without any), and what was wrong with newer ones.

    Raises:
        ConfigError: there are checkpoints and all are damaged; starting over would overwrite them.
    """
    warnings: list[str] = []
    for file in _newest_first(folder):
        try:
            load(file)
        except ConfigError as error:
            warnings.append(str(error))
        else:
            return file, warnings
    if warnings:
        raise ConfigError(f"no checkpoint in {folder} is whole: {'; '.join(warnings)}. Name another --out")
    return None, []


def load(file: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without executing code from it.

    Raises:
        ConfigError: the file is missing, damaged, or no checkpoint of a run.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"checkpoint {file} is not there") from None
    except Exception as error:  # whatever bytes are in the file: torch raises many types for a damaged one
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"checkpoint {file} cannot be read: {reason[:120]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigError(f"{file} is no checkpoint of train_ddp.py (format {FORMAT})")
    return state


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint_*.pt"), reverse=True)
