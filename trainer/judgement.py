"""What a run came to: k-NN accuracy of the features, and the summary in words and numbers."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dali_pipes import DatasetError, DatasetIndex
from dali_pipes.replacing import write_atomically
from dali_pipes.stream import LoaderOutOfMemory
from trainer.config import Config
from trainer.engine import Engine, autocast
from trainer.eval_reader import EvalReader
from trainer.heartbeat import Heartbeat
from trainer.metrics import METRICS, Display, read_metrics
from trainer.signals import Stopped

SUMMARY = "summary.json"
Trees = tuple[DatasetIndex, DatasetIndex]  # the bank and the queries
_NUMBERS = ("steps", "loss_first", "loss_last", "knn_before", "knn_after", "images_per_second", "data_wait")


def judgeable(
    config: Config, index: DatasetIndex, val: DatasetIndex | None, ranks: int, display: Display
) -> Trees | None:
    """The bank and the queries of the k-NN accuracy; None, saying why, if it was asked for and cannot be had."""
    if not config.run.knn:
        return None
    if val is None:
        display.say(f"no k-NN accuracy: {config.data.data} has no train/ and val/, or val.txt beside it, with images")
        return None
    if len(val) < ranks:
        display.say(f"no k-NN accuracy: val/ has {len(val)} images for {ranks} ranks")
        return None
    if not val.labelled_as(index) or len(index.classes) < 2:
        display.say("no k-NN accuracy: training and validation images do not have the same classes, at least two")
        return None
    return index, val


@dataclass(frozen=True)
class Judge:
    """The k-NN accuracy of an engine's features as it trains, on `trees`; None if there are none.

    What was found is kept in the engine's notes, and so in its checkpoints: `knn`, a list of {"step", "accuracy"}.
    """

    engine: Engine
    trees: Trees | None
    display: Display
    heartbeat: Heartbeat
    stops: Callable[[], bool]  # whether to leave off

    def due(self) -> bool:
        """Whether `--knn-every` asks for it at the engine's present step."""
        every, engine = self.engine.config.run.knn_every, self.engine
        if not every or self.trees is None:
            return False
        return engine.step == engine.last or engine.step % (every * engine.steps_per_epoch) == 0

    def accuracy(self) -> float | None:
        """k-NN accuracy (0 to 1) of the base encoder's backbone as it stands; found once a step, then remembered.

        Training is not disturbed: no random number is drawn and no batch statistic moves. Images that failed are left
        out. None without trees, and, saying so, if the memory is not enough or too many images fail: a run is not lost
        for its judgement. Every rank must call it.

        Raises:
            Stopped: a rank was to leave off.
        """
        if self.trees is None:
            return None
        history = self.engine.notes.setdefault("knn", [])
        if not history or history[-1]["step"] != self.engine.step:
            found = self._measure(*self.trees)
            if found is None:
                return None
            history.append({"step": self.engine.step, "accuracy": found})
            if not self.due() and self.engine.step:
                return found  # the summary is about to say it
            when = f"after step {self.engine.step}" if self.engine.step else "before the first step"
            self.display.say(f"k-NN {when}: {found:.1%}")
        return history[-1]["accuracy"]

    def _measure(self, bank: DatasetIndex, queries: DatasetIndex) -> float | None:
        try:
            return self._accuracy(bank, queries)
        except torch.OutOfMemoryError as error:
            what = "the images of a batch" if isinstance(error, LoaderOutOfMemory) else "the whole dataset's features"
            self.display.say(f"no k-NN accuracy: {what} do not fit into memory")
            return None
        except (DatasetError, FloatingPointError) as error:
            self.display.say(f"no k-NN accuracy: {error}")
            return None
        finally:
            self.engine.model.train()

    @cached_property
    def _reader(self) -> EvalReader:  # one for all evaluations, so that each failed image is reported once
        engine = self.engine
        return EvalReader(engine.config.data, engine.world, engine.device, engine.threads, self.display.warn)

    def _accuracy(self, bank: DatasetIndex, queries: DatasetIndex) -> float:
        engine, config = self.engine, self.engine.config

        def features(images: torch.Tensor) -> torch.Tensor:
            self.heartbeat.judged()
            if self.stops():
                raise Stopped
            with autocast(config, engine.device):
                return engine.model.features(images.to(engine.dtype))

        engine.model.eval()
        batch_size = max(1, min(256, config.optim.batch_size // engine.world.size))
        bank, watched = bank.without(engine.loader.failed), self.heartbeat.judging(engine.step)
        return self._reader.knn_accuracy(features, bank, queries, batch_size, watched)


def read_summary(out: Path) -> dict[str, Any] | None:
    """`summary.json` of a run that ended; None if there is none, or a damaged one."""
    try:
        summary = json.loads((out / SUMMARY).read_bytes())
        numbers = [summary[name] for name in _NUMBERS]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, IndexError):
        return None
    whole = isinstance(summary["steps"], int) and all(isinstance(number, int | float | None) for number in numbers)
    return summary if whole else None


def write_summary(engine: Engine, out: Path, knn_after: float | None) -> dict[str, Any]:
    """Write `summary.json` of a run that ended, and return it."""
    rows = read_metrics(out)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    summary = {
        "steps": engine.step,
        "epochs": engine.step / engine.steps_per_epoch,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "knn_before": engine.notes.get("knn_before"),
        "knn_after": knn_after,
        "images_per_second": statistics.median(row["images_per_second"] for row in rows) if rows else None,
        "data_wait": statistics.median(row["data_wait"] for row in rows) if rows else None,
        "training_seconds": engine.seconds,
        "ranks": engine.world.size,
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    write_atomically(out / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def conclude(result: dict[str, Any], out: Path, display: Display) -> None:
    """The end of a run in a few lines."""
    if result["loss_first"] is not None:
        display.say(f"loss   {result['loss_first']:.3f} -> {result['loss_last']:.3f} in {result['steps']} steps")
    if result["knn_after"] is not None:
        before = f"{result['knn_before']:.1%} -> " if result["knn_before"] is not None else ""
        display.say(f"k-NN   {before}{result['knn_after']:.1%}")
    if result["images_per_second"] is not None:
        display.say(f"speed  {result['images_per_second']:.0f} images/s, waiting for data {result['data_wait']:.0%}")
    display.say(f"files  {out}: checkpoints, {METRICS}, {SUMMARY}; tensorboard --logdir {out}")
