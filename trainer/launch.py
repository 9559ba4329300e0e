"""From a command line to a finished run: prepare, train, judge; errors become one line and an exit code."""

import errno
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dali_pipes import DatasetError, DatasetIndex
from dali_pipes.stream import LoaderOutOfMemory
from trainer import checkpoint, handover, resume
from trainer import config as configuration
from trainer.config import ConfigError
from trainer.determinism import make_deterministic
from trainer.distributed import Votes, World, choose_device, gathered, join, limit_threads, together
from trainer.engine import Engine, build_model
from trainer.heartbeat import Heartbeat
from trainer.judgement import Judge, Trees, conclude, judgeable, read_summary, write_summary
from trainer.loop import UNJUDGED, TrainingError, fit
from trainer.memory import fitting_batch, fitting_microbatch, lighter
from trainer.metrics import Display, MetricsLog
from trainer.preparation import TRAIN_INDEX, VAL_INDEX, Start, prepare
from trainer.saving import Saver
from trainer.settling import settle
from trainer.signals import Stopped, StopSignals
from trainer.status import Status

READY = "moco_v3/start"
_NOT_SHARED = ("data", "out", "resume", "outside", "workers", "device")  # flags of one machine, or of rank 0 alone
_KEPT = ("gone", "has_val", "bound", "device", "step")  # of rank 0's Start
_RESOLVED = ("amp", "compile", "augment")  # flags whose "auto" rank 0 has replaced


def run(argv: Sequence[str]) -> int:
    """Run `train_ddp.py`'s command line; returns the exit code: 0 done or stopped by a signal, 1 failed, 2 wrong use.

    Under torchrun rank 0 checks everything before the process group starts, and the others wait for what it found: an
    error is printed once.
    """
    try:
        return _run(list(argv), World.from_environment())
    except DatasetError as error:  # of one rank's own images, which failed under way
        return _report(error, 1)
    except (ConfigError, TrainingError) as error:
        code = 2 if isinstance(error, ConfigError) else 1
        if dist.is_initialized() and dist.get_rank():
            time.sleep(5)  # every rank has it, rank 0 says it, and torchrun ends all with the first that exits
            return code
        return _report(error, code)
    except (KeyboardInterrupt, Stopped):
        if not (dist.is_initialized() and dist.get_rank()):
            print("train_ddp.py: stopped; the same command goes on", file=sys.stderr)
        return 0
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # of no file or disk
        return _report(error, 1)


def _report(error: Exception, code: int) -> int:
    print(f"train_ddp.py: error: {error}", file=sys.stderr, flush=True)
    return code


def _run(argv: list[str], world: World) -> int:
    display = Display(shown=world.rank == 0)
    if {"-h", "--help"} & set(argv):
        configuration.parse(argv, quiet=world.rank > 0)  # every rank ends here, with exit code 0
    limit_threads()
    store = world.store()
    start = None
    # A rank that waits for rank 0's preparation has nothing to finish: there a signal simply ends it.
    if world.rank:
        start = _follow(argv, world, store)
    signals = StopSignals()
    try:
        start = start if world.rank else _lead(argv, world, store, display)
        if start is None:
            return 2
        if start.config.run.deterministic:
            make_deterministic()
        device = choose_device(start.config.run.device, world)
        if device.type != start.device:  # else the ranks would wait for each other in two kinds of process group
            return _other_device(start, world, device, store, display)
        try:
            return _train(start, world, device, store, display, signals)
        except torch.OutOfMemoryError as error:
            # Its traceback holds the engine: only outside of this block can the memory be had.
            of_loader = isinstance(error, LoaderOutOfMemory)
        return _out_of_memory(start, world, device, store, of_loader)
    finally:
        signals.close()
        if start is not None and start.folder is not None:
            start.folder.release()


def _lead(argv: list[str], world: World, store: dist.Store | None, display: Display) -> Start | None:
    """Rank 0: prepare, and tell the others; None after an error that was reported."""
    return handover.lead(store, READY, lambda: prepare(argv, world, display), _packed, lambda error: _report(error, 2))


def _packed(start: Start) -> dict[str, Any]:
    flags = {name: value for name, value in start.config.flags().items() if name not in _NOT_SHARED}
    return {"flags": flags, "checkpoint": str(start.checkpoint or ""), **{name: getattr(start, name) for name in _KEPT}}


