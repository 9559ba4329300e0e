"""The loop around the step: what is read, logged and saved, and when it ends."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dali_pipes import Batch, DatasetError
from trainer import checkpoint
from trainer.advice import DataAdvisor, own_cores
from trainer.distributed import StopVote, gathered, mean_over_ranks
from trainer.engine import Engine
from trainer.judgement import Judge
from trainer.metrics import Display, MetricsLog, WaitClock


class TrainingError(RuntimeError):
    """The run cannot go on: what happened, and what to try."""


def fit(engine: Engine, folder: Path, log: MetricsLog | None, display: Display, stop: StopVote, judge: Judge) -> bool:
    """Train up to the last step; False if a signal stopped it before.

    Rank 0 has a `log` and writes the checkpoints into `folder`. `judge` is asked at the end of epochs.

    Raises:
        TrainingError: loss or gradients were not finite (see `--on-nan`), too many images went bad over all ranks, or
            the last checkpoint could not be written.
        DatasetError: too many images went bad on this rank.
    """
    run, batch_size = engine.config.run, engine.config.optim.batch_size
    clock, batches = WaitClock(engine.device), _batches(engine)
    advisor = DataAdvisor(engine.threads, own_cores(engine.world.local_size))
    read_step, read_time = engine.step, time.perf_counter()
    stopped = False
    while engine.step < engine.last and not stopped:
        with clock.waiting():
            batch = next(batches)
        loss = engine.train_step(batch.views, batch.indices)
        # The vote is cast every step, so that the ranks' votes meet.
        stopped = stop.passed()
        epoch_ends = engine.step % engine.steps_per_epoch == 0
        saves = epoch_ends or stopped or engine.step == engine.last
        if saves or engine.step % run.log_every == 0:
            mean = _read(engine, loss)
            scale = engine.scaler.get_scale()  # 1 without fp16
            seen = engine.watch.read(scale)
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
            engine.seconds += elapsed
            # Before the checkpoint, which keeps the history: a run that goes on judges nothing twice.
            if judge.due() and (accuracy := judge.accuracy()) is not None:
                row["knn"] = accuracy
            if log is not None:
                log.write(row)
            display.show(row)
            if advice := advisor.hear(waited, elapsed):
                display.say(advice)
            for warning in seen.warnings:
                display.say(f"warning: {warning}")
            if seen.fatal is not None:
                raise TrainingError(seen.fatal)
            if saves and log is not None:
                _save(engine, folder, display, ends=stopped or engine.step == engine.last)
            read_step, read_time = engine.step, time.perf_counter()
    return not stopped


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


def _save(engine: Engine, folder: Path, display: Display, ends: bool) -> None:
    try:
        checkpoint.save(folder, engine.state_dict(), engine.config.run.keep)
    except OSError as error:
        if ends:
            raise TrainingError(f"{error}; make room and run the same command again") from None
        display.say(f"warning: {error}; training goes on with the checkpoint before")
