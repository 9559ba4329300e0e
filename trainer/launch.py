"""From a command line to a finished run: prepare, train, judge; errors become one line and an exit code."""

import datetime
import errno
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dali_pipes import DatasetError, DatasetIndex
from trainer import config as configuration
from trainer import handover, resume
from trainer.config import Config, ConfigError
from trainer.determinism import make_deterministic
from trainer.distributed import StopVote, World, choose_device, join
from trainer.engine import Engine, build_model
from trainer.judgement import Judge, conclude, judgeable, read_summary, write_summary
from trainer.loop import TrainingError, fit
from trainer.memory import fitting_batch, fitting_microbatch
from trainer.metrics import Display, MetricsLog
from trainer.preparation import TRAIN_INDEX, VAL_INDEX, Start, prepare

READY = "moco_v3/start"


def run(argv: Sequence[str]) -> int:
    """Run `train_ddp.py`'s command line; returns the exit code: 0 done or stopped by a signal, 1 failed, 2 wrong use.

    Under torchrun rank 0 checks everything before the process group starts, and the others wait for what it found: an
    error is printed once.
    """
    try:
        return _run(list(argv), World.from_environment())
    except (ConfigError, DatasetError) as error:
        return _report(error, 2)
    except TrainingError as error:
        if dist.is_initialized() and dist.get_rank():
            time.sleep(5)  # every rank has it, rank 0 says it, and torchrun ends all with the first that exits
            return 1
        return _report(error, 1)
    except KeyboardInterrupt:
        print("train_ddp.py: stopped before or after training; the same command goes on", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return _report(error, 1)


def _report(error: Exception, code: int) -> int:
    print(f"train_ddp.py: error: {error}", file=sys.stderr, flush=True)
    return code


def _run(argv: list[str], world: World) -> int:
    display = Display(shown=world.rank == 0)
    if {"-h", "--help"} & set(argv):
        configuration.parse(argv, quiet=world.rank > 0)  # every rank ends here, with exit code 0
    store = world.store()
    start = _lead(argv, world, store, display) if world.rank == 0 else _follow(argv, store)
    if start is None:
        return 2
    try:
        if start.config.run.deterministic:
            make_deterministic()
        device = choose_device(start.config.run.device, world)
        join(world, store, device, start.config.run.timeout)
        try:
            return _train(start, world, device, display)
        except torch.OutOfMemoryError:
            pass  # its traceback holds the engine: only outside of this block can the memory be had
        return _out_of_memory(start.config, world, device, store)
    finally:
        if start.folder is not None:
            start.folder.release()


def _lead(argv: list[str], world: World, store: dist.Store | None, display: Display) -> Start | None:
    """Rank 0: prepare, and tell the others; None after an error that was reported."""
    return handover.lead(store, READY, lambda: prepare(argv, world, display), _packed, lambda error: _report(error, 2))


def _packed(start: Start) -> dict[str, Any]:
    run = start.config.run
    resolved = {"amp": run.amp, "compile": run.compile, "augment": start.config.data.augment}
    return {"flags": resolved, "checkpoint": str(start.checkpoint or ""), "gone": start.gone}


def _follow(argv: list[str], store: dist.Store | None) -> Start | None:
    """The other ranks: wait for what rank 0 found; None if it was an error."""
    found = handover.follow(store, READY)
    if found is None:
        return None
    config = configuration.replace(configuration.parse(argv), **found["flags"])
    return Start(config, Path(found["checkpoint"]) if found["checkpoint"] else None, found["gone"])


def _train(start: Start, world: World, device: torch.device, display: Display) -> int:
    config, out = start.config, start.config.run.out
    index = DatasetIndex.load(out / TRAIN_INDEX)
    val = DatasetIndex.load(out / VAL_INDEX) if (out / VAL_INDEX).exists() else None
    threads = config.data.workers or world.default_threads()
    engine = Engine(config, world, device, index, build_model(config), threads, on_failed=display.warn)
    if start.checkpoint is not None:
        engine.load_state_dict(resume.start(start.checkpoint, engine))
    engine.set_aside(start.gone)
    judge = Judge(engine, judgeable(config, index, val, world.size, display), threads, display)
    trees = judge.trees
    summary = read_summary(out)
    if (
        summary is not None
        and summary["steps"] == engine.step >= engine.last
        and not (trees and summary["knn_after"] is None)
    ):
        display.say(f"{out} is complete")
        conclude(summary, out, display)
        _leave()
        return 0
    display.say(
        f"{config.model.arch} ({engine.model.feature_dim} features, {engine.model.heads} heads) "
        f"on {world.size} x {device.type}, {len(index)} images, batch {config.optim.batch_size}, "
        f"augment {config.data.augment}, amp {config.run.amp}, compile {config.run.compile}, "
        f"step {engine.step} of {engine.last}"
    )
    if trees and engine.step == 0:
        engine.notes["knn_before"] = judge.accuracy()

    log = MetricsLog(out, engine.step) if world.rank == 0 else None
    stop = StopVote(config.run.timeout)
    display.start(engine.step, engine.last)
    try:
        finished = fit(engine, out, log, display, stop, judge)
        stop.settle()
    finally:
        display.stop()
        stop.close()
        if log is not None:
            log.close()
    if not finished:
        display.say(f"stopped at step {engine.step} of {engine.last}; the same command goes on from there")
    else:
        after = judge.accuracy()
        if world.rank == 0:
            conclude(write_summary(engine, out, after), out, display)
    _leave()
    return 0


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _out_of_memory(config: Config, world: World, device: torch.device, store: dist.Store | None) -> int:
    """Say once what would fit; the other ranks wait, as torchrun ends all with the first that exits."""
    if store is not None and store.add("moco_v3/out_of_memory", 1) > 1:
        store.wait(["moco_v3/reported"], datetime.timedelta(minutes=5))
        return 2
    mends = {
        "--microbatch {}, which learns the same": fitting_microbatch(config, world, device),
        "--batch-size {}": fitting_batch(config, world, device),
    }
    fits = " or ".join(flag.format(size) for flag, size in mends.items() if size)
    mend = f"a step fits with {fits}" if fits else "no batch fits; use a smaller --arch or --image-size"
    code = _report(ConfigError(f"--batch-size {config.optim.batch_size}: {device} is out of memory; {mend}"), 2)
    if store is not None:
        store.set("moco_v3/reported", "1")
    return code