def _follow(argv: list[str], world: World, store: dist.Store | None) -> Start | None:
    """The other ranks: wait for what rank 0 found, and take its flags; None if it was an error."""
    found = handover.follow(store, READY)
    if found is None:
        return None
    config = configuration.parse(argv)
    own, leading = config.flags(), found["flags"]
    differing = [name for name in leading if leading[name] != own[name] and name not in _RESOLVED]
    if differing:
        phrases = "; ".join(configuration.disagreement(name, leading[name], own[name]) for name in differing)
        print(f"warning: rank {world.rank} takes the flags of rank 0: {phrases}", flush=True)
    config = configuration.replace(config, **leading)
    file = Path(found["checkpoint"]) if found["checkpoint"] else None
    return Start(config, file, **{name: found[name] for name in _KEPT})


def _train(
    start: Start, world: World, device: torch.device, store: dist.Store | None, display: Display, signals: StopSignals
) -> int:
    config, out = start.config, start.config.run.out
    trained: Engine | None = None  # once it stands where the run does

    def step() -> int:
        return start.step if trained is None else trained.step

    status = Status(out, display.warn, step, leads=world.rank == 0)
    # From here on, as what comes before the first step may take minutes, and a machine may be taken away in them, too.
    with status.during():
        join(world, store, device, config.run.timeout)
        with _watched(world, store, config.run.timeout, status, signals) as heartbeat:
            index, val = together(partial(_indices, start, world))
            threads = config.data.workers or world.default_threads()
            engine = Engine(config, world, device, index, build_model(config), threads, on_failed=display.warn)
            settle(engine)
            together(partial(_load, engine, start, display))
            trained = engine
            trees = judgeable(config, index, val, world.size, display)
            finished = _complete(engine, trees, display) or _train_on(engine, heartbeat, display, signals, trees)
        status.write("finished" if finished else "preempted")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _indices(start: Start, world: World) -> tuple[DatasetIndex, DatasetIndex | None]:
    """Of the training and the validation images, as rank 0 has written them."""
    out = start.config.run.out
    if not (out / TRAIN_INDEX).exists():
        raise ConfigError(f"--out {out}: rank {world.rank} does not see what rank 0 wrote; let all nodes share it")
    return DatasetIndex.load(out / TRAIN_INDEX), DatasetIndex.load(out / VAL_INDEX) if start.has_val else None


def _complete(engine: Engine, trees: Trees | None, display: Display) -> bool:
    """Whether nothing is left to do, which is then said."""
    out = engine.config.run.out
    # Rank 0's: another node's disk may not show it yet.
    summary = gathered(read_summary(out) if engine.world.rank == 0 else None)[0]
    if summary is None or not summary["steps"] == engine.step >= engine.last:
        return False
    if trees and summary["knn_after"] is None:
        return False
    display.say(f"{out} is complete")
    conclude(summary, out, display)
    return True


def _train_on(
    engine: Engine, heartbeat: Heartbeat, display: Display, signals: StopSignals, trees: Trees | None
) -> bool:
    """Train and judge; False if a signal stopped it before the end."""
    config, world = engine.config, engine.world
    display.say(
        f"{config.model.arch} ({engine.model.feature_dim} features, {engine.model.heads} heads) "
        f"on {world.size} x {engine.device.type}, {engine.images} images, batch {config.optim.batch_size}, "
        f"augment {config.data.augment}, amp {config.run.amp}, compile {config.run.compile}, "
        f"step {engine.step} of {engine.last}"
    )
    # Steps and judgings end together on all ranks, when they see that they are to stop.
    with signals.patiently():
        judge = Judge(engine, trees, display, heartbeat, lambda: signals.asked)
        if trees and engine.step == 0:
            engine.notes["knn_before"] = judge.accuracy()
        if not _fit(engine, display, signals, heartbeat, judge):
            display.say(f"stopped at step {engine.step} of {engine.last}; the same command goes on from there")
            return False
        after = judge.accuracy()
        if world.rank == 0:
            conclude(write_summary(engine, config.run.out, after), config.run.out, display)
    return True


