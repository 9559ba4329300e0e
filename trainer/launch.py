"""From a command line to a finished run: prepare, train, judge; errors become one line and an exit code."""

import datetime
import errno
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dali_pipes import DatasetError, DatasetIndex
from trainer import checkpoint
from trainer import config as configuration
from trainer.config import Config, ConfigError
from trainer.distributed import StopVote, World, choose_device, join
from trainer.engine import Engine, TrainingError, build_model
from trainer.judgement import conclude, judge, judgeable, read_summary, write_summary
from trainer.memory import fitting_batch
from trainer.metrics import Display, MetricsLog
from trainer.preparation import TRAIN_INDEX, VAL_INDEX, Start, prepare

READY = "moco_v3/start"


def run(argv: Sequence[str]) -> int:
    """Run `train_ddp.py`'s command line; returns the exit code: 0 done or stopped by a signal, 1 failed, 2 wrong use.

    Under torchrun rank 0 checks everything before the process group starts, and the others wait for what it found: an
    error is printed once.
    """
    world = World.from_environment()
    try:
        return _run(list(argv), world)
    except (ConfigError, DatasetError) as error:
        return _report(error, 2)
    except TrainingError as error:
        if world.rank:
            time.sleep(5)  # every rank has it, rank 0 says it, and torchrun ends all with the first that exits
            return 1
        return _report(error, 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return _report(error, 1)


def _report(error: Exception, code: int) -> int:
    print(f"train_ddp.py: error: {error}", file=sys.stderr, flush=True)
    return code


def _run(argv: list[str], world: World) -> int:
    store = world.store()
    display = Display(shown=world.rank == 0)
    if world.rank == 0:
        start = prepare(argv, world, display)
        if store is not None:
            found = {"flags": start.config.flags(), "checkpoint": str(start.checkpoint or ""), "gone": start.gone}
            store.set(READY, json.dumps(found))
    else:
        assert store is not None
        found = json.loads(store.get(READY))
        config = configuration.replace(
            configuration.parse(argv), **{name: found["flags"][name] for name in ("amp", "compile")}
        )
        start = Start(config, Path(found["checkpoint"]) if found["checkpoint"] else None, found["gone"])

    try:
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


def _train(start: Start, world: World, device: torch.device, display: Display) -> int:
    config, out = start.config, start.config.run.out
    index = DatasetIndex.load(out / TRAIN_INDEX)
    val = DatasetIndex.load(out / VAL_INDEX) if (out / VAL_INDEX).exists() else None
    threads = config.data.workers or _default_workers(world)
    engine = Engine(config, world, device, index, build_model(config), threads, on_failed=display.warn)
    if start.checkpoint is not None:
        engine.load_state_dict(checkpoint.load(start.checkpoint))
    engine.set_aside(start.gone)
    summary = read_summary(out)
    if summary is not None and summary["steps"] == engine.step == engine.last:
        display.say(f"{out} is complete")
        conclude(summary, out, display)
        return 0
    display.say(
        f"{config.model.arch} on {world.size} x {device.type}, {len(index)} images, "
        f"batch {config.optim.batch_size}, amp {config.run.amp}, compile {config.run.compile}, "
        f"step {engine.step} of {engine.last}"
    )
    trees = judgeable(config, index, val, display)
    if trees and engine.step == 0:
        engine.notes["knn_before"] = judge(engine, *trees, threads)
        display.say(f"k-NN before the first step: {engine.notes['knn_before']:.1%}")

    log = MetricsLog(out, engine.step) if world.rank == 0 else None
    stop = StopVote()
    display.start(engine.step, engine.last)
    try:
        finished = engine.fit(out, log, display, stop)
    finally:
        display.stop()
        stop.close()
        if log is not None:
            log.close()
    if not finished:
        display.say(f"stopped at step {engine.step} of {engine.last}; the same command goes on from there")
    else:
        after = judge(engine, *trees, threads) if trees else None
        if world.rank == 0:
            conclude(write_summary(engine, out, after), out, display)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _default_workers(world: World) -> int:
    return max(1, min(16, len(os.sched_getaffinity(0)) // world.local_size))


def _out_of_memory(config: Config, world: World, device: torch.device, store: dist.Store | None) -> int:
    """Say once which batch would fit; the other ranks wait, as torchrun ends all with the first that exits."""
    if store is not None and store.add("moco_v3/out_of_memory", 1) > 1:
        store.wait(["moco_v3/reported"], datetime.timedelta(minutes=5))
        return 2
    fits = fitting_batch(config, world, device)
    mend = f"--batch-size {fits} would fit" if fits else "no batch fits; use a smaller --arch or --image-size"
    code = _report(ConfigError(f"--batch-size {config.optim.batch_size}: {device} is out of memory; {mend}"), 2)
    if store is not None:
        store.set("moco_v3/reported", "1")
    return code
