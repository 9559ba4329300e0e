"""Checkpoints: one file with all that a run needs to go on, written so that `latest` never names half a file.

A checkpoint is torch's zip file with its own checksum as the zip's comment: any program that reads torch files reads
it, and a flipped bit anywhere in it is found before anything is unpickled.
"""

import hashlib
import platform
import re
import struct
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dali_pipes.replacing import replacing, write_atomically
from trainer.config import ConfigError

FORMAT = 2
LATEST = "latest"
_SEAL = b"sha256:"
NO_MEMORY = "DefaultCPUAllocator"  # torch names it where it cannot allocate
_SEAL_SIZE = len(_SEAL) + 64
_CONTENT: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "flags": dict,
    "fingerprint": str,
    "seconds": (int, float),
    "notes": dict,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "loader": dict,
    "versions": dict,
}


class NotRemoved(OSError):
    """The checkpoint was written, and an older one stays in its place."""


class UnreadableNow(ConfigError):
    """The disk or the memory is in the way, not what is in the file."""


def versions() -> dict[str, str]:
    """What computes: of two runs that differ here the losses may differ in their last digits."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("nvidia-dali-cuda120", "numpy", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def save(folder: Path, state: dict[str, Any], keep: int, keep_steps: int | None = None) -> Path:
    """Write `state` as `checkpoint_<step>.pt`, point `latest` at it, and drop all but the newest `keep` (0: none).

    Those whose step is a multiple of `keep_steps` stay for good.

    Raises:
        OSError: it could not be written (disk full, read-only); the older checkpoints and `latest` are untouched.
        NotRemoved: it was, and an older one could not be removed.
    """
    file = folder / f"checkpoint_{state['step']:08d}.pt"
    try:
        with replacing(file) as stream:
            torch.save({"format": FORMAT, "versions": versions(), **state}, stream)
            _seal(stream)
        write_atomically(folder / LATEST, f"{file.name}\n".encode())
    except OSError as error:
        raise OSError(f"{file} could not be written: {error}") from error
    files = _newest_first(folder)
    # What stands after this step was damaged, or the run would have gone on from there.
    later, kept = files[: files.index(file)], files[files.index(file) :]
    stale = [old for old in kept[keep:] if not keep_steps or _step_of(old) % keep_steps] if keep else []
    failed: OSError | None = None
    for old in [*later, *stale]:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            failed = failed or NotRemoved(f"{old} could not be removed: {error}")
    if failed is not None:
        raise failed
    return file


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """`newest_state` without the state."""
    file, _, warnings = newest_state(folder)
    return file, warnings


def newest_state(folder: Path) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """The newest checkpoint that is whole, what is in it (None in a folder without any), and what is wrong with newer
    ones.

    Raises:
        ConfigError: there are checkpoints and all are damaged; starting over would overwrite them.
    """
    warnings: list[str] = []
    for file in _newest_first(folder):
        try:
            return file, load(file), warnings
        except UnreadableNow:  # it may be whole, and going on from an older one would end in its removal
            raise
        except ConfigError as error:
            warnings.append(str(error))
    if warnings:
        raise ConfigError(f"no checkpoint in {folder} is whole: {'; '.join(warnings)}. Name another --out")
    return None, None, []


def load(file: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without executing code from it.

    Raises:
        ConfigError: the file is missing, damaged, or no checkpoint of a run.
    """
    try:
        with open(file, "rb") as stream:
            _check_seal(stream, file)
            state = torch.load(stream, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"checkpoint {file} is not there") from None
    except (OSError, MemoryError) as error:
        raise UnreadableNow(f"checkpoint {file} cannot be read now: {error or 'out of memory'}; try again") from None
    except Exception as error:  # whatever bytes are in the file: torch raises many types for what it cannot read
        if NO_MEMORY in str(error):
            raise UnreadableNow(f"checkpoint {file} cannot be read now: out of memory; try again") from None
        raise ConfigError(f"checkpoint {file} cannot be read: {_reason(error)}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigError(f"{file} is no checkpoint of train_ddp.py (format {FORMAT})")
    wrong = [name for name, kind in _CONTENT.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise ConfigError(f"{file} is no checkpoint of train_ddp.py: no {', no '.join(wrong)} of its kind in it")
    return state


def _seal(stream: BinaryIO) -> None:
    """Append the checksum of what was written, as the comment of the zip file that it is."""
    stream.seek(-2, 2)
    stream.write(struct.pack("<H", _SEAL_SIZE))  # length of the comment: the last field of a zip file
    stream.seek(0)
    digest = hashlib.file_digest(stream, "sha256")  # type: ignore[arg-type]
    stream.write(_SEAL + digest.hexdigest().encode())


def _check_seal(stream: BinaryIO, file: Path) -> None:
    size = stream.seek(0, 2) - _SEAL_SIZE
    stream.seek(max(size, 0))
    seal = stream.read()
    if size < 0 or not seal.startswith(_SEAL):
        raise ConfigError(f"checkpoint {file} cannot be read: cut off, or not written by train_ddp.py (no checksum)")
    stream.seek(0)
    digest, left, block = hashlib.sha256(), size, bytearray(1 << 20)
    while left:
        count = stream.readinto(memoryview(block)[: min(left, len(block))])  # type: ignore[attr-defined]
        digest.update(memoryview(block)[:count])
        left -= count
    if seal != _SEAL + digest.hexdigest().encode():
        raise ConfigError(f"checkpoint {file} cannot be read: damaged, its checksum does not match")
    stream.seek(0)


def _reason(error: Exception) -> str:
    """What is wrong in a few words; torch's own advice for a refused pickle is to run it all the same."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"it refers to the code {code[1]}, which no checkpoint of train_ddp.py does; nothing of it was executed"
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]


def _newest_first(folder: Path) -> list[Path]:
    return sorted((file for file in folder.glob("checkpoint_*.pt") if file.stem[11:].isdecimal()), key=_step_of)[::-1]


def _step_of(file: Path) -> int:
    return int(file.stem.removeprefix("checkpoint_"))