def _load(engine: Engine, start: Start, display: Display) -> None:
    """Go on from the checkpoint, if there is one; rank 0 has read it already."""
    if start.checkpoint is not None:
        state = start.state or resume.start(start.checkpoint, engine)
        here = checkpoint.versions()
        before = state.get("versions", here)  # the reference's files do not tell
        try:
            engine.load_state_dict(state)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(f"checkpoint {start.checkpoint} does not fit this run: {reason[:200]}") from None
        if start.state is not None:
            start.state.clear()  # rank 0 would keep a second copy of it all
        differ = [f"{name} {before.get(name)}" for name in here if before.get(name) != here[name]]
        if differ:
            display.say(f"checkpoint by {', '.join(differ)}; last digits of losses may differ here")
    try:
        engine.set_aside(start.gone)
    except DatasetError as error:  # on all ranks, of which one is to say it
        raise ConfigError(str(error)) from None


@contextmanager
def _watched(
    world: World, store: dist.Store | None, timeout: int, status: Status, signals: StopSignals
) -> Iterator[Heartbeat]:
    """Around all that ranks do together: one that is gone or hangs is named, and so is what a rank alone has met."""

    def ended(reason: str) -> None:
        _report(TrainingError(reason), 1)
        status.write("failed", reason)

    heartbeat = Heartbeat(world, store, timeout, ended, signals.ask)
    try:
        yield heartbeat
    except Stopped:
        if not (lost := heartbeat.leave()):
            raise
        if heartbeat.claim():
            ended(f"at the start: {lost}; start the same command again")
        raise SystemExit(1) from None
    except TrainingError:
        raise
    except DatasetError as error:  # of this rank's images
        if heartbeat.claim():
            status.write("failed", str(error))
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            signals.ending()  # torchrun sends one to all whose neighbour is gone
            heartbeat.report(str(error).splitlines()[0])
        raise
    finally:
        heartbeat.close()


def _fit(engine: Engine, display: Display, signals: StopSignals, heartbeat: Heartbeat, judge: Judge) -> bool:
    """Train to the end; False if a signal stopped it before."""
    run, world = engine.config.run, engine.world
    keep_steps = run.keep_every and run.keep_every * engine.steps_per_epoch
    saver, log = None, None
    if world.rank == 0:
        log = MetricsLog(run.out, engine.step - (UNJUDGED in engine.notes), display.warn)
        saver = Saver(run.out, run.keep, keep_steps, run.save_minutes, display.warn, first=log.sync)
    display.start(engine.step, engine.last)
    try:
        votes = Votes(run.timeout)
        finished = fit(engine, saver, log, display, votes, signals, heartbeat, judge)
        votes.settle()
        return finished
    finally:
        display.stop()
        if saver is not None:
            saver.wait()
        if log is not None:
            log.close()


def _other_device(start: Start, world: World, device: torch.device, store: dist.Store | None, display: Display) -> int:
    """Say once that a rank has not the device that rank 0 has."""
    reason = (
        f"rank {world.rank} on {socket.gethostname()} computes on {device.type} and rank 0 on {start.device}; "
        "see what is wrong with the GPU there (make doctor), or give --device cpu"
    )
    Status(start.config.run.out, display.warn, lambda: start.step, leads=False).write("failed", reason)
    return handover.report_once(store, lambda: _report(ConfigError(reason), 2))


def _out_of_memory(start: Start, world: World, device: torch.device, store: dist.Store | None, of_loader: bool) -> int:
    """Say once what would fit."""
    config = start.config

    def advise() -> None:
        if of_loader:
            what = f"has no memory left for a batch's images; use {lighter(config, start.bound, untried=True)}"
        else:
            mends = {"--microbatch {}, which learns the same": fitting_microbatch(config, world, device)}
            if not start.bound:
                mends["--batch-size {}"] = fitting_batch(config, world, device)
            fits = [flag.format(size) for flag, size in mends.items() if size]
            mend = f"a step fits with {' or '.join(fits)}" if fits else f"use {lighter(config, start.bound)}"
            what = f"is out of memory; {mend}"
        _report(ConfigError(f"--batch-size {config.optim.batch_size}: {device} {what}"), 2)

    return handover.report_once(store, advise)
