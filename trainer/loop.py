"""The loop around the step: what is read, logged and saved, and when it ends."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dali_pipes import Batch, DatasetError
from trainer.advice import DataAdvisor
from trainer.distributed import Votes, gathered, mean_over_ranks
from trainer.engine import Engine
from trainer.heartbeat import Heartbeat
from trainer.judgement import Judge
from trainer.metrics import Display, MetricsLog, WaitClock
from trainer.saving import Saver
from trainer.signals import Stopped, StopSignals

UNJUDGED = "unjudged"  # the note of a step's row of metrics, not written yet, in what was saved before it was judged


class TrainingError(RuntimeError):
    """The run cannot go on: what happened, and what to try."""


def fit(
    engine: Engine,
    saver: Saver | None,
    log: MetricsLog | None,
    display: Display,
    votes: Votes,
    signals: StopSignals,
    heartbeat: Heartbeat,
    judge: Judge,
) -> bool:
    """Train up to the last step; False if a signal stopped it before.

    Rank 0 has a `log` and the `saver` of the checkpoints. `judge` is asked at the end of epochs,
    and first of all for a step that was saved before it was judged.

    Raises:
        TrainingError: loss or gradients were not finite (see `--on-nan`), too many images failed over all ranks, or
            the last checkpoint could not be written.
        DatasetError: too many images failed on this rank.
    """
    run, batch_size = engine.config.run, engine.config.optim.batch_size
    clock, batches = WaitClock(engine.device), _batches(engine)
    advisor = DataAdvisor(engine.threads, engine.world.cores())
    if (unjudged := engine.notes.get(UNJUDGED)) is not None:
        if not _judge(unjudged, engine, judge):
            return False
        if log is not None and saver is not None:
            log.write(unjudged)
            _save(engine, saver, ends=engine.step == engine.last)
    read_step, read_time = engine.step, time.perf_counter()
    stopped, stall = False, 0.0
    while engine.step < engine.last and not stopped:
        with heartbeat.watching(engine.step):
            with clock.waiting():
                batch = next(batches)
            heartbeat.fetched()
            loss = engine.train_step(batch.views, batch.indices)
            stopped, saves = votes.exchange(signals.asked, saver is not None and saver.due())
            epoch_ends = engine.step % engine.steps_per_epoch == 0
            steps_end = run.save_steps is not None and engine.step % run.save_steps == 0
            saves = saves or epoch_ends or steps_end or stopped or engine.step == engine.last
            reads = saves or engine.step % run.log_every == 0
            if reads:
                scale = engine.scaler.get_scale()  # 1 without fp16
                mean, seen = _read(engine, loss), engine.watch.read(scale)
        if reads:
            elapsed = time.perf_counter() - read_time
            rate, waited = (engine.step - read_step) * batch_size / elapsed, clock.read()
            row = {
                "step": engine.step,
                "epoch": (engine.step - 1) // engine.steps_per_epoch,
                "loss": mean,
                "lr": engine.lr,
                "momentum": engine.momentum,
                "images_per_second": rate,
                "images_per_second_per_gpu": rate / engine.world.size,
                "data_wait": waited / elapsed,
                "failed_images": engine.shared_failed,
                **seen.numbers,
            }
            if engine.scaler.is_enabled():
                row["loss_scale"] = scale
            if stall:
                row["save_stall"], stall = stall, 0.0
            engine.seconds += elapsed
            display.show(row)
            for warning in seen.warnings:
                display.say(f"warning: {warning}")
            if judge.due() and seen.fatal is None:
                # Judging may take minutes, and a machine that is taken away leaves seconds: saved before it, and again
                # with the history that it adds to, so that a run that goes on judges nothing twice.
                engine.notes[UNJUDGED] = row
                if saver is not None:
                    saver.save(engine.state_dict())
                if stopped or not _judge(row, engine, judge):
                    if saver is not None:
                        _end(saver)
                    return False
            if log is not None:
                log.write(row)
            if advice := advisor.hear(waited, elapsed):
                display.say(advice)
            if seen.fatal is not None:
                raise TrainingError(seen.fatal)
            if saves and saver is not None:
                stall = _save(engine, saver, ends=stopped or engine.step == engine.last)
            read_step, read_time = engine.step, time.perf_counter()
    return not stopped


def _judge(row: dict[str, Any], engine: Engine, judge: Judge) -> bool:
    """Give the step's row its k-NN accuracy, if there is one; False if a signal ended that, so that it is still due."""
    try:
        accuracy = judge.accuracy()
    except Stopped:
        return False
    if accuracy is not None:
        row["knn"] = accuracy
    engine.notes.pop(UNJUDGED, None)
    return True


def _batches(engine: Engine) -> Iterator[Batch]:
    """The batches from the engine's step on, epoch after epoch."""
    for epoch in itertools.count(engine.step // engine.steps_per_epoch):
        engine.loader.set_epoch(epoch)
        yield from engine.loader


def _read(engine: Engine, loss: Tensor) -> float:
    """Mean loss over the ranks, which also share what failed since the last read; every rank must call it."""
    news = len(engine.loader.failed) - engine.shared_failed
    value, any_news = mean_over_ranks(torch.stack([loss, loss.new_tensor(news)])).tolist()
    if any_news:
        try:
            engine.set_aside({row for rows in gathered(engine.loader.failed) for row in rows})
        except DatasetError as error:  # of all ranks together, so that every rank has it
            raise TrainingError(str(error)) from None
    return value


def _save(engine: Engine, saver: Saver, ends: bool) -> float:
    """Begin to save; returns the seconds that training waited. The last save is waited for."""
    stall = saver.save(engine.state_dict())
    if ends:
        _end(saver)
    return stall


def _end(saver: Saver) -> None:
    """Wait for the save under way, the run's last."""
    if (error := saver.wait()) is not None:
        raise TrainingError(f"{error}; make room and run the same command again")
