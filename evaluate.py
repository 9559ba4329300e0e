"""Entry of `torchrun … -- evaluate.py knn|linear|finetune --run RUN --data DIR`: how good the features of a run are.

Also without torchrun, as a single process. With it the `--` matters: torchrun would take `--run` for an option of its
own, `--run-path`.
"""

import dataclasses
import glob
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

# See train_ddp.py: idle OpenMP threads that spin take the cores from DALI's.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import tyro

from dali_pipes import DatasetError, DatasetIndex
from dali_pipes.counting import scan_shown
from dali_pipes.listing import training_tree, validation_tree
from dali_pipes.replacing import PART, write_atomically
from trainer import handover
from trainer.checkpoint import NO_MEMORY
from trainer.config import ConfigError
from trainer.distributed import World, choose_device, gathered, join, limit_threads
from trainer.engine import build_model
from trainer.evaluation_commands import Command, Evaluation, Finetune, Knn, Linear
from trainer.evaluation_file import UNFINISHED, WEIGHTS
from trainer.evaluator import Evaluator, tunable
from trainer.export import TrainedRun, open_run
from trainer.lock import lock

TIMEOUT = 1800  # seconds that ranks wait for each other
READY = "moco_v3/evaluate"


@dataclasses.dataclass(frozen=True)
class Found:
    """What rank 0 found out."""

    command: Evaluation
    run: TrainedRun
    train: DatasetIndex
    val: DatasetIndex


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code: 0 done, 2 wrong use. Under torchrun an error is printed once."""
    try:
        with ExitStack() as stack:
            return _main(list(argv), World.from_environment(), stack)
    except (ConfigError, DatasetError) as error:
        return _report(error)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.filename is None:
            raise  # of no file
        return _report(error)


def _main(argv: list[str], world: World, stack: ExitStack) -> int:
    if {"-h", "--help"} & set(argv):
        _parse(argv, quiet=world.rank > 0)  # every rank ends here, with exit code 0
    limit_threads()
    store = world.store()
    found: Found | None = None
    if world.rank == 0:
        found = handover.lead(store, READY, lambda: _find(argv, world, stack), lambda each: str(each.run.file), _report)
        if found is None:
            return 2
        command = found.command
    else:
        file = handover.follow(store, READY)
        if file is None:
            return 2
        command = _parse(argv, quiet=True)
    try:
        # A run that is still training may have a newer checkpoint by now: all ranks take the one that rank 0 found.
        run = found.run if found is not None else open_run(command.run, Path(file))
        device = choose_device(command.device, world)
    except ConfigError as error:  # of another machine than rank 0's
        return handover.report_once(store, partial(_report, error))
    join(world, store, device, TIMEOUT)
    trees: list[DatasetIndex | None] = [found.train, found.val] if found is not None else [None, None]
    if dist.is_initialized():
        dist.broadcast_object_list(trees, src=0)
    train, val = trees
    assert train is not None
    assert val is not None
    try:
        _evaluate(command, run, train, val, world, device)
    except (ConfigError, DatasetError, FloatingPointError) as error:
        return handover.report_once(store, partial(_report, error))
    except RuntimeError as error:
        if handover.reported(store):  # another rank has ended, and said why
            return 2
        if not isinstance(error, torch.OutOfMemoryError) and NO_MEMORY not in str(error):
            raise
        return handover.report_once(store, partial(_report, ConfigError(_out_of_memory(command, device))))
    if dist.is_initialized():  # not after an error: it may wait for ranks that are stuck
        dist.destroy_process_group()
    return 0


def _out_of_memory(command: Evaluation, device: torch.device) -> str:
    mend = "use a smaller --batch-size"
    if isinstance(command, Knn):
        mend = "use --device cpu" if device.type == "cuda" else "the features of all images have to fit"
    return f"{device} is out of memory; {mend}"


def _report(error: Exception) -> int:
    print(f"evaluate.py: error: {error}", file=sys.stderr, flush=True)
    return 2


def _parse(argv: list[str], quiet: bool = False) -> Evaluation:
    """The command; tyro prints help (exit 0) and flag errors (exit 2), unless `quiet`."""
    return tyro.cli(  # type: ignore[return-value,unused-ignore]
        Command,  # type: ignore[arg-type,unused-ignore]
        prog="evaluate.py",
        args=argv,
        console_outputs=not quiet,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _find(argv: list[str], world: World, stack: ExitStack) -> Found:
    """For rank 0: everything that can be found out before ranks meet. The result's files are ours until `stack` ends.

    Raises:
        ConfigError, DatasetError: what is wrong and how to mend it; no result was touched.
    """
    command = _parse(argv)
    command.check(world.size)
    choose_device(command.device, world)
    run = open_run(command.run)
    for warning in run.warnings:
        print(f"warning: {warning}; taking the one before")
    train, val = _scan(command.data, command.outside)
    for index in (train, val):
        if len(index) < world.size:
            raise ConfigError(f"{index.tree} has {len(index)} images, too few for {world.size} ranks")
    if isinstance(command, (Linear, Finetune)) and command.batch_size > len(train):
        unit = world.size * (2 if isinstance(command, Finetune) and (command.mixup or command.cutmix) else 1)
        raise ConfigError(
            f"--batch-size {command.batch_size}, but {train.tree} has {len(train)} images; "
            f"use at most {len(train) // unit * unit}"
        )
    if not run.file.exists():  # a run that is still training: by now it has a newer one
        run = open_run(command.run)
    _check_output(command)
    if isinstance(command, Finetune):
        with torch.device("meta"):
            tunable(command, run)
    output = command.result(".json")
    try:  # before hours of work, not after
        output.parent.mkdir(exist_ok=True)
        stack.enter_context(_claimed(command))
        with NamedTemporaryFile(prefix=f"{output.name}.", suffix=PART, dir=output.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from None
    return Found(command, run, train, val)


@contextmanager
def _claimed(command: Evaluation) -> Iterator[None]:
    """Keep other processes from making the same result; halves of files that a killed one left are removed.

    Raises:
        ConfigError: one is at it.
    """
    output = command.result(".json")
    try:
        held = lock(output.with_name(f".{output.stem}.lock"), partial(print, flush=True))
    except BlockingIOError:
        raise ConfigError(f"{output} is being made by another process; give this one another --name") from None
    if held is None:  # a filesystem without locks: halves may be another's
        yield
        return
    try:
        for ending in (".json", WEIGHTS, UNFINISHED):
            for half in output.parent.glob(f"{glob.escape(command.result(ending).name)}.????????{PART}"):
                half.unlink(missing_ok=True)
        yield
    finally:
        os.close(held)


def _check_output(command: Evaluation) -> None:
    """Raise ConfigError if the result that would be replaced is of other images."""
    output = command.result(".json")
    try:
        before = Path(json.loads(output.read_text())["flags"]["data"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or none of ours
        return
    if before.resolve() != command.data.resolve():
        raise ConfigError(f"{output} is of --data {before}; give this one another --name")


def _scan(data: Path, outside: bool) -> tuple[DatasetIndex, DatasetIndex]:
    if not data.exists():
        raise ConfigError(f"--data {data}: no such folder or list")
    val_tree = validation_tree(data)
    if val_tree is None and data.is_file():
        raise ConfigError(f"--data {data}: evaluation needs a list train.txt, with val.txt beside it")
    if val_tree is None:
        lacks = "train" if training_tree(data) == data else "val"
        raise ConfigError(f"--data {data} has no {lacks}/; evaluation needs train/ and val/ with class folders")
    train, val = (scan_shown(tree, outside) for tree in (training_tree(data), val_tree))
    for index in (train, val):
        if index.rejected:
            path, reason = index.rejected[0]
            print(f"{index.tree}: {len(index.rejected)} files set aside, first {path}: {reason}")
    for name, index in (("train", train), ("val", val)):
        if not index.classes:
            lacks = f"{name}.txt has no labels" if data.is_file() else f"{name}/ has no class folders"
            raise ConfigError(f"--data {data}: {lacks}; evaluation needs them in both")
    if not val.labelled_as(train):
        odd = sorted(set(train.classes) ^ set(val.classes))[0]
        where, other = ("train", "val") if odd in train.classes else ("val", "train")
        raise ConfigError(f"--data {data}: class {odd} is in {where} and not in {other}; they need the same classes")
    if len(train.classes) < 2:
        raise ConfigError(f"--data {data} has {len(train.classes)} classes; evaluation needs at least two")
    return train, val


def _evaluate(
    command: Evaluation, run: TrainedRun, train: DatasetIndex, val: DatasetIndex, world: World, device: torch.device
) -> None:
    if command.untrained:
        run = dataclasses.replace(run, model=build_model(run.config, sync_bn=False))
    evaluator, started = Evaluator(command, run, world, device), time.monotonic()
    evaluator.say(
        f"{run.config.model.arch} {'untrained' if command.untrained else f'after {run.step} steps'}, "
        f"{len(train)} images in train/, {len(val)} in val/, {len(train.classes)} classes, {world.size} x {device.type}"
    )
    result = evaluator.evaluate(command, train, val)
    failed = sorted({line for lines in gathered(evaluator.reader.failed) for line in lines})
    if world.rank:
        return
    flags = {name: value for name, value in vars(command).items() if name not in ("run", "name")}
    facts: dict[str, Any] = {
        "kind": command.kind,
        "run": str(run.folder.absolute()),
        "step": 0 if command.untrained else run.step,
        "images": {"train": len(train), "val": len(val), "classes": len(train.classes)},
        "flags": {**flags, "data": command.data.absolute()},
        **result,
        "set_aside": [f"{path}: {reason}" for index in (train, val) for path, reason in index.rejected],
        "failed": failed,
        "seconds": time.monotonic() - started,
        "ranks": world.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    output, text = command.result(".json"), json.dumps(facts, indent=2, default=str) + "\n"
    try:
        write_atomically(output, text.encode())
    except OSError as error:
        print(text, flush=True)
        raise ConfigError(f"{output} cannot be written: {error.strerror}; the result stands above") from None
    if not isinstance(command, Knn):
        with suppress(OSError):  # what is left of it does no harm
            command.result(UNFINISHED).unlink(missing_ok=True)
    evaluator.say(f"file   {output}")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # file names may be in any encoding
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main(sys.argv[1:]))
