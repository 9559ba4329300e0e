"""How every benchmark runs as a command: parse, measure, write a JSON and a PNG, show a table; or one line of error."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import gpu, results, tables
from benchmarks.environment import busy
from benchmarks.generated import FOLDER, generated
from benchmarks.gpu import GpuSampler
from benchmarks.progress import Progress
from benchmarks.results import Result, ResultError
from dali_pipes import DatasetError, DatasetIndex
from dali_pipes.counting import scan_shown
from dali_pipes.file_check import check_file
from dali_pipes.listing import training_tree
from dali_pipes.replacing import write_atomically
from trainer.config import ConfigError
from trainer.distributed import World, choose_device

T = TypeVar("T")


def given(value: T | None, default: T) -> T:
    """A flag's value, or the default where it was not given: 0 is a value, and is refused as one."""
    return default if value is None else value


@dataclass(frozen=True)
class Setting:
    """What is measured on."""

    data: Path | None = None
    """Folder of images, or a list file; None: generated JPEGs with ImageNet's sizes, in data/benchmark."""
    images: int = 256
    """Generated images; with --data, at most so many of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU, or the CPU where the machine has none."""
    outside: bool = False
    """Let a list file (`--data`) name images outside of its folder."""
    workers: int | None = None
    """Threads of DALI and processes of a DataLoader, where images are loaded; None: as many as cores, at most 16."""
    rounds: int = 7
    """Repeats of a measurement (in sweeps at most 3), taken in turns, so that a slow minute meets all alike."""

    def check(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        for flag, value in {"--images": self.images, "--rounds": self.rounds, "--workers": self.workers}.items():
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value} is too small; use 1 or more")

    @property
    def threads(self) -> int:
        """Threads of DALI and processes of a DataLoader: as given, or as many as train_ddp.py takes."""
        return given(self.workers, World().default_threads())

    def index(self, progress: Progress) -> DatasetIndex:
        """The images to measure on."""
        if self.data is None:
            progress.say(f"images: {self.images} generated in {FOLDER}")
            return generated(FOLDER, self.images)
        found = scan_shown(training_tree(self.data), self.outside)
        count = min(self.images, len(found))
        return found.at(np.linspace(0, len(found) - 1, count).astype(np.int64))  # from all over it

    def readable_by_all(self, progress: Progress) -> DatasetIndex:
        """Of these images, those that every library here reads: whole JPEG, PNG and WebP files with names in UTF-8."""
        found = self.index(progress)
        rows = [
            row
            for row, path in enumerate(found.paths)
            if path.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))
            and os.fsencode(path) == path.encode(errors="replace")
            and not check_file(path, "full").reason
        ]
        if not rows:
            raise ConfigError(f"--data {self.data} has no JPEG, PNG or WebP file, which all that is compared reads")
        if len(rows) < len(found):
            progress.say(f"left out: {len(found) - len(rows)} images that not all that is compared reads")
        return found.at(np.array(rows))

    def chosen_device(self) -> torch.device:
        """The device, with its number."""
        return choose_device(self.device, World())


@dataclass(frozen=True)
class Common(Setting):
    """What every benchmark takes that leaves a result."""

    out: Path = Path("benchmarks/results")
    """Folder of the JSON and the PNG."""
    quick: bool = False
    """A short form, mostly of 2 or 3 rounds, to see that everything runs; its numbers say little."""

    def check(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        super().check()
        folder = next(folder for folder in (self.out, *self.out.absolute().parents) if folder.exists())
        if not folder.is_dir():
            raise ConfigError(f"--out {self.out} is not a folder")
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"--out {self.out}: {folder} cannot be written")


class Benchmark(Protocol):
    """A benchmark's own flags, with the common ones in `common`."""

    @property
    def common(self) -> Common:
        """What every benchmark takes."""
        ...


Flags = TypeVar("Flags", bound=Benchmark)


def run(
    flags: type[Flags],
    measure: Callable[[Flags, torch.device, Progress], Result],
    draw: Callable[[Result], Figure],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a benchmark's command line; returns the exit code: 0 done, 2 wrong use. tyro exits by itself on --help."""
    name = flags.__name__.lower()
    prog = f"python -m benchmarks.{name}"
    config = tyro.cli(flags, prog=prog, args=argv, config=(tyro.conf.OmitArgPrefixes,))
    progress = Progress(name)
    try:
        config.common.check()
        device = config.common.chosen_device()
        with GpuSampler(device) as sampler:
            try:
                result = measure(config, device, progress)
            finally:
                progress.clear()
    except (ConfigError, DatasetError, ResultError, OSError) as error:
        print(f"benchmarks.{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError:
        print(f"benchmarks.{name}: error: the GPU is out of memory; use a smaller --batch-size", file=sys.stderr)
        return 2
    shared = busy(result.environment)
    result = replace(result, gpu=sampler.summary(), notes=(*result.notes, *([shared] if shared else [])))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    tables.show(result, console)  # first, as the disk may be full
    console.print(f"- {gpu.sentence(result.gpu)}", markup=False)
    picture = io.BytesIO()
    try:
        file = results.write(result, config.common.out)
        draw(result).savefig(picture, dpi=120)
        write_atomically(file.with_suffix(".png"), picture.getvalue())
    except OSError as error:
        print(f"benchmarks.{name}: error: {config.common.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    console.print(f"{file} and {file.with_suffix('.png').name}", markup=False)
    return 0
